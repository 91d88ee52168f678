"""Deltas as files: a :mod:`~mona_mm.checkpoint.container` whose fields are a header that says what they are."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from mona_mm.checkpoint import container
from mona_mm.checkpoint.container import HeaderTooLongError, Kind, nonfinite
from mona_mm.checkpoint.header import LONGEST, parse
from mona_mm.errors import CheckpointMismatchError

SUFFIX = '.delta.safetensors'
_BASE = dict(count=int, names=int, all=str, short=str)
_METHOD = dict(type=(str, type(None)), options=dict, trainable=list)
_MOST_PARAMETERS = 2**20  # of an optimizer, whose number a header states
_MOST_STEPS = 2**53


def _version_of_first_format(metadata: Mapping[str, str]) -> Any:
    """The version of mona_mm in a header of 'mona_mm.delta/1', which was compressed; None if it cannot be found."""
    try:
        text = zlib.decompressobj().decompress(base64.b85decode(metadata['header']), LONGEST + 1)
        return parse(text)['versions']['mona_mm']
    except (KeyError, TypeError, ValueError, zlib.error):
        return None


KIND = Kind(
    name='delta',
    format='mona_mm.delta/2',
    error=CheckpointMismatchError,
    renewal='Make it anew from the whole checkpoint of its run: python tools/delta.py extract CONFIG CHECKPOINT OUT.',
    old_version=_version_of_first_format,
)


@dataclass
class DeltaHeader:
    """What a delta says about itself.

    Args:
        methods: by path of a module in the model (``''`` is the model), its method and its rules; see
            :func:`mona_mm.checkpoint.delta.describe_methods`.
        backbone: prefix of the backbone's names, ``'backbone.'``; empty for a delta of a backbone alone.
        parts: of the model, that it holds; None for all. ``'method'`` is what trains in the backbone.
        half: whether trained values were rounded to float16.
        base: the fingerprint of the frozen tensors; see :mod:`mona_mm.nn.digest`.
        base_file: the whole model that the run started from (its ``load_from``), its absolute path or its address;
            empty where the base is what the ``init_cfg`` loads.
        versions: of the packages that wrote it.
        config: the config of the run, as text; it is shown, never executed.
        metrics: the last validation's at the time.
        dataset_meta: names (and colours) of the classes.
        progress: where training was; with it a run can be resumed from the delta.
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
    shared: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    _TYPES = dict(
        methods=dict, backbone=str, parts=(list, type(None)), half=bool, base=dict, versions=dict, base_file=str,
        config=str, metrics=dict, dataset_meta=dict, progress=dict, shared=dict, copies=dict,
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
    if not isinstance(header.dataset_meta.get('classes', []), list | str | NoneType):
        raise TypeError('its classes are no list')
    for name in ('shared', 'copies'):
        if not _are_texts(getattr(header, name)):
            raise TypeError(f'{name} are no texts')
    _check_progress(header.progress)
    return header


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
    tensors = {name: t for name, t in tensors.items() if name not in header.shared}
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} is not written: {wrong}. Training has diverged; take an earlier checkpoint and a lower learning '
            'rate, or, if these values are meant, save with allow_nonfinite=True.'
        )
    try:
        try:
            container.write(file, KIND, tensors, asdict(header), allow_nonfinite=True)
        except HeaderTooLongError:
            container.write(file, KIND, tensors, asdict(replace(header, config='')), allow_nonfinite=True)
    except HeaderTooLongError as error:
        sizes = {name: len(str(value)) for name, value in asdict(header).items() if name != 'config'}
        largest = max(sizes, key=sizes.get)
        raise CheckpointMismatchError(
            f'{file} is not written: its header would be of more than {LONGEST:,} bytes, about {sizes[largest]:,} of '
            f'them for {largest}, or too deep ({error}).'
        ) from None


def read_delta(file: str | Path, allow_nonfinite: bool = False) -> Delta:
    """Read a delta onto the CPU. No byte of it is executed, and none can differ from what was written.

    Args:
        file: that :func:`write_delta` wrote.
        allow_nonfinite: read it even if it holds values that are not finite.

    Raises:
        MissingFileError: if it is not there.
        CheckpointMismatchError: if it is damaged, or something else, or of an earlier format; or holds other tensors
            than it announces, or values that are not finite.
    """
    tensors, fields = container.read(file, KIND, allow_nonfinite=True)
    try:
        header = _check(DeltaHeader(**fields))
        _check_names(header, tensors)
        tensors |= {name: tensors[stored] for name, stored in header.shared.items()}
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointMismatchError(
            f'{file} cannot be read as a delta: its header is not as mona_mm writes it ({str(error)[:300]}).'
        ) from error
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} cannot be read as a delta to use: {wrong}. If they are meant, load it with load_delta(model, '
            'file, allow_nonfinite=True).'
        )
    return Delta(header, tensors, str(file))


def _check_names(header: DeltaHeader, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other parts than a header announces, and what it says is shared but is stored."""
    twice = sorted(header.shared.keys() & tensors.keys())
    if twice:
        raise ValueError(f'it says that {twice[0][:80]} is another tensor, and holds it as well')
    if header.parts is not None:
        parts = {header.part(name) for name in (*tensors, *header.shared)}
        if parts != set(header.parts):
            raise ValueError(f'it announces {", ".join(header.parts)} and holds {", ".join(sorted(parts))}')
