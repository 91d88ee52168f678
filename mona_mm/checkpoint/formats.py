"""Checkpoints of other code: which it is, seen from the names, and its names and layouts as the OpenMMLab hosts' ones.

================  ====================================================================================================
``'swin'``        Microsoft's Swin and SwinV2, timm's, and the published Mona code: ``layers.I.blocks.J.attn.qkv``
``'vit'``         timm's ViT, MAE, MoCo v3 and others of the same names: ``blocks.I.attn.qkv``
``'vit-npz'``     Google's ViT, ``.npz``: ``Transformer/encoderblock_I/...``
``'pvt'``         the official PVT and PVTv2: ``block1.0.attn.q``
``'convnext'``    the official ConvNeXt and ConvNeXt V2: ``stages.I.J.dwconv``
``'convnext-timm'``  timm's: ``stages.I.blocks.J.conv_dw``
``'colin'``       the authors' LoRand and Adapter in mmdet's Swin, of the CoLin release: ``stages.I.blocks.J.lorand1``
``'mm'``          mmdet's, mmseg's, mmpretrain's, and mona_mm's own: nothing to do
================  ====================================================================================================

Of a checkpoint of a known format every name is one that the OpenMMLab backbone or a method has, once it is converted,
or is in :data:`NOT_IN_A_BACKBONE`; anything else is refused by name.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mona_mm.errors import CheckpointMismatchError

_FORMATS = (
    ('colin', r'stages\.\d+\.blocks\.\d+\.(lorand|adapter|colin)\d\.'),
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


NOT_IN_A_BACKBONE = {
    'swin': r'head\.|norm\.|.*\.attn_mask$',
    'colin': r'.*\.attn_mask$',
    'vit': r'head|pre_logits\.|decoder|mask_token$',
    'vit-npz': r'(head|pre_logits)/|opt',
    'pvt': r'head|norm\.|cls_token',
    'convnext': r'head\.|decoder|mask_token$|proj\.|pred\.',
    'convnext-timm': r'head\.(?!norm)',
}
"""By format, the names that are left out: of classifiers, of decoders and their mask tokens (MAE), of optimizers in
``.npz`` files, and masks that every library computes. The classification norm of a Swin is among them, because the
backbones of the OpenMMLab libraries have norms of their own at their outputs."""


def left_out(form: str | None, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's names that are in :data:`NOT_IN_A_BACKBONE`."""
    pattern = NOT_IN_A_BACKBONE.get(form)
    return [name for name in names if pattern and re.match(pattern, name)]


_END = r'(weight|bias)'
_LINEARS = rf'(qkv|proj)\.{_END}'
# The tensors of every supported backbone by their OpenMMLab names.
_SWIN = (
    rf'patch_embed\.(projection|norm)\.{_END}|absolute_pos_embed|norm\d\.{_END}'
    rf'|stages\.\d+\.downsample\.(norm|reduction)\.{_END}'
    rf'|stages\.\d+\.blocks\.\d+\.(norm[123]\.{_END}|ffn\.layers\.(0\.0|1)\.{_END}|attn\.w_msa\.({_LINEARS}|q_bias'
    rf'|v_bias|logit_scale|cpb_mlp\.\d\.{_END}|relative_position_bias_table|relative_position_index'
    r'|relative_coords_table))|.*\.attn_mask'
)
_VIT = (
    rf'cls_token|pos_embed|(pre_norm|ln[12])\.{_END}|patch_embed\.(projection|norm)\.{_END}'
    rf'|layers\.\d+\.(ln[12]\.{_END}|ffn\.layers\.(0\.0|1)\.{_END}|attn\.{_LINEARS}|attn\.gamma1\.weight|ffn\.gamma2\.weight)'
)
_PVT = (
    rf'layers\.\d+\.(0\.(projection|norm)\.{_END}|2\.{_END}|1\.0\.pos_embed|1\.\d+\.(norm[12]\.{_END}'
    rf'|attn\.(sr|norm)\.{_END}|attn\.attn\.(in_proj_{_END}|out_proj\.{_END})|ffn\.layers\.\d\.{_END}))'
)
_CONVNEXT = (
    rf'downsample_layers\.\d+\.\d+\.{_END}|norm\d\.{_END}|stages\.\d+\.\d+\.(gamma|grn\.(gamma|beta)'
    rf'|(depthwise_conv|norm|pointwise_conv[12])\.{_END})'
)
PUBLISHED_MODULE = (
    r'.*\.peft\.('
    rf'post_(attn|ffn)\.(entrance\.(norm\.{_END}|gammax?)|(down|up|pointwise|depthwise\.\d)\.{_END})'
    rf'|((attn|ffn)_branch|parallel_ffn)\.(down|up)\.{_END}'
    r'|(attn|ffn)_out\.(down|up)\.(a|g|b|bias)'
    r'|[qv]\.(down|up)\.weight)'
)
"""A tensor of a module that was published for a Swin: of Mona, of Adapter or AdaptFormer, of LoRand, of LoRA."""

