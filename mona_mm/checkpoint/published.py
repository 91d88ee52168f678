"""Convert the names of the modules of the published Mona and CoLin repositories in a Swin to those of this package.

The published Mona code has its modules in a Swin with Microsoft's names; the CoLin release has LoRand and Adapter in
mmdet's Swin. All other names of such a checkpoint belong to the host, see :mod:`mona_mm.hosts.swin`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.hosts.formats import END, CheckpointFormat, put, rename

MODULE_NAMES = (
    r'.*\.peft\.('
    rf'post_(attn|ffn)\.(entrance\.(norm\.{END}|gammax?)|(down|up|pointwise|depthwise\.\d)\.{END})'
    rf'|((attn|ffn)_branch|parallel_ffn)\.(down|up)\.{END}'
    r'|(attn|ffn)_out\.(down|up)\.(a|g|b|bias)'
    r'|[qv]\.(down|up)\.weight)'
)
"""A regular expression for the names, in this package, of the tensors of the modules that were published for a Swin:
Mona, Adapter, AdaptFormer, LoRand and LoRA."""

_RENAMES = (
    (r'(\.peft\.\w+)\.(norm\.|gamma)', r'\1.entrance.\2'),
    (r'\.project1\.', '.down.'),
    (r'\.project2\.', '.up.'),
    (r'\.adapter_conv\.conv1\.', '.depthwise.0.'),
    (r'\.adapter_conv\.conv2\.', '.depthwise.1.'),
    (r'\.adapter_conv\.conv3\.', '.depthwise.2.'),
    (r'\.adapter_conv\.projector\.', '.pointwise.'),
)
_RENAMES_BACK = (
    (r'\.peft\.(post_attn|attn_branch|attn_out|parallel_ffn)\.', '.my_module_1.'),
    (r'\.peft\.(post_ffn|ffn_branch|ffn_out)\.', '.my_module_2.'),
    (r'(\.my_module_\d)\.entrance\.', r'\1.'),
    (r'(\.my_module_\d)\.down\.', r'\1.project1.'),
    (r'(\.my_module_\d)\.up\.', r'\1.project2.'),
    (r'(\.my_module_\d)\.depthwise\.0\.', r'\1.adapter_conv.conv1.'),
    (r'(\.my_module_\d)\.depthwise\.1\.', r'\1.adapter_conv.conv2.'),
    (r'(\.my_module_\d)\.depthwise\.2\.', r'\1.adapter_conv.conv3.'),
    (r'(\.my_module_\d)\.pointwise\.', r'\1.adapter_conv.projector.'),
)
# In the CoLin release, at the ends of the attention and FFN branches: LoRand after DropPath, Adapter before it.
_COLIN_SITES = (
    (r'\.lorand1\.', '.peft.attn_out.'),
    (r'\.lorand2\.', '.peft.ffn_out.'),
    (r'\.adapter1\.', '.peft.attn_branch.'),
    (r'\.adapter2\.', '.peft.ffn_branch.'),
)
_COLIN_SITES_BACK = (
    (r'\.peft\.attn_out\.', '.lorand1.'),
    (r'\.peft\.ffn_out\.', '.lorand2.'),
    (r'\.peft\.attn_branch\.', '.adapter1.'),
    (r'\.peft\.ffn_branch\.', '.adapter2.'),
    (r'(\.(?:lorand|adapter)\d)\.down\.', r'\1.project1.'),
    (r'(\.(?:lorand|adapter)\d)\.up\.', r'\1.project2.'),
)


def convert_modules(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the modules of the published Mona code to the names of this package; other names stay."""
    converted: dict[str, Tensor] = {}
    renames = (*_site_renames(tensors), *_RENAMES)
    for source, tensor in tensors.items():
        name = source
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        for part_name, part in _split_lora(name, tensor).items():
            put(converted, part_name, part, source)
    return _stack_factors(converted)


