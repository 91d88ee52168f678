"""Convert the names and layouts of published checkpoints to those of the OpenMMLab backbones.

====================  ================================================================================================
``'swin'``            Microsoft's Swin and SwinV2, timm's, and the published code of Mona and ParaX:
                      ``layers.I.blocks.J.attn.qkv``
``'vit'``             timm's ViT and DINOv2, Meta's DINOv2, MAE, MoCo v3 and others of the same names:
                      ``blocks.I.attn.qkv``
``'vit-huggingface'`` Hugging Face's DINOv2: ``encoder.layer.I.attention.attention.query``
``'vit-npz'``         Google's ViT, ``.npz``: ``Transformer/encoderblock_I/...``
``'pvt'``             the official PVT and PVTv2: ``block1.0.attn.q``
``'convnext'``        the official ConvNeXt and ConvNeXt V2, and the published ParaX: ``stages.I.J.dwconv``
``'convnext-timm'``   timm's ConvNeXt and ConvNeXt V2: ``stages.I.blocks.J.conv_dw``
``'colin'``           the authors' CoLin, LoRand and Adapter in mmdet's Swin, of the CoLin release:
                      ``stages.I.blocks.J.colin1``
``'mm'``              mmdet's, mmseg's, mmpretrain's and mona_mm's own, which need no conversion
====================  ================================================================================================

Each format is defined beside its host in :mod:`mona_mm.hosts`, except for ``'colin'``, which is in
:mod:`mona_mm.checkpoint.published`. In a checkpoint of a known format every converted name must be one of the OpenMMLab
backbone or of a method, or one that no backbone uses (of a classifier or a decoder); any other name is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from mona_mm.checkpoint.parax import FORMATS as PARAX_FORMATS
from mona_mm.checkpoint.parax import NAMES as PARAX_NAMES
from mona_mm.checkpoint.parax import convert_parax
from mona_mm.checkpoint.published import (
    COLIN,
    COLIN_NAMES,
    MODULE_NAMES,
    convert_colin_back,
    convert_modules,
    convert_modules_back,
)
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.hosts import HOSTS
from mona_mm.hosts.formats import CheckpointFormat
from mona_mm.hosts.swin import MICROSOFT, convert_to_microsoft
from mona_mm.hosts.swin import OWN_NAMES as SWIN_NAMES

_MOCO = 'base_encoder.'


def _formats() -> list[CheckpointFormat]:
    return list(dict.fromkeys((COLIN, *(form for host in HOSTS.values() for form in host.formats))))


def recognise(names: Iterable[str]) -> str | None:
    """The name of the format of a backbone's checkpoint; None if it is not a known format."""
    names = list(names)
    for form in _formats():
        if any(re.match(form.recognised_by, name) for name in names):
            return form.name
    in_blocks = '|'.join(host.own_names.in_blocks for host in HOSTS.values() if host.own_names)
    return 'mm' if any(re.match(rf'{in_blocks}|.*\.peft\.', name) for name in names) else None


def _format(name: str | None) -> CheckpointFormat | None:
    return next((form for form in _formats() if form.name == name), None)


def left_out(form: str | None, names: Iterable[str]) -> list[str]:
    """The names in a checkpoint that are left out on conversion, since no backbone uses them."""
    known = _format(form)
    return [name for name in names if known is not None and known.is_left_out(name)]


def check_names(form: str | None, converted: Iterable[str]) -> None:
    """Check that each name of a backbone, converted from ``form``, is one of a supported host or a method.

    Raises:
        CheckpointMismatchError: if one is not; it lists the first such names.
    """
    hosts = [host for host in HOSTS.values() if host.own_names]
    if form == 'mm':
        patterns = [host.own_names.pattern for host in hosts] + [r'(.*\.)?peft\..*']
    elif form == COLIN.name:
        patterns = [SWIN_NAMES.pattern, COLIN_NAMES]
    else:
        patterns = [host.own_names.pattern for host in hosts if form in [known.name for known in host.formats]]
        patterns += [MODULE_NAMES] if form == MICROSOFT.name else []
        patterns += [PARAX_NAMES] if form in PARAX_FORMATS else []
    known = re.compile('|'.join(dict.fromkeys(patterns)))
    unknown = [name for name in converted if patterns and not known.fullmatch(name)]
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise CheckpointMismatchError(
            f'The checkpoint has the format {form!r}, but no backbone or method of that format has '
            f'{", ".join(unknown[:3])}{more} (names after conversion), which would be lost. If the file comes from '
            'code with modules of its own and they are not needed, remove them from it first.'
        )


