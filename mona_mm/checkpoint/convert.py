"""Names and layouts of published checkpoints, turned into those of the OpenMMLab backbones."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mona_mm.checkpoint.formats import (
    PUBLISHED_MODULE,
    check_names,
    convert_convnext,
    convert_convnext_timm,
    convert_pvt,
    convert_vit,
    convert_vit_npz,
    left_out,
    put,
    recognise,
)
from mona_mm.errors import CheckpointMismatchError, ConfigError

# Microsoft's Swin and the published Mona code share these names; in order, on the part after `layers.I.`.
_SWIN_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'(\.blocks\.\d+)\.attn\.', r'\1.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
_MODULE_RENAMES = (
    (r'(\.peft\.\w+)\.(norm\.|gamma)', r'\1.entrance.\2'),
    (r'\.project1\.', '.down.'),
    (r'\.project2\.', '.up.'),
    (r'\.adapter_conv\.conv1\.', '.depthwise.0.'),
    (r'\.adapter_conv\.conv2\.', '.depthwise.1.'),
    (r'\.adapter_conv\.conv3\.', '.depthwise.2.'),
    (r'\.adapter_conv\.projector\.', '.pointwise.'),
)
_MOCO = 'base_encoder.'
# The CoLin release's, on the part after `blocks.J.`: behind attention and FFN, DropPath included.
_COLIN_SITES = ((r'\.lorand1\.', '.peft.attn_out.'), (r'\.lorand2\.', '.peft.ffn_out.'), *(
    (rf'\.adapter{i}\.', f'.peft.{branch}_branch.') for i, branch in ((1, 'attn'), (2, 'ffn'))
))  # fmt: skip


def convert_state_dict(state_dict: Mapping[str, Tensor], prefix: str = '', known: bool = True) -> dict[str, Tensor]:
    """Rename and re-order a backbone's checkpoint of a known format for the mmdet, mmseg and mmpretrain backbones.

    The format is recognised from the names, see :mod:`mona_mm.checkpoint.formats`; among them are Microsoft's Swin and
    the published Mona code (with the modules of Mona, Adapter, AdaptFormer, LoRand or LoRA), and LoRand and Adapter of
    the CoLin release. A checkpoint of no known format is returned with its names unchanged. A checkpoint may be the
    whole file (``{'model': ...}``, ``{'state_dict': ...}``) or the tensors alone, of a backbone or of a detector
    (``backbone.*``, of which only the backbone is returned). What is left out:
    :data:`mona_mm.checkpoint.formats.NOT_IN_A_BACKBONE`, and of MoCo v3 all but the encoder that is kept.

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
    form = recognise(tensors)
    convert = _CONVERTERS.get(form)
    converted = convert(tensors) if convert else tensors
    if known:
        check_names(form, converted)
    return converted


def convert_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`convert_state_dict` of the backbone in a whole model's checkpoint; the rest of it keeps its names."""
    tensors = unwrap_checkpoint(state_dict)
    rest = {name: t for name, t in tensors.items() if not name.startswith('backbone.')}
    if len(rest) == len(tensors):
        return convert_state_dict(state_dict)
    return {**{f'backbone.{name}': t for name, t in convert_state_dict(tensors).items()}, **rest}


def _convert_swin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renames = (*_SWIN_RENAMES, *_sites(tensors), *_MODULE_RENAMES)
    second_version = any(name.endswith('.attn.logit_scale') for name in tensors)
    shift = _downsample_shift(tensors, second_version)
    converted, dropped = {}, set(left_out('swin', tensors))
    for source, tensor in tensors.items():
        name = source
        if source in dropped:
            continue
        if '.downsample.' in name:
            if not (second_version and '.norm.' in name):  # which there comes after the reduction
                tensor = _reorder_neighbours(tensor)
            name = re.sub(r'^layers\.(\d+)', lambda match: f'layers.{int(match[1]) + shift}', name)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        for part_name, part in _lora_slices(name, tensor).items():
            put(converted, part_name, part, source)
    return _stack_factors(converted)


def _convert_colin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's names already, but for the modules."""
    converted, dropped = {}, set(left_out('colin', tensors))
    for source, tensor in tensors.items():
        name = source
        if source in dropped:
            continue
        for pattern, replacement in (*_COLIN_SITES, *_MODULE_RENAMES):
            name = re.sub(pattern, replacement, name)
        put(converted, name, tensor, source)
    return _stack_factors(converted)


