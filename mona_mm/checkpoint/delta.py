"""Deltas: what training changed, in one small file, and the frozen base it belongs on."""

import inspect
import os.path as osp
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from mona_mm.checkpoint.delta_file import SUFFIX, Delta, DeltaHeader, part_of, read_delta, write_delta
from mona_mm.checkpoint.lock import writing
from mona_mm.checkpoint.pretrained import compare, read_checkpoint
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.errors import CheckpointMismatchError, ConfigError, UserError
from mona_mm.frozen.changes import changing, state_tensors
from mona_mm.frozen.copies import alike, is_under, moving_copies
from mona_mm.frozen.count import backbone_path
from mona_mm.hosts import method_names, position_table_names, recomputed_names
from mona_mm.nn.digest import differing, digest, digests, fingerprint, resized, same_names
from mona_mm.nn.wrappers import innermost
from mona_mm.record import freeze_records, make_record, record_of
from mona_mm.registry import METHODS
from mona_mm.version import __version__

# Options of a method that change neither what its weights mean nor, in evaluation, what they do.
_FREE_OPTIONS = ('dropout', 'plan')
_PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


@dataclass(frozen=True)
class LoadedDelta:
    """What :func:`load_delta` did.

    Args:
        file: the delta.
        parts: of the model, that it held, with their numbers of values.
        restored: number of tensors that an earlier delta had changed and this one does not hold: they were put back.
        bytes: of memory that the tensors to put back by the next delta take.
        seconds: that it took, the reading of the file included.
    """

    file: str
    parts: dict[str, int]
    restored: int
    bytes: int
    seconds: float