def convert_state_dict(state_dict: Mapping[str, Tensor], prefix: str = '', known: bool = True) -> dict[str, Tensor]:
    """Rename and re-order a backbone's checkpoint of a known format for the mmdet, mmseg and mmpretrain backbones.

    The format is recognised from the names. Supported formats include Microsoft's Swin and the published Mona code
    (with the modules of Mona, Adapter, AdaptFormer, LoRand or LoRA), the CoLin release (with those of CoLin, LoRand or
    Adapter), and ParaX of its published code in a Swin or ConvNeXt. A checkpoint of an unknown format is returned with
    its names unchanged. A checkpoint may be the whole file (``{'model': ...}``, ``{'state_dict': ...}``) or only the
    tensors, of a backbone or of a detector (of which only ``backbone.*`` is returned). Tensors that no backbone uses
    are left out, and so are those of MoCo v3 outside of its base encoder.

    Args:
        state_dict: the tensors by the checkpoint's own names.
        prefix: the prefix of the names to convert, which is removed; by default ``backbone.`` if names have it.
        known: refuse names that no supported backbone or method has; otherwise they are returned as well.

    Returns:
        A new dict with the names of the OpenMMLab backbone. Tensors are copied only if they are re-ordered.

    Raises:
        CheckpointMismatchError: if two tensors would get the same name, or a name is unknown.
    """
    tensors = backbone_tensors(state_dict, prefix)
    name = recognise(tensors)
    form = _format(name)
    if form is None:
        converted = tensors
    else:
        kept = {key: tensor for key, tensor in tensors.items() if not form.is_left_out(key)}
        kept = convert_modules(kept) if form is MICROSOFT else kept
        converted = form.convert(convert_parax(kept) if name in PARAX_FORMATS else kept)
    if known:
        check_names(name, converted)
    return converted


def convert_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the backbone in a whole model's checkpoint by :func:`convert_state_dict`; other names stay."""
    tensors = unwrap_checkpoint(state_dict)
    others = {name: t for name, t in tensors.items() if not name.startswith('backbone.')}
    if len(others) == len(tensors):
        return convert_state_dict(state_dict)
    return {**{f'backbone.{name}': t for name, t in convert_state_dict(tensors).items()}, **others}


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a Swin to the names and layouts of the published Mona code, the inverse of :func:`convert_model`.

    Args:
        state_dict: the tensors of a Swin, or of a model with one at ``backbone.``, with or without a method of the
            published code.

    Raises:
        ConfigError: if there is no such Swin, or its method was never published for a Swin.
    """
    return _convert_swin_in(state_dict, lambda tensors: convert_to_microsoft(convert_modules_back(tensors)))


def to_colin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert CoLin, LoRand or Adapter in an mmdet Swin, or in a model with one at ``backbone.``, to the CoLin names.

    Raises:
        ConfigError: if there is no such Swin, or it has a module that is not in that release.
    """
    return _convert_swin_in(state_dict, convert_colin_back)


def _convert_swin_in(state_dict: Mapping[str, Tensor], convert: Callable) -> dict[str, Tensor]:
    tensors = unwrap_checkpoint(state_dict)
    start = 'backbone.' if any(name.startswith('backbone.') for name in tensors) else ''
    swin = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if not any(re.match(r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.', name) for name in swin):
        raise ConfigError(
            'Only a Swin with the names of mmdet, mmseg or mmpretrain can be converted to published names.'
        )
    check_names('mm', swin)
    others = {name: t for name, t in tensors.items() if not name.startswith(start)}
    return {**others, **{f'{start}{name}': tensor for name, tensor in convert(swin).items()}}


def backbone_tensors(checkpoint: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """The tensors of the backbone in a checkpoint file: those under ``prefix`` in a whole model, or else all."""
    tensors = unwrap_checkpoint(checkpoint)
    start = f'{(prefix or "backbone").rstrip(".")}.'
    inner = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return inner if inner or prefix else tensors


def unwrap_checkpoint(checkpoint: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappers: of DINO's training those of the teacher, and of MoCo v3 only
    those of its base encoder."""
    for wrapper in ('state_dict', 'model', 'teacher'):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    tensors = {name.removeprefix('module.'): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    encoder = {name.removeprefix(_MOCO): t for name, t in tensors.items() if name.startswith(_MOCO)}
    return encoder or tensors