def _downsample_shift(tensors: Mapping[str, Tensor], second_version: bool) -> int:
    """By how many stages the merging of patches is elsewhere in the OpenMMLab backbone than in the file: it is the end
    of a stage with Microsoft and in Swin, the beginning of the next one in the newer timm and in mmpretrain's SwinV2.
    """
    stages = {int(match[1]) for name in tensors if (match := re.match(r'layers\.(\d+)\.downsample\.', name))}
    at_the_beginning = bool(stages) and 0 not in stages
    return second_version - at_the_beginning


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_model` for Swin: the names and layouts of the published Mona code.

    Args:
        state_dict: of a Swin or of a model with one at ``backbone.``, with or without a method of the published code.

    Raises:
        ConfigError: if it is not one, or its method was never published for a Swin.
    """
    tensors = unwrap_checkpoint(state_dict)
    start = 'backbone.' if any(name.startswith('backbone.') for name in tensors) else ''
    inner = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if not any(re.match(r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.', name) for name in inner):
        raise ConfigError('Only a Swin in the names of mmdet, mmseg or mmpretrain has published names to go back to.')
    _check_published(inner)
    published = {name: t for name, t in tensors.items() if not name.startswith(start)}
    for name, tensor in _unslice_lora(_unstack_factors(inner)).items():
        if '.downsample.' in name:
            tensor = _restore_neighbours(tensor)
        for pattern, replacement in _TO_PUBLISHED:
            name = re.sub(pattern, replacement, name)
        published[f'{start}{name}'] = tensor
    return published


def to_colin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the CoLin release's LoRand and Adapter for an mmdet Swin, or a model with one at ``backbone.``.

    Raises:
        ConfigError: if it is not one, or has a module that is not in that release.
    """
    tensors = unwrap_checkpoint(state_dict)
    start = 'backbone.' if any(name.startswith('backbone.') for name in tensors) else ''
    inner = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if recognise(inner) != 'mm' or not any('.attn.w_msa.' in name for name in inner):
        raise ConfigError('The CoLin release is of a Swin in the names of mmdet; this is none.')
    _check_published(inner)
    written = {name: t for name, t in tensors.items() if not name.startswith(start)}
    for name, tensor in _unstack_factors(inner).items():
        for pattern, replacement in _TO_COLIN:
            name = re.sub(pattern, replacement, name)
        if '.peft.' in name:
            raise ConfigError(f'{name}: the CoLin release has no such module, but LoRand and Adapter.')
        written[f'{start}{name}'] = tensor
    return written


def _check_published(tensors: Mapping[str, Tensor]) -> None:
    check_names('mm', tensors)
    for name in tensors:
        if '.peft.' in name and not re.fullmatch(PUBLISHED_MODULE, name):
            raise ConfigError(f'{name}: the published code has no such module.')


_TO_COLIN = (
    (r'\.peft\.attn_out\.', '.lorand1.'),
    (r'\.peft\.ffn_out\.', '.lorand2.'),
    (r'\.peft\.attn_branch\.', '.adapter1.'),
    (r'\.peft\.ffn_branch\.', '.adapter2.'),
    (r'(\.(?:lorand|adapter)\d)\.down\.', r'\1.project1.'),
    (r'(\.(?:lorand|adapter)\d)\.up\.', r'\1.project2.'),
)


_TO_PUBLISHED = (
    (r'\.peft\.(post_attn|attn_branch|attn_out|parallel_ffn)\.', '.my_module_1.'),
    (r'\.peft\.(post_ffn|ffn_branch|ffn_out)\.', '.my_module_2.'),
    (r'(\.my_module_\d)\.entrance\.', r'\1.'),
    (r'(\.my_module_\d)\.down\.', r'\1.project1.'),
    (r'(\.my_module_\d)\.up\.', r'\1.project2.'),
    (r'(\.my_module_\d)\.depthwise\.(\d)\.', lambda match: f'{match[1]}.adapter_conv.conv{int(match[2]) + 1}.'),
    (r'(\.my_module_\d)\.pointwise\.', r'\1.adapter_conv.projector.'),
    (r'\.attn\.w_msa\.', '.attn.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^stages\.', 'layers.'),
)


def _sites(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Which sites ``my_module_1`` and ``my_module_2`` stand for: it depends on the method, seen from its other keys."""
    if any('.adapter_conv.' in name for name in tensors):
        sites = ('post_attn', 'post_ffn')  # Mona
    elif any('.param_dict.' in name for name in tensors):
        sites = ('attn_out', 'ffn_out')  # LoRand
    elif any('.my_module_2.' in name for name in tensors):
        sites = ('attn_branch', 'ffn_branch')  # Adapter
    else:
        sites = ('parallel_ffn',)  # AdaptFormer
    return tuple((rf'\.my_module_{i}\.', f'.peft.{site}.') for i, site in enumerate(sites, start=1))


def _lora_slices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Published LoRA keeps q's and v's factors in one tensor, q's rows first."""
    match = re.match(r'(.*\.)attn\.w_msa\.qkv\.lora_([AB])$', name)
    if match is None:
        return {name: tensor}
    block, part = match[1], 'down' if match[2] == 'A' else 'up'
    q, v = tensor.chunk(2)
    return {f'{block}peft.q.{part}.weight': q, f'{block}peft.v.{part}.weight': v}


def _stack_factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published LoRand numbers its factors (``param_dict.A0``, ``g0``, ``B0``, ...); ours are one tensor a kind."""
    pattern = re.compile(r'(.*\.)?param_dict\.([AgGB])(\d+)$')
    stacks: dict[str, dict[int, Tensor]] = {}
    for name in [name for name in tensors if pattern.match(name)]:
        path, kind, index = pattern.match(name).groups()
        stacks.setdefault(f'{path or ""}{kind.lower()}', {})[int(index)] = tensors.pop(name)
    for name, of in stacks.items():
        if sorted(of) != list(range(len(of))) or len({factor.shape for factor in of.values()}) > 1:
            raise CheckpointMismatchError(f'{name}: the factors are numbered {sorted(of)}, or are not of one shape.')
        tensors[name] = torch.stack([of[i] for i in sorted(of)])
    return tensors


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


def _restore_neighbours(tensor: Tensor) -> Tensor:
    """The inverse of :func:`_reorder_neighbours`."""
    neighbours = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def _unslice_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_lora_slices`."""
    joined = {}
    for name, tensor in tensors.items():
        match = re.match(r'(.*\.)peft\.([qv])\.(down|up)\.weight$', name)
        if match is None:
            joined[name] = tensor
        elif match[2] == 'q':
            other = tensors.get(f'{match[1]}peft.v.{match[3]}.weight')
            if other is None:
                raise ConfigError(f'{name}: the published LoRA is on q and on v.')
            joined[f'{match[1]}attn.w_msa.qkv.lora_{"A" if match[3] == "down" else "B"}'] = torch.cat((tensor, other))
    return joined


def _unstack_factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_stack_factors`."""
    unstacked = {}
    for name, tensor in tensors.items():
        match = re.match(r'(.*\.peft\.(?:attn|ffn)_out\.(?:.*\.)?)([agb])$', name)
        if match is None:
            unstacked[name] = tensor
        else:
            kind = match[2] if match[2] == 'g' else match[2].upper()
            unstacked.update({f'{match[1]}param_dict.{kind}{i}': factor for i, factor in enumerate(tensor)})
    return unstacked


def _reorder_neighbours(tensor: Tensor) -> Tensor:
    """From the published order of the four merged neighbours' channels to mmdet's.

    ``(..., 4C)`` holds the neighbours (0,0), (1,0), (0,1), (1,1) one after another; ``nn.Unfold`` in mmdet's
    PatchMerging yields them per channel, row by row: ``(..., C, 4)`` with (0,0), (0,1), (1,0), (1,1).
    """
    neighbours = tensor.unflatten(-1, (4, -1))  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()


_CONVERTERS = {
    'swin': _convert_swin,
    'colin': _convert_colin,
    'vit': convert_vit,
    'vit-npz': convert_vit_npz,
    'pvt': convert_pvt,
    'convnext': convert_convnext,
    'convnext-timm': convert_convnext_timm,
}
