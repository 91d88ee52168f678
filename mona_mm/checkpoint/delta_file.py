"""The file format of deltas: safetensors, with a header that says what they are and a digest over every byte."""

import base64
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import CheckpointMismatchError, MissingFileError

SUFFIX = '.delta.safetensors'
FORMAT = 'mona_mm.delta/1'
_NO_DIGEST = '0' * 64
_BASE = dict(count=int, names=int, all=str, short=str)
_METHOD = dict(type=(str, type(None)), options=dict, trainable=list)
_ENTRY, _MOST_NAMES = 70, 0.01  # bytes of a tensor's entry besides its name; share of a file that may be entries
_LONGEST_HEADER = 64 * 2**20  # bytes, unpacked: a malicious file could otherwise fill the memory


@dataclass
class DeltaHeader:
    """What a delta says about itself.

    Args:
        methods: by path of a module in the model (``''`` is the model), its method and its rules; see
            :func:`mona_mm.checkpoint.delta.describe_methods`.
        backbone: prefix of the backbone's names, ``'backbone.'``; empty for a delta of a backbone alone.
        parts: of the model, that it holds; None for all. ``'method'`` is what trains in the backbone.
        half: whether trained values were rounded to float16.
        base: the fingerprint of the frozen tensors; see :mod:`mona_mm.checkpoint.fingerprint`.
        base_file: the whole model that the run started from (its ``load_from``), its absolute path or its address;
            empty where the base is what the ``init_cfg`` loads.
        versions: of the packages that wrote it.
        config: the config of the run, as text; it is shown, never executed.
        metrics: the last validation's at the time.
        dataset_meta: names (and colours) of the classes.
        progress: where training was; with it a run can be resumed from the delta.
        packed: names and shapes, by type, of tensors that lie one after another in one; see :func:`_pack`.
        shared: further names of tensors that have several in the model, each with the name that it is stored under.
        copies: paths of parts that follow others (a teacher), each with the other's, whose frozen part is also theirs.
    """

    methods: dict[str, dict[str, Any]]
    backbone: str
    parts: list[str] | None
    half: bool
    base: dict[str, Any]
    versions: dict[str, str]
    base_file: str = ''
    config: str = ''
    metrics: dict[str, float] = field(default_factory=dict)
    dataset_meta: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, list] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    _TYPES = dict(
        methods=dict, backbone=str, parts=(list, type(None)), half=bool, base=dict, versions=dict, base_file=str,
        config=str, metrics=dict, dataset_meta=dict, progress=dict, packed=dict, shared=dict,
        copies=dict,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, expected in self._TYPES.items():
            if not isinstance(getattr(self, name), expected):
                raise TypeError(f'{name} is a {type(getattr(self, name)).__name__}')
        if not all(isinstance(self.base.get(key), of) for key, of in _BASE.items()):
            raise TypeError('base is no fingerprint')
        for each in self.methods.values():
            if not isinstance(each, dict) or not all(isinstance(each.get(key), of) for key, of in _METHOD.items()):
                raise TypeError('methods are not described')

    def part(self, name: str) -> str:
        """The part of the model that a tensor belongs to: ``'method'``, or the model's child with the tensor."""
        return part_of(name, self.backbone)


def part_of(name: str, backbone: str) -> str:
    """``'method'`` for what is in the backbone, whose names begin with ``backbone``, else the model's child."""
    return 'method' if name.startswith(backbone) else name.partition('.')[0]


@dataclass
class Delta:
    """A delta in memory: its header and its tensors, by their names in the model's state dict."""

    header: DeltaHeader
    tensors: dict[str, Tensor]
    file: str


def write_delta(file: str | Path, header: DeltaHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write a delta, whole or not at all. Of the names in ``header.shared`` no tensor is stored."""
    header, tensors = _pack(header, _apart({n: t for n, t in tensors.items() if n not in header.shared}))
    methods = '+'.join(each.get('type') or '+'.join(each['trainable']) for each in header.methods.values())
    text = json.dumps(asdict(header), separators=(',', ':'), default=_plain)
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    metadata = dict(format=FORMAT, method=methods, header=packed, digest=_NO_DIGEST)
    data = safetensors.torch.save(tensors, metadata)
    data = data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
    AtomicLocalBackend().put(data, Path(file).expanduser())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory: safetensors refuses views that overlap."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _pack(header: DeltaHeader, tensors: dict[str, Tensor]) -> tuple[DeltaHeader, dict[str, Tensor]]:
    """Where there are many small tensors (biases, norms), put all of a type into one.

    In safetensors the name, type, shape and place of a tensor take about a hundred bytes, uncompressed.
    """
    if sum(_ENTRY + len(name) for name in tensors) <= _MOST_NAMES * sum(t.nbytes for t in tensors.values()):
        return header, tensors
    packed: dict[str, list] = {}
    for name in sorted(tensors):
        packed.setdefault(str(tensors[name].dtype), []).append((name, tuple(tensors[name].shape)))
    joined = {of: torch.cat([tensors[name].flatten() for name, _ in entries]) for of, entries in packed.items()}
    return replace(header, packed=packed), joined


def _unpack(header: DeltaHeader, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not header.packed:
        return tensors
    unpacked = {}
    for of, entries in header.packed.items():
        sizes = [math.prod(shape) for _, shape in entries]
        pieces = zip(entries, tensors[of].split(sizes), strict=True)
        unpacked.update({name: piece.view(shape) for (name, shape), piece in pieces})
    return unpacked


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays, in a data set's meta information, as Python's."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def read_delta(file: str | Path) -> Delta:
    """Read a delta onto the CPU. No byte of it is executed, and none can differ from what was written.

    Raises:
        MissingFileError: if it is not there.
        CheckpointMismatchError: if it is damaged, or something else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingFileError(f'There is no delta {file}.')
    data = path.read_bytes()
    try:
        header = _read_header(data)
        tensors = _unpack(header, safetensors.torch.load(data))
        tensors |= {name: tensors[stored] for name, stored in header.shared.items()}
    except _Damaged as error:
        raise CheckpointMismatchError(f'{file} cannot be read as a delta: {error}.') from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointMismatchError(f'{file} cannot be read as a delta: {error}.') from error
    return Delta(header, tensors, str(file))


class _Damaged(Exception):
    pass


def _read_header(data: bytes) -> DeltaHeader:
    try:
        (length,) = struct.unpack('<Q', data[:8])
        if not 0 < length <= len(data) - 8:
            raise ValueError
        metadata = json.loads(data[8 : 8 + length])['__metadata__']
        form, digest, packed = metadata['format'], metadata['digest'], metadata['header']
        if not all(isinstance(text, str) for text in (form, digest, packed)) or len(digest) != len(_NO_DIGEST):
            raise ValueError
        digest = digest.encode('ascii')
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise _Damaged('it is no safetensors file of mona_mm, or cut short, or damaged') from None
    if form != FORMAT:
        raise _Damaged(f'its format is {form[:40]!r}; this version of mona_mm reads {FORMAT}')
    if hashlib.sha256(data.replace(digest, _NO_DIGEST.encode(), 1)).hexdigest().encode() != digest:
        raise _Damaged('it is damaged: its contents are not what its digest says')
    try:
        unpack = zlib.decompressobj()
        text = unpack.decompress(base64.b85decode(packed), _LONGEST_HEADER)
        if unpack.unconsumed_tail:
            raise _Damaged(f'its header is larger than {_LONGEST_HEADER} bytes')
        return DeltaHeader(**json.loads(text))
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise _Damaged(f'its header is not as mona_mm writes it ({error})') from None
