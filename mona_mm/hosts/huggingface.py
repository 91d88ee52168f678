"""transformers' models in :class:`mona_mm.models.HFBackbone`. Nothing here needs transformers."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mona_mm.errors import CheckpointMismatchError
from mona_mm.hosts.formats import rename
from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    BlockSpec,
    Branch,
    GridArgument,
    GridSource,
    Host,
    fused_qkv,
    grid_of_map,
    register_host,
    separate_linears,
)
from mona_mm.nn.mixin import stock_class

_MODELS = 'transformers.models'
_MLP = separate_linears(fc1='mlp.fc1', fc2='mlp.fc2')
_UP_AND_DOWN = separate_linears(fc1='mlp.up_proj', fc2='mlp.down_proj')
"""An FFN of other names, or a SwiGLU of three linear layers, of which the gate ``gate_proj`` is at no site."""
_ATTENTION = separate_linears(q='attention.q_proj', k='attention.k_proj', v='attention.v_proj', proj='attention.o_proj')


def _dino(module: str, layer: str, patches: str, family: str) -> tuple[BlockSpec, ...]:
    return tuple(
        BlockSpec(
            cls=f'{_MODELS}.{module}.modeling_{module}.{layer}',
            has=('attention.q_proj', linears['fc2'].module),
            linears={**_ATTENTION, **linears},
            branches=SHARED_DROP_PATH,
            mid_norm='norm2',
            grid=GridSource(patches, grid_of_map),
            family=family,
        )
        for linears in (_MLP, _UP_AND_DOWN)
    )


def _convnext(module: str, layer: str, linear: str, family: str) -> BlockSpec:
    return BlockSpec(
        cls=f'{_MODELS}.{module}.modeling_{module}.{layer}',
        linears=separate_linears(fc1=f'{linear}1', fc2=f'{linear}2'),
        branches=dict(ffn=Branch('drop_path')),
        layout='BCHW',
        family=family,
    )


_LEFT_OUT = re.compile(r'(\w+\.)?(classifier|pooler|head|layernorm|layer_norm|norm)\.|(.*\.)?mask_token$')
"""The names of tensors of a published model that no backbone needs: a classifier and the norm before it, and the token
of masked training."""


def convert_huggingface(backbone: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the checkpoint of a model to its names in an ``HFBackbone``, by transformers' own loading.

    The checkpoint may have any names that transformers knows for the model, with or without those of a task around it,
    or Meta's names of DINOv2 and DINOv3. What a classifier needs is dropped.

    Raises:
        CheckpointMismatchError: if transformers cannot load these tensors.
    """
    model = backbone.hf_model
    if any(re.match(r'blocks\.\d+\.|stages\.\d+\.\d+\.|downsample_layers\.', name) for name in tensors):
        tensors = convert_meta(tensors, model.config.model_type)
    try:
        with _quiet(sys.modules['transformers']):
            loaded, info = stock_class(model).from_pretrained(
                None,
                config=model.config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # on tensors that it does not expect it may raise anything
        line = ' '.join(str(error).split())[:400]
        raise CheckpointMismatchError(
            f'transformers cannot read the checkpoint as one of this {type(model).__name__} ({type(error).__name__}: '
            f'{line}). Use the checkpoint of the same model.'
        ) from error
    found = {name: t for name, t in loaded.state_dict().items() if name not in info['missing_keys']}
    found |= {name: tensors.get(name, torch.empty(0)) for name in info['unexpected_keys']}
    found |= {name: torch.empty(shape, device='meta') for name, shape, _ in info['mismatched_keys']}
    needed = model.state_dict()
    return {f'hf_model.{name}': t for name, t in found.items() if name in needed or not _LEFT_OUT.match(name)}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """A context without transformers' reports and progress bars, in place of which the load is reported here."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def convert_meta(tensors: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Convert Meta's DINOv2 (with or without registers) or DINOv3 to the names of transformers' ``model_type``.

    A model of another type is returned as it is. Meta's queries, keys and values are one linear layer. In DINOv3 a mask
    takes the bias of the keys away, and transformers has none.
    """
    if model_type == 'dinov3_convnext':
        return rename({name: t for name, t in tensors.items() if not re.match(r'norms?\.', name)}, _CONVNEXT)
    if model_type not in _LAYERS:
        return tensors
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(('.bias_mask', '.periods')):
            continue
        if '.attn.qkv.' not in name:
            separate[name] = tensor.view(1, 1, -1) if name == 'mask_token' and model_type == 'dinov3_vit' else tensor
            continue
        for part, rows in zip(('q', 'k', 'v'), tensor.chunk(3), strict=True):
            if model_type != 'dinov3_vit' or part != 'k' or not name.endswith('.bias'):
                separate[name.replace('.qkv.', f'.{part}_proj.')] = rows
    return rename(separate, (*_LAYERS[model_type], *_PLAIN))


_PLAIN = (
    (r'^(cls_token|mask_token|register_tokens)$', r'embeddings.\1'),
    (r'^pos_embed$', 'embeddings.position_embeddings'),
    (r'\.attn\.([qkv])_proj\.', r'.attention.\1_proj.'),
    (r'\.attn\.proj\.', '.attention.o_proj.'),
    (r'\.ls([12])\.gamma$', r'.layer_scale\1.lambda1'),
)
_DINOV2 = (
    (r'^blocks\.', 'encoder.layer.'),
    (r'^norm\.', 'layernorm.'),
    (r'^patch_embed\.proj\.', 'embeddings.patch_embeddings.projection.'),
    (r'\.mlp\.w12\.', '.mlp.weights_in.'),
    (r'\.mlp\.w3\.', '.mlp.weights_out.'),
)
_LAYERS = {
    'dinov2': _DINOV2,
    'dinov2_with_registers': _DINOV2,
    'dinov3_vit': (
        (r'^blocks\.', 'model.layer.'),
        (r'^patch_embed\.proj\.', 'embeddings.patch_embeddings.'),
        (r'^storage_tokens$', 'embeddings.register_tokens'),
        (r'\.mlp\.(fc1|w2)\.', '.mlp.up_proj.'),
        (r'\.mlp\.w1\.', '.mlp.gate_proj.'),
        (r'\.mlp\.(fc2|w3)\.', '.mlp.down_proj.'),
    ),
}
_CONVNEXT = (
    (r'^downsample_layers\.(\d+)\.', r'model.stages.\1.downsample_layers.'),
    (r'^stages\.(\d+)\.(\d+)\.', r'model.stages.\1.layers.\2.'),
    (r'(\.layers\.\d+)\.norm\.', r'\1.layer_norm.'),
    (r'\.dwconv\.', '.depthwise_conv.'),
    (r'\.pwconv(\d)\.', r'.pointwise_conv\1.'),
)


register_host(
    'mona_mm.models.hf_backbone.HFBackbone',
    Host(
        specs=(
            *_dino('dinov2', 'Dinov2Layer', 'embeddings.patch_embeddings.projection', 'Dinov2'),
            *_dino(
                'dinov2_with_registers',
                'Dinov2WithRegistersLayer',
                'embeddings.patch_embeddings.projection',
                'Dinov2WithRegisters',
            ),
            *_dino('dinov3_vit', 'DINOv3ViTLayer', 'embeddings.patch_embeddings', 'DINOv3ViT'),
            BlockSpec(
                cls=f'{_MODELS}.swin.modeling_swin.SwinLayer',
                has='attention.q_proj',
                linears={**_ATTENTION, **_MLP},
                # the FFN ends with the Dropout that the attention has called before
                branches=dict(attn=Branch('drop_path'), ffn=Branch('dropout', call=1)),
                mid_norm='layernorm_after',
                grid=GridArgument(('input_dimensions',)),
                family='Swin',
            ),
            _convnext('convnext', 'ConvNextLayer', 'pwconv', 'ConvNext'),
            _convnext('convnextv2', 'ConvNextV2Layer', 'pwconv', 'ConvNextV2'),
            _convnext('dinov3_convnext', 'DINOv3ConvNextLayer', 'pointwise_conv', 'DINOv3ConvNext'),
            BlockSpec(
                cls=f'{_MODELS}.hiera.modeling_hiera.HieraLayer',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **_MLP},
                branches=SHARED_DROP_PATH,
                mid_norm='layernorm_after',
                row_major=False,
                family='Hiera',
            ),
        ),
        output_norms=('hf_model.hidden_states_norms.',),
        own_format=('huggingface', convert_huggingface),
        recomputed=('relative_position_index', 'inv_freq'),
        position_tables=('relative_position_bias_table', 'position_embeddings'),
        not_selected=('relative_position_bias_table',),
    ),
)
