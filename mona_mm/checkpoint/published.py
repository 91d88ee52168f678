"""Convert the names of the modules of the published Mona and CoLin repositories in a Swin to those of this package.

The published Mona code has its modules in a Swin with Microsoft's names; the CoLin release has CoLin, LoRand and
Adapter in mmdet's Swin. All other names of such a checkpoint belong to the host, see :mod:`mona_mm.hosts.swin`.
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
"""A regular expression for the names, in this package, of the tensors of the modules in the published Mona code: Mona,
Adapter, AdaptFormer, LoRand and LoRA."""

COLIN_NAMES = (
    r'.*\.peft\.('
    r'post_(attn|ffn)\.((down|up)\.(a|b|bias)|depthwise\.(weight|bias|gate)|g)'
    r'|(attn|ffn)_out\.(down|up)\.(a|g|b|bias)'
    rf'|(attn|ffn)_branch\.(down|up)\.{END})'
)
"""A regular expression for those of the modules in the CoLin release: CoLin, LoRand and Adapter."""

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
# In the CoLin release, after the residual additions CoLin, at the ends of the attention and FFN branches the others:
# LoRand after DropPath, Adapter before it.
_COLIN_SITES = (
    (r'\.lorand1\.', '.peft.attn_out.'),
    (r'\.lorand2\.', '.peft.ffn_out.'),
    (r'\.adapter1\.', '.peft.attn_branch.'),
    (r'\.adapter2\.', '.peft.ffn_branch.'),
    (r'\.colin1\.', '.peft.post_attn.'),
    (r'\.colin2\.', '.peft.post_ffn.'),
    (r'(\.peft\.post_\w+)\.inner_op\.', r'\1.depthwise.'),
    (r'(\.peft\.post_\w+)\.inner_scale$', r'\1.depthwise.gate'),
    (r'(\.peft\.post_\w+\.project\d)\.param_dict\.A$', r'\1.a'),
    (r'(\.peft\.post_\w+\.project\d)\.param_dict\.B$', r'\1.b'),
)
_COLIN_SITES_BACK = (
    (r'\.peft\.attn_out\.', '.lorand1.'),
    (r'\.peft\.ffn_out\.', '.lorand2.'),
    (r'\.peft\.attn_branch\.', '.adapter1.'),
    (r'\.peft\.ffn_branch\.', '.adapter2.'),
    (r'\.peft\.post_attn\.', '.colin1.'),
    (r'\.peft\.post_ffn\.', '.colin2.'),
    (r'(\.(?:lorand|adapter|colin)\d)\.down\.', r'\1.project1.'),
    (r'(\.(?:lorand|adapter|colin)\d)\.up\.', r'\1.project2.'),
    (r'(\.colin\d\.project\d)\.a$', r'\1.param_dict.A'),
    (r'(\.colin\d\.project\d)\.b$', r'\1.param_dict.B'),
    (r'(\.colin\d)\.depthwise\.gate$', r'\1.inner_scale'),
    (r'(\.colin\d)\.depthwise\.', r'\1.inner_op.'),
)
# The release's second projection holds the first one, whose scales it uses, so a checkpoint has the first one twice.
_HELD_TWICE = re.compile(r'(.*\.colin\d\.)project2\.upProjection\.(.+)$')


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
    _check_modules(tensors, MODULE_NAMES, 'the published code has no such module')
    return rename(_join_lora(_unstack_factors(dict(tensors))), _RENAMES_BACK)


def convert_colin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the modules of the CoLin release to the names of this package; all others have mmdet's names already.

    Raises:
        CheckpointMismatchError: if the two copies of a projection that a checkpoint of CoLin holds differ.
    """
    once = {}
    for name, tensor in tensors.items():
        held = _HELD_TWICE.match(name)
        if held is None:
            once[name] = tensor
            continue
        other = f'{held[1]}project1.{held[2]}'
        if other not in tensors or not torch.equal(tensor, tensors[other]):
            raise CheckpointMismatchError(
                f'{name} differs from {other}, or that one is absent. They are one tensor in the CoLin release, so the '
                'file is damaged or was changed.'
            )
    converted = _stack_factors(rename(once, (*_COLIN_SITES, *_RENAMES)))
    return dict(_shaped_as_colin(name, tensor) for name, tensor in converted.items())


def _shaped_as_colin(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Give the gate and the scales of a CoLin, as stacked by :func:`_stack_factors`, their names and shapes here."""
    scales = re.match(r'(.*\.peft\.post_\w+)\.down\.g$', name)
    if scales:
        return f'{scales[1]}.g', tensor.flatten(1)
    return name, tensor.flatten() if re.search(r'\.peft\.post_\w+\.depthwise\.gate$', name) else tensor


def convert_colin_back(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_colin`.

    Raises:
        ConfigError: if the release has no such module.
    """
    _check_modules(tensors, COLIN_NAMES, 'the CoLin release has no such module; it has only CoLin, LoRand and Adapter')
    renamed = rename(_unstack_factors(dict(tensors)), _COLIN_SITES_BACK)
    released = {}
    for name, tensor in renamed.items():
        scales = re.match(r'(.*\.colin\d)\.g$', name)
        if scales:
            released |= {f'{scales[1]}.project1.param_dict.g{i}': g[:, None] for i, g in enumerate(tensor)}
        else:
            released[name] = tensor.view(1, -1, 1, 1) if name.endswith('.inner_scale') else tensor
    twice = {re.sub(r'(\.colin\d)\.project1\.', r'\1.project2.upProjection.', name): t for name, t in released.items()}
    return twice | released


COLIN = CheckpointFormat(
    name='colin',
    recognised_by=r'stages\.\d+\.blocks\.\d+\.(lorand|adapter|colin)\d\.',
    convert=convert_colin,
    left_out=r'.*\.attn_mask$',
)
"""The checkpoints of the CoLin release, which has the authors' CoLin, LoRand and Adapter in mmdet's Swin."""


def _check_modules(tensors: Mapping[str, Tensor], known: str, otherwise: str) -> None:
    for name in tensors:
        if '.peft.' in name and not re.fullmatch(known, name):
            raise ConfigError(f'{name}: {otherwise}.')


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
