"""The one container of what this package writes for itself: deltas, plans of SPT and sensitivities.

It is a safetensors file whose tensors have their own names. Its metadata, which every viewer of safetensors shows,
are texts: ``format`` and ``mona_mm_version`` say what wrote it, ``digest`` is the SHA-256 of the whole file with zeros
in its own place, ``tensors`` says how many there are and sums up their names, types and shapes, and each further entry
is one field in JSON.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.header import check_length, parse
from mona_mm.errors import MissingFileError, UserError
from mona_mm.version import __version__

_ENVELOPE = ('format', 'mona_mm_version', 'digest', 'tensors')
_NO_DIGEST = '0' * 64
_DIGEST = re.compile(r'[0-9a-f]{64}')
_VERSION = re.compile(r'[\w.+-]{1,40}')


@dataclass(frozen=True)
class Kind:
    """A kind of file that is a container.

    Args:
        name: in messages, ``'delta'``.
        format: with its version, ``'mona_mm.delta/2'``.
        error: the class of what is raised when a file of this kind cannot be read or written.
        renewal: what to do with a file of an earlier format; a sentence.
        hint: a sentence at the end of the message about a file that is none of mona_mm's.
        old_version: finds, in the metadata of an earlier format, the version of mona_mm that wrote it.
    """

    name: str
    format: str
    error: type[UserError]
    renewal: str
    hint: str = ''
    old_version: Callable[[Mapping[str, str]], Any] = lambda metadata: metadata.get('mona_mm_version')


class HeaderTooLongError(UserError):
    """The header of a container would be longer than is read."""


def write(
    path: str | Path,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write a container, whole or not at all.

    Args:
        path: the file.
        kind: what it is.
        tensors: by name; views of one memory are stored apart.
        fields: what it says besides, by name, in what JSON can say; numpy's numbers and arrays become Python's, and
            sets become lists.
        allow_nonfinite: write tensors even if they hold values that are not finite.

    Raises:
        kind.error: if a tensor holds values that are not finite; it names the first.
        HeaderTooLongError: if fields and names take more than a mebibyte, or nest deeper than is read.
    """
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise kind.error(f'{path} is not written: {wrong}.')
    said = {name: json.dumps(value, default=_plain) for name, value in fields.items()}
    metadata = dict(
        format=kind.format,
        mona_mm_version=__version__,
        digest=_NO_DIGEST,
        tensors=json.dumps(_announced(tensors)),
        **said,
    )
    data = safetensors.torch.save(_apart(tensors), metadata)
    try:
        length = check_length(BytesIO(data))
        for text in said.values():
            parse(text)
    except ValueError as error:
        raise HeaderTooLongError(str(error)) from None
    place = _place(data, length, f'"digest":"{_NO_DIGEST}"') + len('"digest":"')
    AtomicLocalBackend().put(
        b''.join((data[:place], _digest(data, place).encode(), data[place + len(_NO_DIGEST) :])),
        Path(path).expanduser(),
    )


def read(path: str | Path, kind: Kind, *, allow_nonfinite: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a container, on the CPU, and its fields.

    No byte of it is executed, and none can differ from what was written.

    Raises:
        MissingFileError: if there is no such file.
        kind.error: if it is damaged, something else or of another format; or holds other tensors than it announces, or
            values that are not finite.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f'There is no {kind.name} {path}.')
    data = file.read_bytes()
    try:
        metadata, length = _metadata(data)
    except Exception as error:
        raise kind.error(
            f'{path} cannot be read as a {kind.name}: it is no safetensors file of mona_mm, or cut short, or damaged '
            f'({_reason(error)}).{kind.hint and " " + kind.hint}'
        ) from error
    _check_format(path, kind, metadata)
    try:
        _check_digest(data, length, metadata)
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # it has them in another order every time
        if parse(metadata['tensors']) != _announced(tensors):
            raise ValueError(f'it announces other tensors than the {len(tensors)} that it holds')
        fields = {name: parse(text) for name, text in metadata.items() if name not in _ENVELOPE}
    except Exception as error:
        raise kind.error(f'{path} cannot be read as a {kind.name}: {_reason(error)}.') from error
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise kind.error(f'{path} cannot be read as a {kind.name} to use: {wrong}.')
    return tensors, fields


def nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor, the first by name, holds infinite values or none that are numbers, and how many; empty if none."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() or tensor.is_complex():
            # in float32, for not every type of eight bits can be asked
            count = int((~torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)).sum())
            if count:
                return f'{name} holds {count:,} of {tensor.numel():,} values that are not finite (NaN or infinite)'
    return ''


def _announced(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many tensors there are, and a digest of their names, types and shapes."""
    lines = '\n'.join(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}' for name in sorted(tensors))
    return dict(count=len(tensors), digest=hashlib.sha256(lines.encode()).hexdigest()[:16])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory: safetensors refuses views that overlap."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays, in a data set's meta information, as Python's."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def _metadata(data: bytes) -> tuple[dict[str, str], int]:
    """The metadata of a safetensors file, and the length of its header."""
    length = check_length(BytesIO(data))
    metadata = parse(data[8 : 8 + length]).get('__metadata__')
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError('it has no metadata')
    if 'format' not in metadata:
        raise ValueError('its metadata name no format')
    return metadata, length


def _check_format(path: str | Path, kind: Kind, metadata: Mapping[str, str]) -> None:
    form = metadata['format']
    if form == kind.format:
        return
    said = f'{path} cannot be read as a {kind.name}: its format is {form[:40]!r}'
    if form.rpartition('/')[0] == kind.format.rpartition('/')[0]:
        version = kind.old_version(metadata)
        known = isinstance(version, str) and _VERSION.fullmatch(version)
        writer = f'mona_mm {version}' if known else 'another version'
        raise kind.error(
            f'{said}, written by {writer}; mona_mm {__version__} reads {kind.format!r} alone. {kind.renewal}'
        )
    raise kind.error(f'{said} and not {kind.format!r}.')


def _check_digest(data: bytes, length: int, metadata: Mapping[str, str]) -> None:
    digest = metadata.get('digest', '')
    if not _DIGEST.fullmatch(digest) or _digest(data, _place(data, length, digest)) != digest:
        raise ValueError('it is damaged: its contents are not what its digest says')


def _place(data: bytes, length: int, text: str) -> int:
    """Where in the header a text begins."""
    return data.index(text.encode(), 8, 8 + length)


def _digest(data: bytes, place: int) -> str:
    """SHA-256 of a file with zeros where its digest is."""
    view = memoryview(data)
    found = hashlib.sha256(view[:place])
    found.update(_NO_DIGEST.encode())
    found.update(view[place + len(_NO_DIGEST) :])
    return found.hexdigest()


def _reason(error: Exception) -> str:
    """An error in one line; of a short one of this package's own, its words alone."""
    words = ' '.join(str(error).split())[:300]
    return words if type(error) is ValueError else f'{type(error).__name__}: {words}'
