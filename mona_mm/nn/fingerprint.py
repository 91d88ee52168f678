"""Is this the frozen base that a delta was trained on? A checksum of every frozen tensor says."""

import base64
import hashlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(frozen: Mapping[str, Tensor], resizable: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fingerprint of tensors by name: a checksum of all (of their values in float32), two bytes of each one's, and
    the shapes of tables of positions, whose names end in one of ``resizable``.

    Swin-B takes 0.1 s on one CPU core.
    """
    sums = [checksum(frozen[name]) for name in sorted(frozen)]
    short = base64.b85encode(struct.pack(f'<{len(sums)}H', *(of & 0xFFFF for of in sums))).decode()
    positions = {name: list(t.shape) for name, t in frozen.items() if name.endswith(resizable)}
    recorded = dict(**names_of(frozen), all=_checksum_of(sums), short=short)
    return {**recorded, **(dict(positions=positions) if positions else {})}


def names_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors these are, and a checksum of their names."""
    return dict(count=len(tensors), names=_names_checksum(sorted(tensors)))


def same_names(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> bool:
    """Whether a fingerprint (or :func:`names_of`) was taken of tensors of the same names."""
    now = names_of(frozen)
    return all(recorded[key] == now[key] for key in now)


def differing(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not those of a fingerprint, whose names are the same.

    (Where one differs, each other that does is missed with a chance of 1 in 65,536.) Tables that are :func:`resized`
    cannot be compared, and are not among them.

    Raises:
        ValueError: if the fingerprint is not one of so many tensors.
    """
    names = sorted(frozen)
    sums = [checksum(frozen[name]) for name in names]
    if _checksum_of(sums) == recorded['all']:
        return []
    short = base64.b85decode(recorded['short'])
    if len(short) != 2 * len(names):
        raise ValueError(f'a fingerprint of {len(short) // 2} tensors for {len(names)}')
    expected = struct.unpack(f'<{len(names)}H', short)
    other_size = resized(recorded, frozen)
    wrong = [name for name, of, was in zip(names, sums, expected, strict=True) if of & 0xFFFF != was]
    return [name for name in wrong if name not in other_size] if other_size else wrong or names


def resized(recorded: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> list[str]:
    """The names of the tables of positions that had another size when a fingerprint was taken.

    Raises:
        ValueError: if the fingerprint does not hold shapes by name.
    """
    positions = recorded.get('positions', {})
    if not isinstance(positions, Mapping):
        raise ValueError(f'positions are a {type(positions).__name__}')
    return [name for name, shape in positions.items() if name in frozen and list(frozen[name].shape) != shape]


def _checksum_of(sums: list[int]) -> str:
    return hashlib.blake2b(struct.pack(f'<{len(sums)}I', *sums), digest_size=8).hexdigest()


def _names_checksum(names: list[str]) -> int:
    return zlib.crc32('\n'.join(names).encode())


def checksum(tensor: Tensor) -> int:
    """A checksum of the values (in float32, or as whole numbers) and the shape of a tensor."""
    # A sum would not notice two values that have changed places.
    plain = tensor.detach().to('cpu', torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()
    return zlib.crc32(plain.numpy(), zlib.crc32(str(tuple(plain.shape)).encode()))
