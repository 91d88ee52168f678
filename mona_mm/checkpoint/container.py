"""The container format of the files of this package: deltas, plans of SPT and sensitivities.

It is a safetensors file whose tensors have their own names. Its metadata, which every viewer of safetensors shows, are
strings: ``format`` and ``mona_mm_version`` name the format and the writer, ``digest`` is the SHA-256 of the whole file
with zeros in place of the digest, ``tensors`` holds the number of tensors and a digest of their names, dtypes and
shapes, and each further entry is one field in JSON.
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
    """A kind of file that is stored in the container.

    Args:
        name: the name of the kind in messages, such as ``'delta'``.
        format: the format with its version, such as ``'mona_mm.delta/2'``.
        error: the class of the error when a file of this kind cannot be read or written.
        renewal: a sentence that tells how to make a file of an earlier format anew.
        hint: a sentence for the end of the message about a file that mona_mm has not written.
        old_version: a function that finds the version of mona_mm in the metadata of an earlier format.
    """

    name: str
    format: str
    error: type[UserError]
    renewal: str
    hint: str = ''
    old_version: Callable[[Mapping[str, str]], Any] = lambda metadata: metadata.get('mona_mm_version')


class HeaderTooLongError(UserError):
    """The header of a container would be longer, or nest deeper, than readers accept."""


def write(
    path: str | Path,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write a container, completely or not at all.

    Args:
        path: the file.
        kind: the kind of file.
        tensors: the tensors by name; tensors that share memory are stored separately.
        fields: the fields by name, with values that JSON can hold; numpy's numbers and arrays become Python's, and sets
            become lists.
        allow_nonfinite: write tensors even if they hold values that are not finite.

    Raises:
        kind.error: if a tensor holds values that are not finite; it names the first such tensor.
        HeaderTooLongError: if fields and names take more than a mebibyte, or nest too deep.
    """
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise kind.error(f'{path} is not written: {wrong}.')
    texts = {name: json.dumps(value, default=_json_value) for name, value in fields.items()}
    metadata = dict(
        format=kind.format,
        mona_mm_version=__version__,
        digest=_NO_DIGEST,
        tensors=json.dumps(_announced(tensors)),
        **texts,
    )
    data = safetensors.torch.save(_without_shared_memory(tensors), metadata)
    try:
        length = check_length(BytesIO(data))
        for text in texts.values():
            parse(text)
    except ValueError as error:
        raise HeaderTooLongError(str(error)) from None
    start = _find_in_header(data, length, f'"digest":"{_NO_DIGEST}"') + len('"digest":"')
    AtomicLocalBackend().put(
        b''.join((data[:start], _file_digest(data, start).encode(), data[start + len(_NO_DIGEST) :])),
        Path(path).expanduser(),
    )


def read(path: str | Path, kind: Kind, *, allow_nonfinite: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a container, onto the CPU, and its fields.

    No byte of the file is executed, and its digest is checked.

    Raises:
        MissingFileError: if there is no such file.
        kind.error: if the file is damaged or of another format, or holds other tensors than its metadata announce, or
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
            f'{path} cannot be read as a {kind.name}: it is not a safetensors file of mona_mm, or it is damaged '
            f'({_reason(error)}).{kind.hint and " " + kind.hint}'
        ) from error
    _check_format(path, kind, metadata)
    try:
        _check_digest(data, length, metadata)
        tensors = dict(sorted(safetensors.torch.load(data).items()))  # safetensors returns them in varying order
        if parse(metadata['tensors']) != _announced(tensors):
            raise ValueError(f'its metadata announce other tensors than the {len(tensors)} that it holds')
        fields = {name: parse(text) for name, text in metadata.items() if name not in _ENVELOPE}
    except Exception as error:
        raise kind.error(f'{path} cannot be read as a {kind.name}: {_reason(error)}.') from error
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise kind.error(f'{path} cannot be used as a {kind.name}: {wrong}.')
    return tensors, fields


def nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Describe the first tensor by name that holds values that are not finite; the empty string if there is none."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() or tensor.is_complex():
            # in float32, since isfinite does not support every 8-bit dtype
            count = int((~torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)).sum())
            if count:
                return f'{name} holds {count:,} of {tensor.numel():,} values that are not finite (NaN or infinite)'
    return ''


def _announced(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of tensors, and a digest of their names, dtypes and shapes."""
    lines = '\n'.join(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}' for name in sorted(tensors))
    return dict(count=len(tensors), digest=hashlib.sha256(lines.encode()).hexdigest()[:16])


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory, since safetensors refuses overlapping views."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _json_value(value: Any) -> Any:
    """Convert a value that JSON does not support: numpy's numbers and arrays, sets, and anything else by ``str``."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def _metadata(data: bytes) -> tuple[dict[str, str], int]:
    """Read the metadata of a safetensors file, and the length of its header."""
    length = check_length(BytesIO(data))
    metadata = parse(data[8 : 8 + length]).get('__metadata__')
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError('it has no metadata')
    if 'format' not in metadata:
        raise ValueError('its metadata do not name a format')
    return metadata, length


def _check_format(path: str | Path, kind: Kind, metadata: Mapping[str, str]) -> None:
    form = metadata['format']
    if form == kind.format:
        return
    problem = f'{path} cannot be read as a {kind.name}: its format is {form[:40]!r}'
    if form.rpartition('/')[0] == kind.format.rpartition('/')[0]:
        version = kind.old_version(metadata)
        known = isinstance(version, str) and _VERSION.fullmatch(version)
        writer = f'mona_mm {version}' if known else 'another version'
        raise kind.error(
            f'{problem}, written by {writer}; mona_mm {__version__} reads only {kind.format!r}. {kind.renewal}'
        )
    raise kind.error(f'{problem} and not {kind.format!r}.')


def _check_digest(data: bytes, length: int, metadata: Mapping[str, str]) -> None:
    digest = metadata.get('digest', '')
    if not _DIGEST.fullmatch(digest) or _file_digest(data, _find_in_header(data, length, digest)) != digest:
        raise ValueError('it is damaged: its contents do not match its digest')


def _find_in_header(data: bytes, length: int, text: str) -> int:
    """The position of a text in the header of a file."""
    return data.index(text.encode(), 8, 8 + length)


def _file_digest(data: bytes, start: int) -> str:
    """The SHA-256 of a file with zeros in place of its digest, which begins at ``start``."""
    view = memoryview(data)
    found = hashlib.sha256(view[:start])
    found.update(_NO_DIGEST.encode())
    found.update(view[start + len(_NO_DIGEST) :])
    return found.hexdigest()


def _reason(error: Exception) -> str:
    """An error in one line: its message, with the name of its class unless this package has raised it."""
    words = ' '.join(str(error).split())[:300]
    return words if type(error) is ValueError else f'{type(error).__name__}: {words}'
