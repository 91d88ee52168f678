"""Names and layouts of published checkpoints, turned into those of the OpenMMLab backbones.

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

What is known about each is beside the host, in :mod:`mona_mm.hosts`. Of a checkpoint of a known format every name is
one that the OpenMMLab backbone or a method has, once it is converted, or is one that no backbone has a use for (a
classifier's, a decoder's); anything else is refused by name.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from mona_mm.checkpoint.published import (
    COLIN,
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
    """The format of a backbone's checkpoint, one of those above; None if it is none of them."""
    names = list(names)
    for form in _formats():
        if any(re.match(form.recognised_by, name) for name in names):
            return form.name
    in_blocks = '|'.join(host.own_names.in_blocks for host in HOSTS.values() if host.own_names)
    return 'mm' if any(re.match(rf'{in_blocks}|.*\.peft\.', name) for name in names) else None


def _format(name: str | None) -> CheckpointFormat | None:
    return next((form for form in _formats() if form.name == name), None)


def left_out(form: str | None, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's names that no backbone has a use for, and that are left out on converting."""
    known = _format(form)
    return [name for name in names if known is not None and known.is_left_out(name)]


def check_names(form: str | None, converted: Iterable[str]) -> None:
    """Check that each of a backbone's names, as converted from ``form``, is one that a supported host or a method has.

    Raises:
        CheckpointMismatchError: if one is not; it names the first.
    """
    hosts = [host for host in HOSTS.values() if host.own_names]
    if form == 'mm':
        patterns = [host.own_names.pattern for host in hosts] + [r'(.*\.)?peft\..*']
    elif form == COLIN.name:
        patterns = [SWIN_NAMES.pattern, MODULE_NAMES]
    else:
        patterns = [host.own_names.pattern for host in hosts if form in [known.name for known in host.formats]]
        patterns += [MODULE_NAMES] if form == MICROSOFT.name else []
    known = re.compile('|'.join(dict.fromkeys(patterns)))
    unknown = [name for name in converted if patterns and not known.fullmatch(name)]
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise CheckpointMismatchError(
            f'The names are those of the format {form!r}, but for {", ".join(unknown[:3])}{more} (as they are after '
            'converting), which no backbone or method of that format has: what they are would be lost. Was the file '
            'made by code with modules of its own? Take them out of it first, if they are not needed.'
        )


def convert_state_dict(state_dict: Mapping[str, Tensor], prefix: str = '', known: bool = True) -> dict[str, Tensor]:
    """Rename and re-order a backbone's checkpoint of a known format for the mmdet, mmseg and mmpretrain backbones.

    The format is recognised from the names; among them are Microsoft's Swin and the published Mona code (with the
    modules of Mona, Adapter, AdaptFormer, LoRand or LoRA), and LoRand and Adapter of the CoLin release. A checkpoint of
    no known format is returned with its names unchanged. A checkpoint may be the whole file (``{'model': ...}``,
    ``{'state_dict': ...}``) or the tensors alone, of a backbone or of a detector (``backbone.*``, of which only the
    backbone is returned). What no backbone has a use for is left out, and of MoCo v3 all but the encoder that is kept.

    Args:
        state_dict: names to tensors, in the checkpoint's own names.
        prefix: of the names to take, and to take off; without one, ``backbone.`` is found by itself.
        known: refuse names that no supported backbone or method has; else they are returned, too.

    Returns:
        A new dict with the names of the OpenMMLab backbone; the tensors are not copied unless re-ordered.

    Raises:
        CheckpointMismatchError: if two tensors would get one name, or a name is not known.
    """
    tensors = backbone_tensors(state_dict, prefix)
    name = recognise(tensors)
    form = _format(name)
    if form is None:
        converted = tensors
    else:
        kept = {key: tensor for key, tensor in tensors.items() if not form.is_left_out(key)}
        converted = form.convert(convert_modules(kept) if form is MICROSOFT else kept)
    if known:
        check_names(name, converted)
    return converted


def convert_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`convert_state_dict` of the backbone in a whole model's checkpoint; the rest of it keeps its names."""
    tensors = unwrap_checkpoint(state_dict)
    rest = {name: t for name, t in tensors.items() if not name.startswith('backbone.')}
    if len(rest) == len(tensors):
        return convert_state_dict(state_dict)
    return {**{f'backbone.{name}': t for name, t in convert_state_dict(tensors).items()}, **rest}


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_model` for Swin: the names and layouts of the published Mona code.

    Args:
        state_dict: of a Swin or of a model with one at ``backbone.``, with or without a method of the published code.

    Raises:
        ConfigError: if it is not one, or its method was never published for a Swin.
    """
    return _convert_swin_in(state_dict, lambda tensors: convert_to_microsoft(convert_modules_back(tensors)))


def to_colin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the CoLin release's LoRand and Adapter for an mmdet Swin, or a model with one at ``backbone.``.

    Raises:
        ConfigError: if it is not one, or has a module that is not in that release.
    """
    return _convert_swin_in(state_dict, convert_colin_back)


def _convert_swin_in(state_dict: Mapping[str, Tensor], convert: Callable) -> dict[str, Tensor]:
    tensors = unwrap_checkpoint(state_dict)
    start = 'backbone.' if any(name.startswith('backbone.') for name in tensors) else ''
    swin = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if not any(re.match(r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.', name) for name in swin):
        raise ConfigError('Only a Swin in the names of mmdet, mmseg or mmpretrain has published names to go back to.')
    check_names('mm', swin)
    rest = {name: t for name, t in tensors.items() if not name.startswith(start)}
    return {**rest, **{f'{start}{name}': tensor for name, tensor in convert(swin).items()}}


def backbone_tensors(checkpoint: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappers, and of a whole model only those under ``prefix``."""
    tensors = unwrap_checkpoint(checkpoint)
    start = f'{(prefix or "backbone").rstrip(".")}.'
    inner = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return inner if inner or prefix else tensors


def unwrap_checkpoint(checkpoint: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappers; of MoCo v3's only those of the encoder that is kept."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    tensors = {name.removeprefix('module.'): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    encoder = {name.removeprefix(_MOCO): t for name, t in tensors.items() if name.startswith(_MOCO)}
    return encoder or tensors
