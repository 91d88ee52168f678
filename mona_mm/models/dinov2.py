"""DINOv2 as a backbone of dense prediction."""

from typing import Any, Literal

from torch import nn

from mona_mm.registry import MODELS

_SIZES = dict(
    small=dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
    base=dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072),
    large=dict(embed_dims=1024, num_layers=24, num_heads=16, feedforward_channels=4096),
    giant=dict(embed_dims=1536, num_layers=40, num_heads=24, feedforward_channels=6144),
)


@MODELS.register_module()
def DINOv2(
    arch: Literal['small', 'base', 'large', 'giant'] | dict[str, int],
    num_registers: int = 0,
    img_size: int | tuple[int, int] = 518,
    patch_size: int = 14,
    out_type: str = 'featmap',
    layer_scale_init_value: float = 1e-5,
    **options: Any,
) -> nn.Module:
    """DINOv2's vision transformer: mmpretrain's, with LayerScale, register tokens where it has them, and one map out.

    Attention is global in every layer. Its table of positions is interpolated for every image size, and images whose
    sides are no multiples of the patch are padded at their right and lower edge. A ``Pretrained`` ``init_cfg`` may name
    a file in Meta's, timm's or Hugging Face's names.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, and the published
    code (Apache-2.0).

    Args:
        arch: The size, or mmpretrain's dict of one.
        num_registers: The number of register tokens: 4 in the checkpoints ``*_reg4``, else 0.
        img_size: The image size of the table of positions.
        patch_size: The side of a patch in pixels.
        out_type: What comes out of every layer in ``out_indices``: ``'featmap'`` is ``(B, C, H, W)``.
        layer_scale_init_value: The initial scale of each branch.
        options: The other arguments of mmpretrain's VisionTransformer.
    """
    # Here, since mmpretrain takes seconds to import and a detector without a ViT does not need it.
    from mona_mm.models.register_vit import RegisterViT

    if arch == 'giant':
        options['layer_cfgs'] = {'ffn_type': 'swiglu_fused', **options.get('layer_cfgs', {})}
    return RegisterViT(
        num_registers=num_registers,
        arch=_SIZES.get(arch, arch) if isinstance(arch, str) else arch,
        img_size=img_size,
        patch_size=patch_size,
        out_type=out_type,
        layer_scale_init_value=layer_scale_init_value,
        **options,
    )