def save_delta(
    model: nn.Module,
    path: str | Path,
    parts: Sequence[str] | None = None,
    half: bool = False,
    *,
    config: str = '',
    base_file: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset_meta: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write what of ``model`` trains, and what else training changes, to one ``.delta.safetensors`` file.

    In it are, by their names in the model's state dict, the parameters that require a gradient, the method's buffers,
    and the buffers of modules that are not frozen (the statistics of a BatchNorm); of the frozen base only a
    fingerprint. The file appears whole or not at all.

    Args:
        model: a model or a backbone alone.
        path: the file, whose name must end in ``.delta.safetensors``.
        parts: ``['method']`` is what is in the backbone; other parts are children of the model (``'neck'``,
            ``'roi_head'``). None writes all.
        half: round trained values to float16, where they fit into it; statistics stay float32.
        config: the text of the config, for people to read.
        base_file: the whole model that training started from, if it did from one: where the delta is loaded into a
            model without that base, it is looked for there, and beside the delta.
        metrics: of the last evaluation, by name.
        dataset_meta: names (and colours) of the classes.
        progress: see :class:`~mona_mm.hooks.DeltaCheckpointHook`, which can be resumed from.
        state_dict: values to take in place of the model's own (averaged ones).
        allow_nonfinite: write it even if it holds values that are not finite.

    Raises:
        ConfigError: if the name of the file ends otherwise, a part does not exist, or nothing in the model trains.
        CheckpointMismatchError: if a tensor holds values that are not finite; it names it.
    """
    if not str(path).endswith(SUFFIX):
        raise ConfigError(f'{path}: the name of a delta must end in {SUFFIX}; by it the file is recognised.')
    model = innermost(model)
    own = state_tensors(model)
    state = own if state_dict is None else state_dict
    backbone = _backbone_prefix(model)
    names = changing(model)
    present = sorted({part_of(name, backbone) for name in names})
    if not names:
        raise ConfigError(f'Nothing in this {type(model).__name__} trains, so there is no delta of it.')
    if parts is not None:
        wrong = [part for part in parts if part not in present]
        if wrong or not parts:
            raise ConfigError(f'parts={list(parts)}: the parts of this model that train are {", ".join(present)}.')
        names = {name for name in names if part_of(name, backbone) in parts}
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    followed = moving_copies(model) if parts is None else {}
    copies = {copy: of for copy, of in followed.items() if _same_frozen(own, names, copy, of)}
    frozen = _frozen(own, names, None if parts is None else set(parts), backbone, copies)  # of no average
    header = DeltaHeader(
        methods=describe_methods(model),
        backbone=backbone,
        parts=None if parts is None else sorted(parts),
        half=half,
        base=fingerprint(frozen, position_table_names()),
        versions=versions(),
        base_file=_absolute(base_file or ''),
        config=config,
        metrics=dict(metrics or {}),
        dataset_meta=dict(dataset_meta or {}),
        progress=dict(progress or {}),
        shared=_shared({name: tensor for name, tensor in own.items() if name in names}),
        copies=copies,
    )
    tensors = {n: _halved(state[n]) if half and n in trained else state[n] for n in names}
    write_delta(path, header, tensors, allow_nonfinite)


def _absolute(file: str) -> str:
    return osp.abspath(osp.expanduser(file)) if file and '://' not in file else file


def load_delta(
    model: nn.Module, path: str | Path, allow_other_base: bool = False, *, allow_nonfinite: bool = False
) -> LoadedDelta:
    """Put a delta into ``model``, in place; what an earlier one changed and this one does not hold is put back.

    So one process can serve several tasks on one backbone; threads that predict at the same time do so within
    :func:`mona_mm.reading`, for which this waits. Where the model is not on the delta's base yet, that is loaded first:
    the whole model that the run started from (its ``load_from``), if it did and that is still there, or beside the
    delta; else, unless the model has been initialised, what its own ``init_weights`` loads. Where the delta is refused,
    the model is what it was.

    Args:
        model: of the config that the delta was trained with.
        path: a file that :func:`save_delta` wrote.
        allow_other_base: only warn if the frozen base is not the one that the delta was trained on.
        allow_nonfinite: load it even if it holds values that are not finite.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointMismatchError: if it is damaged; or is of another method, width or number of classes, or for another
            base: it says which, and names the first tensors; or holds values that are not finite.
    """
    start = time.perf_counter()
    loaded = apply_delta(model, read_delta(path, allow_nonfinite), allow_other_base, start)
    print_log(
        f'Loaded {path}: {", ".join(f"{count:,} values of {part}" for part, count in loaded.parts.items())}, in '
        f'{loaded.seconds:.2f} s; {loaded.restored} tensors of an earlier delta were put back; '
        f'{loaded.bytes / 2**20:.1f} MiB are kept for the next one.',
        logger='current',
    )
    return loaded


def _exclusively(load: Callable) -> Callable:
    """Whoever loads into a model waits for those that read its weights or load into it, and keeps them waiting."""

    @wraps(load)
    def alone(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with writing(model):
            return load(model, *args, **kwargs)

    return alone


def expect_delta(model: nn.Module, base_file: str | None = None, allow_other_base: bool = False) -> None:
    """Say beforehand how deltas are put into ``model`` that mmengine loads, through which no argument can be passed.

    It is kept in the model's record, which copies of the model (an ``EMAHook``'s) have, too.

    Args:
        model: of whose copies mmengine's Runner will load.
        base_file: the whole model that deltas are put on, whatever they say themselves.
        allow_other_base: see :func:`load_delta`.
    """
    record = make_record(innermost(model))
    record.delta_base, record.allow_other_base = base_file, allow_other_base


@_exclusively
def apply_delta(
    model: nn.Module,
    delta: Delta,
    allow_other_base: bool = False,
    start: float | None = None,
    *,
    base_file: str | None = None,
    loading: frozenset[Path] = frozenset(),
) -> LoadedDelta:
    """:func:`load_delta` of a delta that has been read.

    Args:
        model: see :func:`load_delta`.
        delta: what was read.
        allow_other_base: see :func:`load_delta`.
        start: when reading it began.
        base_file: the whole model that it is put on, whatever it says itself.
        loading: the files of deltas that are being loaded, each on the base that is the next of them.

    Raises:
        CheckpointMismatchError: see :func:`load_delta`.
    """
    start = time.perf_counter() if start is None else start
    model, header = innermost(model), delta.header
    state = state_tensors(model)
    _check_method(model, delta)
    record = make_record(model)
    if base_file and record.base_file != base_file:
        record.base_file = base_file
        _load_whole(model, base_file, allow_other_base, loading)
    delta = replace(delta, tensors=_fitted(model, state, delta.tensors))
    given = {name: tensor for name, tensor in state.items() if name in delta.tensors}
    shared = _shared(given)
    wrong = compare(given, delta.tensors, optional=lambda name: False) or _torn_apart(shared, delta.tensors)
    parts = None if header.parts is None else set(header.parts)
    copies = {copy: of for copy, of in header.copies.items() if _are_alike(model, copy, of)}
    frozen = _frozen(state, set(delta.tensors), parts, header.backbone, copies)
    if not wrong and not same_names(header.base, frozen):
        method, lacking = method_names(model), changing(model) & frozen.keys()
        lacking = sorted(lacking, key=lambda name: (name not in method, name))
        wrong = f'missing: {", ".join(lacking[:3])}.' if lacking else (
            f'the model has {len(frozen)} tensors beside it, and had {header.base["count"]} when it was written, or '
            'other names.'
        )  # fmt: skip
    if wrong:
        raise CheckpointMismatchError(
            f'{delta.file} does not fit this {type(model).__name__}: {wrong} It was written by another config (method, '
            'width, rules of what trains), or for another number of classes.'
        )
    _check_base(model, delta, frozen, allow_other_base, loading)
    # Not an attribute of the module: no state dict has it. Each value is what was there before and the digest of what
    # the delta wrote: where that is no longer so, somebody has loaded or trained since, and theirs stays.
    kept = record.replaced
    with torch.no_grad():
        for name in [name for name, entry in kept.items() if not _is_ours(state.get(name), *entry)]:
            del kept[name]
        restored = [name for name in kept if name not in delta.tensors]
        for name in restored:
            state[name].copy_(kept.pop(name)[0])
        names = [name for name in delta.tensors if name not in shared]
        # All of them before the first is written, since the memory of one may be part of another's.
        before = {
            name: kept[name][0].to(state[name].dtype) if name in kept else state[name].detach().to('cpu', copy=True)
            for name in names
        }
        for name in names:
            state[name].copy_(delta.tensors[name])
        written = digests({name: state[name] for name in names})
        kept.update({name: (before[name], written[name]) for name in names})
        for name, source in _followed(state, delta.tensors, copies).items():
            state[name].copy_(state[source])
    if header.dataset_meta and hasattr(model, 'dataset_meta'):
        model.dataset_meta = dict(header.dataset_meta)
    if header.parts is not None:
        print_log(
            f'{delta.file} holds only {", ".join(header.parts)}: the rest of the model keeps the values that it has.',
            logger='current',
            level=WARNING,
        )
    return LoadedDelta(
        file=delta.file,
        parts=part_sizes(header, delta.tensors),
        restored=len(restored),
        bytes=sum(tensor.nbytes for tensor, _ in kept.values()),
        seconds=time.perf_counter() - start,
    )


def _fitted(model: nn.Module, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a delta holds, as the host resizes it on loading: tables of positions of another image or window size."""
    other = {n: t.to(state[n].dtype) for n, t in tensors.items() if n in state and state[n].shape != t.shape}
    if not other:
        return dict(tensors)
    # Some hosts take for granted that what they compute by themselves is in the file.
    computed = {name: tensor for name, tensor in state.items() if name.endswith(recomputed_names())}
    values = rehearse(model, {**computed, **tensors, **other}).values
    return {name: values.get(name, tensor) if name in other else tensor for name, tensor in tensors.items()}


