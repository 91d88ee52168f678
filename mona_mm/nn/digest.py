r"""The digest of a tensor, and the fingerprint of many tensors, which tells whether a base is the one of a delta.

The digest is 64 bits over a tensor's bits and its shape. It is computed where the tensor is (of a tensor on CUDA only
the digest comes to the host) and is the same on every device and processor, since whole numbers are added and
multiplied modulo :math:`2^{64}` and nothing is rounded. The bytes are read as 64-bit words of a lower half :math:`l_i`
and an upper half :math:`u_i`. With constant keys :math:`k_i, k'_i`, rows of 16,384 words are summed, and the sums
:math:`r_j` added with odd weights:

.. math::
    r_j = \sum_i (l_i + k_i)(u_i + k'_i), \qquad \sum_j (2j + 1)\, c\, r_j

That is the hash function NH (Black et al., UMAC, 1999) over keys whose range is such that no factor is zero modulo
:math:`2^{33}`. So any change within one half, thus of any one float32 or any one bit, alters the digest for certain.
Other changes, such as two values that have changed places, are missed with a chance of at most :math:`2^{-32}`, and
:math:`2^{-64}` of most. It is no defence against somebody who looks for two tensors of one digest.
"""

import base64
import hashlib
import struct
import zlib
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_ROW = 16384  # words, two of which stay in a core's cache
_ROWS = 512  # rows at a time on a device that is not the CPU
_ODD = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
_HALF = 0xFFFFFFFF
_WORD = 2**64 - 1

Key = TypeVar('Key', bound=Hashable)


def digest(tensor: Tensor, seed: int = 0) -> int:
    """Compute the digest of a tensor's bits and shape, see the module's docstring; each seed has its own digests."""
    return digests({0: tensor}, seed)[0]


def digests(tensors: Mapping[Key, Tensor], seed: int = 0) -> dict[Key, int]:
    """Compute the digests of tensors by name. The host waits once for all the tensors of one device."""
    sums: dict[torch.device, dict[Key, Tensor]] = {}
    for name, tensor in tensors.items():
        sums.setdefault(tensor.device, {})[name] = _sum(tensor.detach(), seed)
    found = {}
    for on_device in sums.values():
        totals = torch.stack([*on_device.values()]).tolist()
        found.update(zip(on_device, totals, strict=True))
    return {name: _mixed(found[name] ^ _shape_number(tuple(tensor.shape))) for name, tensor in tensors.items()}


def _sum(tensor: Tensor, seed: int) -> Tensor:
    """The weighted sum of a tensor's row sums, a 0-dimensional int64 tensor on its device."""
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    words, rest = octets[:whole].view(torch.int64), octets[whole:]
    full = len(words) // _ROW * _ROW
    rows = [*words[:full].view(-1, _ROW).split(_ROWS)] if full else []
    last = words[full:]
    if len(rest):
        last = torch.cat([last, torch.nn.functional.pad(rest, (0, 8 - len(rest))).view(torch.int64)])
    if len(last):
        rows.append(last.view(1, -1))
    if not rows:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    lower, upper = _keys(tensor.device, seed)
    row_sums = _row_sums_by_numpy if tensor.device.type == 'cpu' else _row_sums
    sums = torch.cat([row_sums(each, lower[: each.shape[1]], upper[: each.shape[1]]) for each in rows])
    weights = torch.arange(len(sums), device=tensor.device).mul_(2).add_(1).mul_(_signed(_ODD))
    return sums.mul_(weights).sum()


