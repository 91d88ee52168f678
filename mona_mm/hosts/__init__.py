"""The stock backbones, and where in their blocks a method may attach. Each family of hosts has a file of its own.

A *host* is a stock backbone class, a *site* a named place in each of its blocks. At a stream site a method maps tokens
``(B, N, C)``, given the grid's ``(H, W)``; at a linear site it adds to the output of a linear layer:

=================================  =================================================================================
``post_attn``, ``post_ffn``        maps the token stream after the residual add
``attn_branch``, ``ffn_branch``    maps the branch's output before DropPath and the residual add
``attn_out``, ``ffn_out``          maps the branch's output after DropPath, before the residual add
``parallel_ffn``                   adds a branch of the un-normalised residual beside the FFN, after DropPath
``q``, ``k``, ``v``, ``proj``,     adds a branch to the linear's output; of a fused ``qkv`` to the slice of that name
``fc1``, ``fc2``
=================================  =================================================================================

The sites of the hosts whose blocks have a forward of their own here (``docs/hosts.md`` lists the sites of all hosts):

============================  ======================================================================================
Swin (three libraries), ViT   all
SwinV2                        all; its LayerNorms end the branches: DropPath and the ``*_branch`` sites are before them,
                              ``*_out`` after them. ``q``, ``k``, ``v`` are reached through their weight
PVTv2                         all; ``fc1`` and ``fc2`` are 1x1 convolutions with a depthwise one between them. ``q``,
                              ``k``, ``v``, ``proj`` are reached through their weight
ConvNeXt                      a block has one branch (depthwise convolution, two linears, layer scale) and counts as
                              FFN: ``ffn_branch``, ``ffn_out``, ``parallel_ffn``, ``post_ffn``, ``fc1``, ``fc2``
============================  ======================================================================================

*Reached through their weight*: the host never calls the linear layer as a module, so only a method that adds to the
weight can attach there (LoRA without dropout, single weights).
"""

from mona_mm.hosts import (  # noqa: F401  they register themselves
    beit,
    convnext,
    convolutional,
    ffn,
    hierarchical,
    huggingface,
    plain,
    pvt,
    refused,
    swin,
    swin_v2,
    timm,
    twins,
    vit,
    window_attention,
)
from mona_mm.hosts.block import HookedBlock, PeftBlock, StockLinear
from mona_mm.hosts.fast import make_fast
from mona_mm.hosts.host import (
    HOSTS,
    REFUSED,
    SHARED_DROP_PATH,
    BlockSpec,
    Branch,
    Grid,
    GridArgument,
    GridAttribute,
    GridSource,
    Host,
    Linear,
    SquareGrid,
    find_host,
    fused_qkv,
    grid_of_map,
    is_host,
    position_table_names,
    recomputed_names,
    register_blocks,
    register_host,
    separate_linears,
)
from mona_mm.hosts.inject import Site, Sites, inject, modules_beside_linears, remove, sites_of
from mona_mm.hosts.layers import Layer, PeftLayer, attach_to_layer, find_layers, read_past, weights_with_method
from mona_mm.hosts.sites import (
    LINEAR_SITES,
    STREAM_SITES,
    PeftModules,
    method_modules,
    method_names,
    method_paths,
    put_back,
    taken_out,
)

__all__ = [
    'HOSTS',
    'LINEAR_SITES',
    'REFUSED',
    'SHARED_DROP_PATH',
    'STREAM_SITES',
    'BlockSpec',
    'Branch',
    'Grid',
    'GridArgument',
    'GridAttribute',
    'GridSource',
    'HookedBlock',
    'Host',
    'Layer',
    'Linear',
    'PeftBlock',
    'PeftLayer',
    'PeftModules',
    'Site',
    'Sites',
    'SquareGrid',
    'StockLinear',
    'attach_to_layer',
    'find_host',
    'find_layers',
    'fused_qkv',
    'grid_of_map',
    'inject',
    'is_host',
    'make_fast',
    'method_modules',
    'method_names',
    'method_paths',
    'modules_beside_linears',
    'position_table_names',
    'put_back',
    'read_past',
    'recomputed_names',
    'register_blocks',
    'register_host',
    'remove',
    'separate_linears',
    'sites_of',
    'taken_out',
    'weights_with_method',
]