def _is_ours(tensor: Tensor | None, before: Tensor, written: int) -> bool:
    """Whether a tensor still is what a delta wrote; one of another type has been converted, and is."""
    return tensor is not None and (tensor.dtype != before.dtype or digest(tensor) == written)


def part_sizes(header: DeltaHeader, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of values in a delta by part, the method first; a tensor with several names counts once."""
    sizes: dict[str, int] = {}
    for name in sorted(tensors.keys() - header.shared.keys(), key=lambda name: (header.part(name) != 'method', name)):
        sizes[header.part(name)] = sizes.get(header.part(name), 0) + tensors[name].numel()
    return sizes


def _check_method(model: nn.Module, delta: Delta) -> None:
    here, there = describe_methods(model), delta.header.methods
    # What a file calls a method is compared and never looked up: a registry imports whatever module a name begins with.
    same = {path: each.get('type') for path, each in here.items()} == {p: each.get('type') for p, each in there.items()}
    if same and all(_resolved(each) == _resolved(there[path]) for path, each in here.items()):
        return
    raise CheckpointMismatchError(
        f'{delta.file} is a delta of another method than the model has: {_show(there)} in the file, {_show(here)} in '
        'the model. Load it with the config that it was trained with.'
    )


def _show(methods: Mapping[str, Mapping[str, Any]]) -> str:
    if not methods:
        return 'none'
    shown = []
    for path, each in methods.items():
        options = {**each.get('options', {}), 'trainable': each.get('trainable', [])}
        options = ', '.join(f'{name}={value!r}' for name, value in options.items())
        shown.append(f'{path or "model"}: {each.get("type") or "no method"} ({options})')
    return '; '.join(shown)


def describe_methods(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By path of every module that a PeftBackbone or FrozenModel made: its method, the options and the rules, and what
    type its frozen weights are kept in, if not float32."""
    return {
        path: dict(type=type_, options=options, trainable=list(record.rules), **_frozen_type(module))
        for path, module, record in freeze_records(model)
        for type_, options in [_method_of(module)]
    }


def _method_of(module: nn.Module) -> tuple[str | None, dict[str, Any]]:
    options = dict(record_of(module).config or {})
    return options.pop('type', None), options


def _frozen_type(module: nn.Module) -> dict[str, str]:
    dtype = record_of(module).frozen_dtype
    return dict(frozen_dtype=dtype) if dtype else {}


def _resolved(described: Mapping[str, Any]) -> Any:
    """A description with the method's defaults filled in, so that saying a default and not saying it are the same."""
    type_ = described.get('type')
    method = METHODS.get(type_) if type_ else None
    defaults = {}
    if method is not None:
        parameters = inspect.signature(method).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        if isinstance(getattr(method, 'sites', None), tuple):  # else it is no one module at fixed sites
            defaults['sites'] = sorted(method.sites)
    options = {**defaults, **described.get('options', {})}
    if isinstance(options.get('sites'), list | tuple):
        options['sites'] = sorted(options['sites'], key=str)
    options = {name: _as_json(value) for name, value in options.items() if name not in _FREE_OPTIONS}
    return type_, options, sorted(described.get('trainable', []))


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, list | tuple) else value