def _row_sums(words: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    product = words.bitwise_and(_HALF).add_(lower)
    return product.mul_(words.bitwise_right_shift(32).add_(upper)).sum(1)


def _row_sums_by_numpy(words: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """:func:`_row_sums` on the CPU, where each operation of torch would write the row to newly allocated memory."""
    keys = lower.numpy(), upper.numpy()
    halves = np.empty((2, words.shape[1]), np.int64)
    sums = np.empty(len(words), np.int64)
    for i, row in enumerate(words.numpy()):
        np.add(np.bitwise_and(row, _HALF, out=halves[0]), keys[0], out=halves[0])
        np.add(np.right_shift(row, 32, out=halves[1]), keys[1], out=halves[1])
        sums[i] = np.dot(*halves)
    return torch.from_numpy(sums)


@cache
def _keys(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """The keys of the lower and of the upper halves, as int64. They must never change: saved digests rest on them."""
    start = 2 * _ROW * seed + 1
    with np.errstate(over='ignore'):
        z = np.arange(start, start + 2 * _ROW, dtype=np.uint64) * np.uint64(_ODD)  # SplitMix64's sequence
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys = torch.from_numpy((z >> np.uint64(32)).astype(np.int64)) + 1
    return keys[:_ROW].to(device), (keys[_ROW:] + 2**31).to(device)


def _mixed(number: int) -> int:
    """SplitMix64's last step: a bijection in which every bit of the result depends on every bit of ``number``."""
    number &= _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _WORD
    return number ^ number >> 31


@cache
def _shape_number(shape: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(str(shape).encode(), digest_size=8).digest(), 'little')


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def fingerprint(frozen: Mapping[str, Tensor], resizable: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take the fingerprint of tensors by name.

    It holds one digest of all values (in float32), two bytes of the digest of each tensor, and the shapes of the
    position tables, whose names end in one of ``resizable``. Swin-B takes about 0.3 s on one CPU core.
    """
    found = _value_digests(frozen)
    short = base64.b85encode(struct.pack(f'<{len(found)}H', *(each & 0xFFFF for each in found.values()))).decode()
    positions = {name: list(t.shape) for name, t in frozen.items() if name.endswith(resizable)}
    recorded = dict(**names_of(frozen), all=_digest_of_all(found), short=short)
    return {**recorded, **(dict(positions=positions) if positions else {})}


def names_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of tensors and a checksum of their names."""
    return dict(count=len(tensors), names=zlib.crc32('\n'.join(sorted(tensors)).encode()))


def same_names(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> bool:
    """Whether a fingerprint (or :func:`names_of`) was taken of tensors with the same names."""
    now = names_of(frozen)
    return all(recorded[key] == now[key] for key in now)


def differing(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors whose values differ from those of a fingerprint of the same names.

    That any tensor differs is found for certain (see the module's docstring); which ones, each with a chance of 1 in
    65,536 of being missed. Tables that are :func:`resized` cannot be compared and are left out.

    Raises:
        ValueError: if the fingerprint was taken of another number of tensors.
    """
    found = _value_digests(frozen)
    if _digest_of_all(found) == recorded['all']:
        return []
    short = base64.b85decode(recorded['short'])
    if len(short) != 2 * len(found):
        raise ValueError(f'The fingerprint is one of {len(short) // 2} tensors, and there are {len(found)}.')
    expected = struct.unpack(f'<{len(found)}H', short)
    other_size = resized(recorded, frozen)
    wrong = [name for (name, each), was in zip(found.items(), expected, strict=True) if each & 0xFFFF != was]
    return [name for name in wrong if name not in other_size] if other_size else wrong or [*found]


def resized(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> list[str]:
    """The names of the position tables that had another size when a fingerprint was taken.

    Raises:
        ValueError: if the fingerprint does not hold shapes by name.
    """
    positions = recorded.get('positions', {})
    if not isinstance(positions, Mapping):
        raise ValueError(f'positions must be a mapping of shapes by name, not a {type(positions).__name__}.')
    return [name for name, shape in positions.items() if name in frozen and list(frozen[name].shape) != shape]


def _value_digests(frozen: Mapping[str, Tensor]) -> dict[str, int]:
    """The digests of the values in float32, or in int64 if they are whole numbers, in the order of the names."""
    return digests(
        {
            name: frozen[name].detach().to(torch.float32 if frozen[name].is_floating_point() else torch.int64)
            for name in sorted(frozen)
        }
    )


def _digest_of_all(found: Mapping[str, int]) -> str:
    return hashlib.blake2b(struct.pack(f'<{len(found)}Q', *found.values()), digest_size=8).hexdigest()