def convert_modules_back(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_modules`.

    Raises:
        ConfigError: if a module was never published for a Swin.
    """
    _check_modules(tensors)
    return rename(_join_lora(_unstack_factors(dict(tensors))), _RENAMES_BACK)


def convert_colin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the modules of the CoLin release to the names of this package; all others have mmdet's names already."""
    return _stack_factors(rename(tensors, (*_COLIN_SITES, *_RENAMES)))


def convert_colin_back(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_colin`.

    Raises:
        ConfigError: if the release has no such module.
    """
    _check_modules(tensors)
    renamed = rename(_unstack_factors(dict(tensors)), _COLIN_SITES_BACK)
    left = next((name for name in renamed if '.peft.' in name), None)
    if left is not None:
        raise ConfigError(f'{left}: the CoLin release has no such module; it has only LoRand and Adapter.')
    return renamed


COLIN = CheckpointFormat(
    name='colin',
    recognised_by=r'stages\.\d+\.blocks\.\d+\.(lorand|adapter|colin)\d\.',
    convert=convert_colin,
    left_out=r'.*\.attn_mask$',
)
"""The checkpoints of the CoLin release, which has the authors' LoRand and Adapter in mmdet's Swin."""


def _check_modules(tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if '.peft.' in name and not re.fullmatch(MODULE_NAMES, name):
            raise ConfigError(f'{name}: the published code has no such module.')


def _site_renames(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """The renames of ``my_module_1`` and ``my_module_2`` to sites, which depend on the method that the names show."""
    if any('.adapter_conv.' in name for name in tensors):
        sites = ('post_attn', 'post_ffn')  # Mona
    elif any('.param_dict.' in name for name in tensors):
        sites = ('attn_out', 'ffn_out')  # LoRand
    elif any('.my_module_2.' in name for name in tensors):
        sites = ('attn_branch', 'ffn_branch')  # Adapter
    else:
        sites = ('parallel_ffn',)  # AdaptFormer
    return tuple((rf'\.my_module_{i}\.', f'.peft.{site}.') for i, site in enumerate(sites, start=1))


def _split_lora(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a tensor of the published LoRA, which holds the factors of q and v one after another."""
    match = re.match(r'(.*\.)attn\.qkv\.lora_([AB])$', name)
    if match is None:
        return {name: tensor}
    block, part = match[1], 'down' if match[2] == 'A' else 'up'
    q, v = tensor.chunk(2)
    return {f'{block}peft.q.{part}.weight': q, f'{block}peft.v.{part}.weight': v}


def _join_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_split_lora`."""
    joined = {}
    for name, tensor in tensors.items():
        match = re.match(r'(.*\.)peft\.([qv])\.(down|up)\.weight$', name)
        if match is None:
            joined[name] = tensor
        elif match[2] == 'q':
            other = tensors.get(f'{match[1]}peft.v.{match[3]}.weight')
            if other is None:
                raise ConfigError(f'{name}: the published LoRA is at q and v, and this model has none at v.')
            joined[f'{match[1]}attn.qkv.lora_{"A" if match[3] == "down" else "B"}'] = torch.cat((tensor, other))
    return joined


def _stack_factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the factors of the published LoRand (``param_dict.A0``, ``g0``, ``B0``, ...) to one tensor for each of A, G
    and B."""
    pattern = re.compile(r'(.*\.)?param_dict\.([AgGB])(\d+)$')
    stacks: dict[str, dict[int, Tensor]] = {}
    for name in [name for name in tensors if pattern.match(name)]:
        path, letter, index = pattern.match(name).groups()
        stacks.setdefault(f'{path or ""}{letter.lower()}', {})[int(index)] = tensors.pop(name)
    for name, factors in stacks.items():
        if sorted(factors) != list(range(len(factors))) or len({factor.shape for factor in factors.values()}) > 1:
            raise CheckpointMismatchError(
                f'{name}: the factors are numbered {sorted(factors)} and not from 0 without gaps, or their shapes '
                'differ.'
            )
        tensors[name] = torch.stack([factors[i] for i in sorted(factors)])
    return tensors


def _unstack_factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_stack_factors`."""
    unstacked = {}
    for name, tensor in tensors.items():
        match = re.match(r'(.*\.peft\.(?:attn|ffn)_out\.(?:.*\.)?)([agb])$', name)
        if match is None:
            unstacked[name] = tensor
        else:
            letter = match[2] if match[2] == 'g' else match[2].upper()
            unstacked.update({f'{match[1]}param_dict.{letter}{i}': factor for i, factor in enumerate(tensor)})
    return unstacked