def _check_base(
    model: nn.Module, delta: Delta, frozen: Mapping[str, Tensor], allow_other_base: bool, loading: frozenset[Path]
) -> None:
    try:
        wrong = differing(delta.header.base, frozen)
        tables = resized(delta.header.base, frozen)
        if tables:
            print_log(
                f'{len(tables)} tables of positions of the frozen base ({tables[0]} the first) had another size when '
                f'{delta.file} was trained, so nothing can be said of their values: the other tensors are compared.',
                logger='current',
                level=WARNING,
            )
        if not wrong:
            return
        put_back = _snapshot(model)
        wrong = _try_base_file(model, delta, frozen, wrong, loading)  # first: what init_cfg names need not be here then
        try:
            if wrong and _initialise(model, wrong):
                wrong = differing(delta.header.base, frozen)
                if wrong and not delta.header.base_file.endswith(SUFFIX):  # that file may hold less
                    wrong = _try_base_file(model, delta, frozen, wrong, loading)
        except Exception:
            put_back()
            raise
        if not wrong:
            return
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointMismatchError(f'{delta.file}: its fingerprint of the base cannot be read ({error}).') from None
    message = (
        f'{delta.file} was trained on another frozen base than this {type(model).__name__} has: {len(wrong)} of '
        f'{len(frozen)} tensors differ, {", ".join(wrong[:3])} the first.{_other_types(model, delta)}'
    )
    if not allow_other_base:
        put_back()
        named = (
            f'Its run started from {delta.header.base_file}: put that file there, or beside the delta, or load it first'
            if delta.header.base_file
            else 'Load the pretrained weights that it was trained on (the init_cfg of its config)'
        )
        raise CheckpointMismatchError(
            f'{message} {named}, or say that you mean it with --allow-other-base (in Python: allow_other_base=True).'
        )
    print_log(
        f'{message} It is loaded all the same, as asked: expect other, most likely worse predictions than those of '
        'the training run.',
        logger='current',
        level=WARNING,
    )


def _other_types(model: nn.Module, delta: Delta) -> str:
    """What to add where frozen weights were kept in another type when a delta was trained."""
    here, there = (
        {path: each.get('frozen_dtype') for path, each in methods.items()}
        for methods in (describe_methods(model), delta.header.methods)
    )
    said = [
        f' The frozen weights of {path or "the model"} were kept in {there.get(path) or "float32"}, and here are in '
        f'{dtype or "float32"}: frozen_dtype={there.get(path)!r} in its PeftBackbone is what the delta belongs on.'
        for path, dtype in here.items()
        if there.get(path) != dtype
    ]
    return ''.join(said)


def _initialise(model: nn.Module, wrong: Sequence[str]) -> bool:
    """Let the parts of a model with these tensors load their base, if nobody has initialised the model; say whether."""
    if getattr(model, 'is_init', False):
        return False
    if _backbone_prefix(model) and not getattr(model, 'init_cfg', None):
        modules = [model.get_submodule(child) for child in sorted({name.partition('.')[0] for name in wrong})]
    else:
        modules = [model]
    with torch.random.fork_rng(devices=[]):
        for module in modules:
            if hasattr(module, 'init_weights'):
                module.init_weights()
    return True


