"""DINOv2 as a backbone for dense prediction."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch import nn

from mona_mm.errors import ConfigError
from mona_mm.options import Count, Rule, checked, show
from mona_mm.registry import MODELS

_SIZES = dict(
    small=dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
    base=dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
    large=dict(embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096),
    giant=dict(embed_dims=1536, num_layers=40, num_heads=24, feedforward_channels=6144),
)


_OutType = Literal['featmap', 'raw', 'cls_token', 'avg_featmap']


@MODELS.register_module()
@checked
def DINOv2(
    arch: Literal['small', 'base', 'large', 'giant'] | dict[str, int],
    num_registers: Annotated[int, Rule('a whole number of at least 0', lambda value: value >= 0)] = 0,
    img_size: int | tuple[int, int] = 518,
    patch_size: Count = 14,
    out_type: _OutType = 'featmap',
    layer_scale_init_value: float = 1e-5,
    **options: Any,
) -> nn.Module:
    """Build DINOv2's vision transformer: mmpretrain's with LayerScale, optional register tokens, and one output map.

    Attention is global in every layer. The position table is interpolated for every image size, and images whose sides
    are not multiples of the patch size are padded at their right and lower edges. The file in a ``Pretrained``
    ``init_cfg`` may use Meta's, timm's or Hugging Face's parameter names, or be the teacher of a run of Meta's code.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, and the published
    code (Apache-2.0).

    Args:
        arch: the name of a size, or a dict of sizes as mmpretrain's VisionTransformer takes it.
        num_registers: the number of register tokens: 4 in the checkpoints ``*_reg4``, else 0.
        img_size: the image size of the position table.
        patch_size: the side of a patch in pixels.
        out_type: the form of the output of every layer in ``out_indices``; ``'featmap'`` gives ``(B, C, H, W)``.
        layer_scale_init_value: the initial scale of each branch.
        options: the other arguments of mmpretrain's VisionTransformer, such as ``out_indices``, whose negative indices
            count from the end.

    Raises:
        ConfigError: if an argument has another value than these, or ``out_indices`` are not indices of layers.
    """
    # Imported here since mmpretrain takes seconds to import, and a detector without a ViT does not need it.
    from mona_mm.models.register_vit import RegisterViT

    sizes = _SIZES[arch] if isinstance(arch, str) else arch
    if 'out_indices' in options and 'num_layers' in sizes:
        options['out_indices'] = _layers(options['out_indices'], sizes['num_layers'])
    if arch == 'giant':
        options['layer_cfgs'] = {'ffn_type': 'swiglu_fused', **options.get('layer_cfgs', {})}
    return RegisterViT(
        num_registers=num_registers,
        arch=sizes,
        img_size=img_size,
        patch_size=patch_size,
        out_type=out_type,
        layer_scale_init_value=layer_scale_init_value,
        **options,
    )


def _layers(out_indices: Any, count: int) -> list[int]:
    """The indices of layers in ``out_indices``, as a list: mmpretrain's class replaces negative ones in place."""
    indices = list(out_indices) if isinstance(out_indices, Sequence) else [out_indices]
    if not indices or not all(isinstance(index, int) and -count <= index < count for index in indices):
        raise ConfigError(
            f'DINOv2: out_indices={show(out_indices)} must be indices of the {count} layers, from 0 to {count - 1} or '
            'negative ones from the end.'
        )
    return indices
