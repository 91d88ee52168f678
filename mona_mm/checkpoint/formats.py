"""Checkpoints of other code: which it is, seen from the names, and its names and layouts as the OpenMMLab hosts' ones.

================  ====================================================================================================
``'swin'``        Microsoft's Swin and SwinV2, timm's, and the published Mona code: ``layers.I.blocks.J.attn.qkv``
``'vit'``         timm's ViT, MAE, MoCo v3 and others of the same names: ``blocks.I.attn.qkv``
``'vit-npz'``     Google's ViT, ``.npz``: ``Transformer/encoderblock_I/...``
``'pvt'``         the official PVT and PVTv2: ``block1.0.attn.q``
``'convnext'``    the official ConvNeXt and ConvNeXt V2: ``stages.I.J.dwconv``
``'convnext-timm'``  timm's: ``stages.I.blocks.J.conv_dw``
``'mm'``          mmdet's, mmseg's, mmpretrain's, and mona_mm's own: nothing to do
================  ====================================================================================================
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_FORMATS = (
    ('swin', r'layers\.\d+\.blocks\.\d+\.'),
    ('vit', r'blocks\.\d+\.attn\.'),
    ('vit-npz', r'Transformer/encoderblock_\d+/'),
    ('pvt', r'block\d+\.\d+\.attn\.'),
    ('convnext', r'stages\.\d+\.\d+\.dwconv\.'),
    ('convnext-timm', r'stages\.\d+\.blocks\.\d+\.conv_dw\.'),
    # ViT and PVT; Swin; ConvNeXt
    ('mm', r'(layers|stages)\.\d+\.(ln1|attn|ffn|\d+\.|blocks\.\d+\.(attn\.w_msa|peft|norm1)|downsample)'),
)


def recognise(names: Iterable[str]) -> str | None:
    """The format of a backbone's checkpoint, one of those above; None if it is none of them."""
    names = list(names)
    for name, pattern in _FORMATS:
        if any(re.match(pattern, key) for key in names):
            return name
    return None


def _rename(
    tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]], dropped: str | None = None
) -> dict[str, Tensor]:
    renames, renamed = tuple(renames), {}
    for name, tensor in tensors.items():
        if dropped and re.match(dropped, name):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def convert_vit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's ViT, MAE (without its decoder) and MoCo v3 (its encoder) for mmpretrain's ViT."""
    renames = (
        (r'^norm\.', 'ln1.'),
        (r'^fc_norm\.', 'ln2.'),
        (r'^norm_pre\.', 'pre_norm.'),
        (r'^blocks\.(\d+)\.norm(\d)\.', r'layers.\1.ln\2.'),
        (r'^blocks\.', 'layers.'),
        (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
        (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
        (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    )
    return _rename(tensors, renames, r'head|pre_logits\.|decoder|mask_token$')


def convert_vit_npz(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Google's ViT: kernels are ``(in, out)``, of attention ``(width, heads, head width)``, of images HWIO."""
    converted = {}
    for name, tensor in tensors.items():
        if re.match(r'(head|pre_logits)/|opt', name):
            continue
        tensor = _npz_layout(name, tensor)
        name = re.sub(r'^Transformer/encoderblock_(\d+)/', r'layers.\1.', name)
        for old, new in _NPZ_NAMES:
            name = name.replace(old, new)
        converted['cls_token' if name == 'cls' else name] = tensor
    for name in [name for name in converted if '.attn.query.' in name]:
        parts = [converted.pop(name.replace('query', part)) for part in ('query', 'key', 'value')]
        converted[name.replace('query', 'qkv')] = torch.cat(parts)
    return converted


_NPZ_NAMES = (
    ('LayerNorm_0/', 'ln1.'),
    ('LayerNorm_2/', 'ln2.'),
    ('MultiHeadDotProductAttention_1/out/', 'attn.proj.'),
    ('MultiHeadDotProductAttention_1/', 'attn.'),
    ('MlpBlock_3/Dense_0/', 'ffn.layers.0.0.'),
    ('MlpBlock_3/Dense_1/', 'ffn.layers.1.'),
    ('Transformer/encoder_norm/', 'ln1.'),
    ('Transformer/posembed_input/pos_embedding', 'pos_embed'),
    ('embedding/', 'patch_embed.projection.'),
    ('/', '.'),
    ('kernel', 'weight'),
    ('scale', 'weight'),
)


def _npz_layout(name: str, tensor: Tensor) -> Tensor:
    if name == 'cls' or not name.endswith('kernel'):
        # the heads' biases are (heads, head width)
        return tensor.flatten() if name.endswith('bias') else tensor
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    # out is (heads, head width, width), the others are (width, heads, head width)
    matrix = tensor.flatten(0, 1) if '/out/' in name else tensor.flatten(1)
    return matrix.T.contiguous()


def convert_pvt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official PVT and PVTv2, by mmdet's own conversion."""
    from mmdet.models.backbones.pvt import pvt_convert  # here: the other formats do not need mmdet

    return dict(pvt_convert(tensors))


def convert_convnext(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official ConvNeXt and ConvNeXt V2 for mmpretrain's."""
    renames = ((r'\.dwconv\.', '.depthwise_conv.'), (r'\.pwconv(\d)\.', r'.pointwise_conv\1.'), (r'^norm\.', 'norm3.'))
    converted = _rename(tensors, renames, r'head\.|decoder|mask_token$|proj\.|pred\.')
    return {name: t.flatten() if '.grn.' in name else t for name, t in converted.items()}


def convert_convnext_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's ConvNeXt for mmpretrain's."""
    renames = (
        (r'^stem\.', 'downsample_layers.0.'),
        (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
        (r'^stages\.(\d+)\.blocks\.', r'stages.\1.'),
        (r'\.conv_dw\.', '.depthwise_conv.'),
        (r'\.mlp\.fc(\d)\.', r'.pointwise_conv\1.'),
        (r'\.mlp\.grn\.weight', '.grn.gamma'),
        (r'\.mlp\.grn\.bias', '.grn.beta'),
        (r'^(head\.norm|norm_pre)\.', 'norm3.'),
    )
    return _rename(tensors, renames, r'head\.(?!norm)')
