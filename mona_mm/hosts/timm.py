"""timm's models in the ``TIMMBackbone`` of mmpretrain and mmseg. Nothing here needs timm.

A ``TIMMBackbone`` may hold any model, so it has the descriptions of all these blocks, and a backbone counts with those
that it holds. Three of timm's ways to give feature maps (its ``feature_cls``) are known: the model as it is, the model
in a wrapper, and its modules one level up.
"""

import re
import sys
from itertools import product

from torch import Tensor, nn

from mona_mm.errors import CheckpointMismatchError
from mona_mm.hosts.host import (
    BlockSpec,
    Branch,
    GridArgument,
    GridSource,
    Host,
    Linear,
    find_host,
    fused_qkv,
    grid_of_map,
    register_host,
    separate_linears,
)
from mona_mm.nn.mixin import stock_class

_MODELS = 'timm.models'
_BRANCHES = dict(attn=Branch('drop_path1'), ffn=Branch('drop_path2'))
_MLP = separate_linears(fc1='mlp.fc1', fc2='mlp.fc2')
_GATED_MLP = separate_linears(fc1='mlp.fc1_x', fc2='mlp.fc2')
"""A SwiGLU of three linear layers, of which the gate ``fc1_g`` is at no site. In the one of two, ``fc1`` holds both."""
_FUSED = {**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj')}
_READ = {
    **{
        site: Linear('attn.qkv.weight', f'attn.{site}_bias' if site != 'k' else None, index, is_called=False)
        for index, site in enumerate('qkv')
    },
    **separate_linears(proj='attn.proj'),
}
"""An attention with biases of q and v alone, which reads the weight of ``qkv`` and does not call the layer."""
_SEPARATE = separate_linears(q='attn.q_proj', k='attn.k_proj', v='attn.v_proj', proj='attn.proj')
_PATCHES = GridSource('patch_embed.proj', grid_of_map)


def _plain(family: str, cls: str, attentions: dict[str, dict]) -> tuple[BlockSpec, ...]:
    """The blocks of a plain transformer, for each kind of attention, told by a name in it, and both kinds of FFN."""
    return tuple(
        BlockSpec(
            cls=f'{_MODELS}.{cls}',
            has=(attention, mlp),
            linears={**attentions[attention], **linears},
            uncalled=('attn.qkv',) if attentions[attention] is _READ else (),
            branches=_BRANCHES,
            mid_norm='norm2',
            grid=_PATCHES,
            family=family,
        )
        for attention, (mlp, linears) in product(attentions, {'mlp.fc1': _MLP, 'mlp.fc1_x': _GATED_MLP}.items())
    )


_IN_BLOCKS = dict(branches=_BRANCHES, mid_norm='norm2')
_METAFORMER = dict(
    cls=f'{_MODELS}.metaformer.MetaFormerBlock',
    branches=dict(attn=Branch('drop_path1', end='layer_scale1'), ffn=Branch('drop_path2', end='layer_scale2')),
    mid_norm='norm2',
    mid_residual='res_scale2',
    family='MetaFormer (CAFormer)',
)

SPECS = (
    *_plain('VisionTransformer', 'vision_transformer.Block', {'attn.qkv': _FUSED}),
    *_plain(
        'Eva (EVA-02, DINOv3 ViT)',
        'eva.EvaBlock',
        {'attn.q_bias': _READ, 'attn.qkv': _FUSED, 'attn.q_proj': _SEPARATE},
    ),
    *_plain('Beit', 'beit.Block', {'attn.q_bias': _READ, 'attn.qkv': _FUSED}),
    BlockSpec(
        cls=f'{_MODELS}.swin_transformer.SwinTransformerBlock',
        linears={**_FUSED, **_MLP},
        layout='BHWC',
        mid_layout='BNC',
        family='SwinTransformer',
        **_IN_BLOCKS,
    ),
    BlockSpec(
        cls=f'{_MODELS}.convnext.ConvNeXtBlock',
        linears=_MLP,
        branches=dict(ffn=Branch('drop_path')),
        layout='BCHW',
        family='ConvNeXt (V2, DINOv3 ConvNeXt)',
    ),
    BlockSpec(
        cls=f'{_MODELS}.hiera.HieraBlock',
        linears={**_FUSED, **_MLP},
        row_major=False,
        family='Hiera',
        **_IN_BLOCKS,
    ),
    BlockSpec(
        cls=f'{_MODELS}.pvt_v2.Block',
        linears={
            **separate_linears(q='attn.q', proj='attn.proj'),
            'k': Linear('attn.kv.weight', 'attn.kv.bias', 0, num_slices=2),
            'v': Linear('attn.kv.weight', 'attn.kv.bias', 1, num_slices=2),
            **_MLP,
        },
        grid=GridArgument(('feat_size',)),
        family='PyramidVisionTransformerV2',
        **_IN_BLOCKS,
    ),
    BlockSpec(
        cls=f'{_MODELS}.focalnet.FocalNetBlock',
        linears={**separate_linears(proj='modulation.proj'), **_MLP},
        layout='BCHW',
        family='FocalNet',
        **_IN_BLOCKS,
    ),
    BlockSpec(
        has='token_mixer.qkv',
        linears={**fused_qkv('token_mixer.qkv'), **separate_linears(proj='token_mixer.proj'), **_MLP},
        grid=GridSource('downsample', grid_of_map),
        **_METAFORMER,
    ),
    BlockSpec(
        has='token_mixer.pwconv2',
        linears={**separate_linears(proj='token_mixer.pwconv2'), **_MLP},
        layout='BCHW',
        **_METAFORMER,
    ),
)
"""The blocks of timm's models."""

_CLASSIFIER = ('norm', 'fc_norm', 'head', 'head_dist', 'attn_pool')
"""Parts of a classifier, which a model that gives feature maps has not."""


def convert_timm(backbone: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the checkpoint of a model to its names in a ``TIMMBackbone``, by timm's own function for that model.

    timm's function knows other published names of the model as well (Meta's DINOv2 and DINOv3, Microsoft's Swin) and
    resizes tables of positions. What a classifier needs, and stages that the backbone has left out, are dropped.

    Raises:
        CheckpointMismatchError: if timm's function fails with these tensors.
    """
    prefix, model, is_flat = _model_in(backbone.timm_model)
    block = next(iter(find_host(backbone).blocks(backbone).values()))
    given, convert = tensors, getattr(sys.modules[stock_class(block).__module__], 'checkpoint_filter_fn', None)
    if convert is not None:
        try:
            tensors = convert(dict(tensors), model)
        except Exception as error:  # on names that it does not expect it may raise anything
            raise CheckpointMismatchError(
                f'timm cannot read the checkpoint as one of this {type(model).__name__} ({type(error).__name__}: '
                f'{error}). Use the checkpoint of the same model.'
            ) from error
    _check_biases(given, tensors)
    current = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_left_out(name, backbone.timm_model, current)}
    return {f'{prefix}{_flat(name) if is_flat else name}': tensor for name, tensor in tensors.items()}


def _check_biases(given: dict[str, Tensor], converted: dict[str, Tensor]) -> None:
    """Refuse what timm drops of DINOv3: biases of queries and values, for a model that was made without them."""
    wide = [t.chunk(3) for name, t in given.items() if name.endswith('.attn.qkv.bias') and 'storage_tokens' in given]
    if any(q.any() or v.any() for q, _, v in wide) and not any(name.endswith('.q_bias') for name in converted):
        raise CheckpointMismatchError(
            'The checkpoint has biases of queries and values, and this model has none. Use the model_name of timm that '
            "ends in _qkvb, such as 'vit_small_patch16_dinov3_qkvb'."
        )


def _model_in(net: nn.Module) -> tuple[str, nn.Module, bool]:
    """The prefix of a model's names in a ``TIMMBackbone``, the model, and whether its modules are one level up.

    In that case the model is a module with the same parts under the names that they had.
    """
    for name in ('model', 'body'):  # wrappers of timm that give feature maps
        if name in net._modules and isinstance(net, nn.ModuleDict):
            return f'timm_model.{name}.', net._modules[name], False
    if not isinstance(net, nn.ModuleDict):
        return 'timm_model.', net, False
    model = nn.Module()
    for name, child in net.items():
        around, _, index = name.rpartition('_')
        if index.isdigit():
            if around not in model._modules:
                model.add_module(around, nn.Module())
            model._modules[around].add_module(index, child)
        else:
            model.add_module(name, child)
    return 'timm_model.', model, True


def _flat(name: str) -> str:
    """A name of a model as it is where the parts of its sequences are one level up: ``stages.0.`` is ``stages_0.``."""
    return re.sub(r'^(\w+)\.(\d+)\.', r'\1_\2.', name)


def _is_left_out(name: str, net: nn.Module, current: dict[str, Tensor]) -> bool:
    """Whether the backbone needs no tensor of this name: it is of a classifier, or of a stage that was left out."""
    if name in current:
        return False
    stages = [info['module'] for info in getattr(getattr(net, 'feature_info', None), 'info', ())]
    parts = [part for part in (*_CLASSIFIER, *stages) if name.startswith(f'{part}.')]
    return any(not any(other.startswith(f'{part}.') for other in current) for part in parts)


for _library in ('mmpretrain', 'mmseg'):
    register_host(
        f'{_library}.models.backbones.timm_backbone.TIMMBackbone',
        Host(
            specs=SPECS,
            own_format=('timm', convert_timm),
            recomputed=('relative_position_index', 'attn_mask'),
            position_tables=('relative_position_bias_table', 'pos_embed'),
            not_selected=('relative_position_bias_table',),
        ),
    )
