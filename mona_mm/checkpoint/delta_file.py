"""The file format of deltas: safetensors, with a header that says what they are and a digest over every byte."""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.header import LONGEST, check_length, parse
from mona_mm.errors import CheckpointMismatchError, MissingFileError
from mona_mm.nn.fingerprint import names_of, same_names

SUFFIX = '.delta.safetensors'
FORMAT = 'mona_mm.delta/1'
_NO_DIGEST = '0' * 64
_BASE = dict(count=int, names=int, all=str, short=str)
_METHOD = dict(type=(str, type(None)), options=dict, trainable=list)
_ENTRY, _MOST_NAMES = 70, 0.01  # bytes of a tensor's entry besides its name; share of a file that may be entries
_MOST_PARAMETERS = 2**20  # of an optimizer, whose number a header states
_MOST_STEPS = 2**53


@dataclass
class DeltaHeader:
    """What a delta says about itself.

    Args:
        methods: by path of a module in the model (``''`` is the model), its method and its rules; see
            :func:`mona_mm.checkpoint.delta.describe_methods`.
        backbone: prefix of the backbone's names, ``'backbone.'``; empty for a delta of a backbone alone.
        parts: of the model, that it holds; None for all. ``'method'`` is what trains in the backbone.
        half: whether trained values were rounded to float16.
        base: the fingerprint of the frozen tensors; see :mod:`mona_mm.nn.fingerprint`.
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
        holds: how many tensors are in it, and a checksum of their names; empty in files of earlier versions.
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
    holds: dict[str, int] = field(default_factory=dict)

    _TYPES = dict(
        methods=dict, backbone=str, parts=(list, type(None)), half=bool, base=dict, versions=dict, base_file=str,
        config=str, metrics=dict, dataset_meta=dict, progress=dict, packed=dict, shared=dict,
        copies=dict, holds=dict,
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
            if not _are_texts(each['trainable']):
                raise TypeError('the rules of methods are no texts')
        for name in ('parts', 'versions'):
            if not _are_texts(getattr(self, name) or ()):
                raise TypeError(f'{name} are no texts')

    def part(self, name: str) -> str:
        """The part of the model that a tensor belongs to: ``'method'``, or the model's child with the tensor."""
        return part_of(name, self.backbone)


def _are_texts(values: Any) -> bool:
    values = [*values, *values.values()] if isinstance(values, dict) else values
    return all(isinstance(value, str) for value in values)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _check(header: DeltaHeader) -> DeltaHeader:
    """Refuse what would only fail, or fill the memory, once it is used."""
    if header.holds and not all(isinstance(header.holds.get(key), int) for key in ('count', 'names')):
        raise TypeError('holds does not say what it holds')
    if not isinstance(header.dataset_meta.get('classes', []), list | str | NoneType):
        raise TypeError('its classes are no list')
    for name in ('shared', 'copies'):
        if not _are_texts(getattr(header, name)):
            raise TypeError(f'{name} are no texts')
    _check_packed(header.packed)
    _check_progress(header.progress)
    return header


def _check_packed(packed: dict[str, Any]) -> None:
    for entries in packed.values():
        for entry in entries if isinstance(entries, list) else [None]:
            name, shape = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
            if not isinstance(name, str):
                raise TypeError(f'{str(name)[:80]!r} is no name of a tensor')
            if not isinstance(shape, list | tuple) or not all(_is_count(length, _MOST_STEPS) for length in shape):
                raise TypeError(f'{name[:80]} has no shape')
    names = [name for entries in packed.values() for name, _ in entries]
    if len(set(names)) < len(names):
        raise ValueError('it names a tensor twice')


def _check_progress(progress: dict[str, Any]) -> None:
    for name in ('epoch', 'iter'):
        if not _is_count(progress.get(name, 0), _MOST_STEPS):
            raise TypeError(f'its {name} is no count')
    groups, schedulers = progress.get('param_groups', []), progress.get('param_schedulers', [])
    for name, values in (('param_groups', groups), ('param_schedulers', schedulers)):
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise TypeError(f'{name} are no settings')
    for name in ('base_param_settings', 'runtime_info'):
        if not isinstance(progress.get(name, {}), dict):
            raise TypeError(f'{name} are no settings')
    sizes = [group.get('params') for group in groups]
    if not all(_is_count(size, _MOST_PARAMETERS) for size in sizes) or sum(sizes) > _MOST_PARAMETERS:
        raise TypeError('param_groups do not say how many parameters they have')


def part_of(name: str, backbone: str) -> str:
    """``'method'`` for what is in the backbone, whose names begin with ``backbone``, else the model's child."""
    return 'method' if name.startswith(backbone) else name.partition('.')[0]


@dataclass
class Delta:
    """A delta in memory: its header and its tensors, by their names in the model's state dict."""

    header: DeltaHeader
    tensors: dict[str, Tensor]
    file: str