def _snapshot(model: nn.Module) -> Callable[..., None]:
    """What puts back all that initialising ``model``, or loading into it, changes; or the tensors of these names."""
    tensors = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    initialised = {module: module.is_init for module in model.modules() if isinstance(module, BaseModule)}
    has_meta, meta = 'dataset_meta' in vars(model), vars(model).get('dataset_meta')
    record = make_record(model)
    base, replaced = record.base_file, dict(record.replaced)

    def put_back(names: Collection[str] | None = None) -> None:
        whole = names is None
        names = tensors if whole else names
        with torch.no_grad():
            for name, tensor in state_tensors(model).items():
                if name in names:
                    tensor.copy_(tensors[name])
        record.replaced = {
            **{name: entry for name, entry in record.replaced.items() if name not in names},
            **{name: entry for name, entry in replaced.items() if name in names},
        }
        if not whole:
            return
        for module, is_init in initialised.items():
            module.is_init = is_init
        record.base_file = base
        if has_meta:
            model.dataset_meta = meta
        else:
            vars(model).pop('dataset_meta', None)

    return put_back


def _try_base_file(
    model: nn.Module, delta: Delta, frozen: Mapping[str, Tensor], wrong: Sequence[str], loading: frozenset[Path]
) -> Sequence[str]:
    """Load the whole model that a delta names into ``model``, if it is that; return which frozen tensors then differ.

    From the disk alone: nothing is fetched because a file says so. What is not of the delta's parts stays.
    """
    header, named = delta.header, Path(delta.header.base_file)
    here = Path(delta.file).expanduser()
    # A delta may name one as its base that has its own name, and beside it is then itself.
    loading |= {here.resolve()}
    for file in dict.fromkeys((named, here.parent / named.name)):
        if not header.base_file or not osp.isfile(file) or file.resolve() in loading:
            continue
        put_back = _snapshot(model)
        try:
            _load_whole(model, str(file), allow_other_base=False, loading=loading)
            left = differing(header.base, frozen)
        except UserError:
            left = wrong
        if not left:
            if header.parts is not None:
                put_back({name for name in state_tensors(model) if header.part(name) not in header.parts})
            print_log(f'Loaded {file}, on which {delta.file} was trained.', logger='current')
            return left
        put_back()
    return wrong


def _load_whole(model: nn.Module, file: str, allow_other_base: bool, loading: frozenset[Path]) -> None:
    """Put what of a whole model fits into ``model``, as far as it does: fingerprints are compared afterwards."""
    checkpoint = read_checkpoint(file)
    given = checkpoint.get('state_dict')
    delta = getattr(getattr(given, '_metadata', None), 'delta', None)
    if delta is not None:  # as mona_mm.checkpoint.loading hands them on, from an address, too
        apply_delta(model, delta, allow_other_base, loading=loading)
        return
    state = state_tensors(model)
    with torch.no_grad():
        for name, value in rehearse(model, model_state(checkpoint)).values.items():
            state[name].copy_(value)


def _frozen(
    state: Mapping[str, Tensor], changed: set[str], parts: set[str] | None, backbone: str, copies: Mapping[str, str]
) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in changed
        and not name.endswith(recomputed_names())
        and not is_under(name, copies)
        and (parts is None or part_of(name, backbone) in parts)
    }


def _followed(state: Iterable[str], changed: Collection[str], copies: Mapping[str, str]) -> dict[str, str]:
    """By name of every frozen tensor of a copy, the name of that which it is a copy of."""
    return {
        name: of + name.removeprefix(copy)
        for name in state
        for copy, of in copies.items()
        if name not in changed and is_under(name, [copy])
    }


def _same_frozen(state: Mapping[str, Tensor], changed: set[str], copy: str, of: str) -> bool:
    return all(
        torch.equal(state[name], state[source]) for name, source in _followed(state, changed, {copy: of}).items()
    )


def _are_alike(model: nn.Module, first: str, second: str) -> bool:
    modules = dict(model.named_modules())
    return first in modules and second in modules and alike(modules[first], modules[second])


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The further names of tensors that have several, because modules share parameters: each with the first."""
    first: dict[tuple, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.data_ptr() and first.setdefault(place, name) != name:
            shared[name] = first[place]
    return shared


def _torn_apart(shared: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The first tensor of a model for which a delta has different values under its several names."""
    return next(
        (
            f'{name} and {first} are one tensor here, and there are two.'
            for name, first in shared.items()
            if not torch.equal(tensors[name], tensors[first])
        ),
        '',
    )


def _backbone_prefix(model: nn.Module) -> str:
    path = backbone_path(model)
    return f'{path}.' if path else ''


def _halved(tensor: Tensor) -> Tensor:
    fits = tensor.is_floating_point() and (tensor.abs() <= torch.finfo(torch.float16).max).all()  # of no values, too
    return tensor.half() if fits else tensor


def versions() -> dict[str, str]:
    """The versions of this package and of those that are loaded under it."""
    found = dict(mona_mm=__version__)
    for name in _PACKAGES:
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, '__version__', ''))
    return found