_KNOWN = {
    'swin': f'{_SWIN}|{PUBLISHED_MODULE}',
    'colin': f'{_SWIN}|{PUBLISHED_MODULE}',
    'vit': _VIT,
    'vit-npz': _VIT,
    'pvt': _PVT,
    'convnext': _CONVNEXT,
    'convnext-timm': _CONVNEXT,
    'mm': rf'{_SWIN}|{_VIT}|{_PVT}|{_CONVNEXT}|(.*\.)?peft\..*',
}


def check_names(form: str | None, converted: Iterable[str]) -> None:
    """Check that each of a backbone's names, as converted from ``form``, is one that a supported host or a method has.

    Raises:
        CheckpointMismatchError: if one is not; it names the first.
    """
    unknown = [name for name in converted if form in _KNOWN and not re.fullmatch(_KNOWN[form], name)]
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise CheckpointMismatchError(
            f'The names are those of the format {form!r}, but for {", ".join(unknown[:3])}{more} (as they are after '
            'converting), which no backbone or method of that format has: what they are would be lost. Was the file '
            'made by code with modules of its own? Take them out of it first, if they are not needed.'
        )


def put(converted: dict[str, Tensor], name: str, tensor: Tensor, source: str) -> None:
    """Put a tensor in under its new name.

    Raises:
        CheckpointMismatchError: if another one has that name already.
    """
    if name in converted:
        raise CheckpointMismatchError(f'{source} and another tensor of the checkpoint would both become {name}.')
    converted[name] = tensor


def _rename(tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]], form: str) -> dict[str, Tensor]:
    renames, renamed = tuple(renames), {}
    dropped = set(left_out(form, tensors))
    for source, tensor in tensors.items():
        if source in dropped:
            continue
        name = source
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        put(renamed, name, tensor, source)
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
        (r'\.ls1\.gamma$', '.attn.gamma1.weight'),
        (r'\.ls2\.gamma$', '.ffn.gamma2.weight'),
        (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    )
    return _rename(tensors, renames, 'vit')


def convert_vit_npz(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Google's ViT: kernels are ``(in, out)``, of attention ``(width, heads, head width)``, of images HWIO."""
    converted, dropped = {}, set(left_out('vit-npz', tensors))
    for source, tensor in tensors.items():
        if source in dropped:
            continue
        name, tensor = source, _npz_layout(source, tensor)
        name = re.sub(r'^Transformer/encoderblock_(\d+)/', r'layers.\1.', name)
        for old, new in _NPZ_NAMES:
            name = name.replace(old, new)
        put(converted, 'cls_token' if name == 'cls' else name, tensor, source)
    for name in [name for name in converted if '.attn.query.' in name]:
        parts = [name.replace('query', part) for part in ('query', 'key', 'value')]
        if all(part in converted for part in parts):  # else the names that are there will not be known
            converted[name.replace('query', 'qkv')] = torch.cat([converted.pop(part) for part in parts])
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

    try:
        return dict(pvt_convert(tensors))
    except (LookupError, ValueError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f'The names are those of PVT, but not all of them: {type(error).__name__} {error}.'
        ) from error


def convert_convnext(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official ConvNeXt and ConvNeXt V2 for mmpretrain's."""
    renames = ((r'\.dwconv\.', '.depthwise_conv.'), (r'\.pwconv(\d)\.', r'.pointwise_conv\1.'), (r'^norm\.', 'norm3.'))
    converted = _rename(tensors, renames, 'convnext')
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
    return _rename(tensors, renames, 'convnext-timm')