def write_delta(
    file: str | Path, header: DeltaHeader, tensors: Mapping[str, Tensor], allow_nonfinite: bool = False
) -> None:
    """Write a delta, whole or not at all. Of the names in ``header.shared`` no tensor is stored.

    Raises:
        CheckpointMismatchError: if a tensor holds values that are not finite; or if what the header says is too much
            for a header, even without the text of the config.
    """
    tensors = _apart({name: t for name, t in tensors.items() if name not in header.shared})
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} is not written: {wrong}. Training has diverged; take an earlier checkpoint and a lower learning '
            'rate, or, if these values are meant, save with allow_nonfinite=True.'
        )
    header, tensors = _pack(replace(header, holds=names_of(tensors)), tensors)
    data = _serialised(header, tensors) or _serialised(replace(header, config=''), tensors)
    if not data:
        sizes = {name: len(json.dumps(value, default=_plain)) for name, value in asdict(header).items()}
        largest = max(sizes, key=sizes.get)
        raise CheckpointMismatchError(
            f'{file} is not written: its header would be of more than {LONGEST:,} bytes, {sizes[largest]:,} of them '
            f'for {largest}.'
        )
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


def _serialised(header: DeltaHeader, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a delta; none where its header would not be read."""
    methods = '+'.join(each.get('type') or '+'.join(each['trainable']) for each in header.methods.values())
    text = json.dumps(asdict(header), separators=(',', ':'), default=_plain).encode()
    packed = base64.b85encode(zlib.compress(text, 9)).decode()
    metadata = dict(format=FORMAT, method=methods, header=packed, digest=_NO_DIGEST)
    data = safetensors.torch.save(dict(tensors), metadata)
    try:
        parse(text)
        check_length(BytesIO(data))
    except ValueError:
        return b''
    return data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


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
    if header.packed:
        if tensors.keys() != header.packed.keys():
            extra = ', '.join(sorted(tensors.keys() ^ header.packed.keys()))
            raise ValueError(f'it announces other tensors than it holds: {extra[:200]}')
        unpacked = {}
        for of, entries in header.packed.items():
            sizes = [math.prod(shape) for _, shape in entries]
            if str(tensors[of].dtype) != of or sum(sizes) != tensors[of].numel():
                raise ValueError(f'its values of type {of} are not those that it announces')
            pieces = zip(entries, tensors[of].flatten().split(sizes), strict=True)
            unpacked.update({name: piece.view(shape) for (name, shape), piece in pieces})
        tensors = unpacked
    if header.holds and not same_names(header.holds, tensors):
        raise ValueError(f'it announces {header.holds["count"]} tensors and holds {len(tensors)}, or others')
    twice = sorted(header.shared.keys() & tensors.keys())
    if twice:
        raise ValueError(f'it says that {twice[0][:80]} is another tensor, and holds it as well')
    if header.parts is not None:
        parts = {header.part(name) for name in (*tensors, *header.shared)}
        if parts != set(header.parts):
            raise ValueError(f'it announces {", ".join(header.parts)} and holds {", ".join(sorted(parts))}')
    return tensors


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays, in a data set's meta information, as Python's."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def read_delta(file: str | Path, allow_nonfinite: bool = False) -> Delta:
    """Read a delta onto the CPU. No byte of it is executed, and none can differ from what was written.

    Args:
        file: that :func:`write_delta` wrote.
        allow_nonfinite: read it even if it holds values that are not finite.

    Raises:
        MissingFileError: if it is not there.
        CheckpointMismatchError: if it is damaged, or something else, or holds other tensors than it announces, or
            values that are not finite.
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
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointMismatchError(f'{file} cannot be read as a delta: {error}.') from error
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} cannot be read as a delta to use: {wrong}. If they are meant, load it with load_delta(model, '
            'file, allow_nonfinite=True).'
        )
    return Delta(header, tensors, str(file))


class _Damaged(Exception):
    pass


def _read_header(data: bytes) -> DeltaHeader:
    try:
        length = check_length(BytesIO(data))
        metadata = parse(data[8 : 8 + length])['__metadata__']
        form, digest, packed = metadata['format'], metadata['digest'], metadata['header']
        if not all(isinstance(text, str) for text in (form, digest, packed)) or len(digest) != len(_NO_DIGEST):
            raise ValueError('it is not of mona_mm')
        digest = digest.encode('ascii')
    except (ValueError, KeyError, TypeError) as error:
        reason = f' ({error})' if type(error) is ValueError else ''
        raise _Damaged(f'it is no safetensors file of mona_mm, or cut short, or damaged{reason}') from None
    if form != FORMAT:
        raise _Damaged(f'its format is {form[:40]!r}; this version of mona_mm reads {FORMAT}')
    if hashlib.sha256(data.replace(digest, _NO_DIGEST.encode(), 1)).hexdigest().encode() != digest:
        raise _Damaged('it is damaged: its contents are not what its digest says')
    try:
        unpack = zlib.decompressobj()
        text = unpack.decompress(base64.b85decode(packed), LONGEST + 1)
        if len(text) <= LONGEST and (not unpack.eof or unpack.unused_data):
            raise ValueError('it is cut short, or followed by something')
        return _check(DeltaHeader(**parse(text)))
    except (zlib.error, ValueError, TypeError) as error:
        raise _Damaged(f'its header is not as mona_mm writes it ({error})') from None
