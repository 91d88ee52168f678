"""Read and write deltas as files: a :mod:`~mona_mm.checkpoint.container` whose fields form a header."""

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
_MOST_PARAMETERS = 2**20  # the largest number of parameters that a header may state for an optimizer
_MOST_STEPS = 2**53


def _version_of_first_format(metadata: Mapping[str, str]) -> Any:
    """The version of mona_mm in the compressed header of format 'mona_mm.delta/1'; None if it cannot be found."""
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
    """The header of a delta.

    Args:
        methods: the method and rules of modules in the model, by path (``''`` is the model itself); see
            :func:`mona_mm.checkpoint.described_methods.describe_methods`.
        backbone: the prefix of the backbone's names, ``'backbone.'``; empty for a delta of a backbone alone.
        parts: the parts of the model that the delta holds; None for all. ``'method'`` is everything in the backbone.
        half: whether trained values were rounded to float16.
        base: the fingerprint of the frozen tensors; see :mod:`mona_mm.nn.digest`.
        base_file: the checkpoint of the whole model from which the run started (its ``load_from``), as absolute path or
            address; empty if the ``init_cfg`` loads the base.
        versions: the versions of the packages that have written the delta.
        config: the config of the run, as text, which is shown and never executed.
        metrics: the metrics of the last validation before it was written.
        dataset_meta: the names (and colours) of the classes.
        progress: the state of training, from which a run can resume.
        shared: for tensors with several names in the model, the stored name by each of the other names.
        copies: for parts that follow another part (a teacher its student) and have the same frozen tensors, the path of
            the other part by their path.
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
                raise TypeError(f'{name} has the type {type(getattr(self, name)).__name__}')
        if not _has_types(self.base, _BASE):
            raise TypeError('base is not a fingerprint')
        for method in self.methods.values():
            if not isinstance(method, dict) or not _has_types(method, _METHOD):
                raise TypeError('methods are not descriptions of methods')
            if not _are_strings(method['trainable']):
                raise TypeError('the trainable rules of methods are not strings')
        for name in ('parts', 'versions'):
            if not _are_strings(getattr(self, name) or ()):
                raise TypeError(f'{name} are not strings')

    def part(self, name: str) -> str:
        """The part of the model to which a tensor belongs: ``'method'``, or the name of a child of the model."""
        return part_of(name, self.backbone)


def _has_types(values: Mapping[str, Any], types: Mapping[str, Any]) -> bool:
    return all(isinstance(values.get(key), expected) for key, expected in types.items())


def _are_strings(values: Any) -> bool:
    values = [*values, *values.values()] if isinstance(values, dict) else values
    return all(isinstance(value, str) for value in values)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _check_values(header: DeltaHeader) -> DeltaHeader:
    """Refuse values that would only fail, or fill the memory, when they are used later."""
    if not isinstance(header.dataset_meta.get('classes', []), list | str | NoneType):
        raise TypeError('classes are not a list')
    for name in ('shared', 'copies'):
        if not _are_strings(getattr(header, name)):
            raise TypeError(f'{name} are not strings')
    _check_progress(header.progress)
    return header


def _check_progress(progress: dict[str, Any]) -> None:
    for name in ('epoch', 'iter'):
        if not _is_count(progress.get(name, 0), _MOST_STEPS):
            raise TypeError(f'{name} is not a count')
    groups, schedulers = progress.get('param_groups', []), progress.get('param_schedulers', [])
    for name, values in (('param_groups', groups), ('param_schedulers', schedulers)):
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise TypeError(f'{name} are not a list of dicts')
    for name in ('base_param_settings', 'runtime_info'):
        if not isinstance(progress.get(name, {}), dict):
            raise TypeError(f'{name} is not a dict')
    sizes = [group.get('params') for group in groups]
    if not all(_is_count(size, _MOST_PARAMETERS) for size in sizes) or sum(sizes) > _MOST_PARAMETERS:
        raise TypeError(f'the params of param_groups are not counts of at most {_MOST_PARAMETERS:,} in all')


def part_of(name: str, backbone: str) -> str:
    """The part to which a tensor belongs: ``'method'`` if its name begins with ``backbone``, or else its first part."""
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
    """Write a delta, completely or not at all. Tensors under the names in ``header.shared`` are not stored.

    Raises:
        CheckpointMismatchError: if a tensor holds values that are not finite, or the header is too long even without
            the text of the config.
    """
    tensors = {name: t for name, t in tensors.items() if name not in header.shared}
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} is not written: {wrong}. Training has diverged: use an earlier checkpoint and a lower learning '
            'rate, or save with allow_nonfinite=True if these values are intended.'
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
            f'{file} is not written: its header would have more than {LONGEST:,} bytes, about {sizes[largest]:,} of '
            f'them for {largest}, or nest too deep ({error}).'
        ) from None


def read_delta(file: str | Path, allow_nonfinite: bool = False) -> Delta:
    """Read a delta onto the CPU. No byte of it is executed, and its digest is checked.

    Args:
        file: a file that :func:`write_delta` has written.
        allow_nonfinite: read it even if it holds values that are not finite.

    Raises:
        MissingFileError: if the file does not exist.
        CheckpointMismatchError: if it is damaged, not a delta or of an earlier format, or holds other tensors than its
            header announces, or values that are not finite.
    """
    tensors, fields = container.read(file, KIND, allow_nonfinite=True)
    try:
        header = _check_values(DeltaHeader(**fields))
        _check_stored_names(header, tensors)
        tensors |= {name: tensors[stored] for name, stored in header.shared.items()}
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointMismatchError(
            f'{file} cannot be read as a delta: its header is not valid ({str(error)[:300]}).'
        ) from error
    wrong = '' if allow_nonfinite else nonfinite(tensors)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} cannot be used as a delta: {wrong}. If these values are intended, load it with load_delta(model, '
            'file, allow_nonfinite=True).'
        )
    return Delta(header, tensors, str(file))


def _check_stored_names(header: DeltaHeader, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other parts than the header announces, and stored tensors that it lists as shared."""
    stored = sorted(header.shared.keys() & tensors.keys())
    if stored:
        raise ValueError(f'{stored[0][:80]} is listed as another name of a tensor, and is stored as well')
    if header.parts is not None:
        parts = {header.part(name) for name in (*tensors, *header.shared)}
        if parts != set(header.parts):
            raise ValueError(f'it announces the parts {", ".join(header.parts)} and holds {", ".join(sorted(parts))}')
