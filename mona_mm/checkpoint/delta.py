"""Save and load deltas: the tensors that training has changed, in one small file, with a fingerprint of their base."""

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
from mona_mm.checkpoint.described_methods import check_methods, describe_methods
from mona_mm.checkpoint.lock import writing
from mona_mm.checkpoint.pretrained import compare, read_checkpoint
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.errors import CheckpointMismatchError, ConfigError, UserError
from mona_mm.frozen.changes import changing, state_tensors
from mona_mm.frozen.copies import alike, is_under, moving_copies
from mona_mm.frozen.count import backbone_path
from mona_mm.hosts import method_names, position_table_names, recomputed_names
from mona_mm.nn.digest import differing, digest, digests, fingerprint, resized, same_names
from mona_mm.nn.sharded import has_whole, is_sharded, whole
from mona_mm.nn.shared import shared_names
from mona_mm.nn.wrappers import innermost
from mona_mm.record import make_record
from mona_mm.version import __version__

_PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


@dataclass(frozen=True)
class LoadedDelta:
    """The result of :func:`load_delta`.

    Args:
        file: the delta.
        parts: the number of values in the delta for each part of the model.
        restored: the number of tensors that an earlier delta had changed and that were restored, since this one does
            not hold them.
        bytes: the memory for the previous values of the tensors, which the next delta restores.
        seconds: the time that it took, including reading the file.
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
    """Write the tensors of ``model`` that training changes to one ``.delta.safetensors`` file.

    It holds, by their names in the model's state dict, the parameters that require a gradient, the method's buffers,
    and the buffers of modules that are not frozen (such as the statistics of a BatchNorm), and a fingerprint of the
    frozen base. The file is written completely or not at all.

    If the weights are sharded (FSDP), all processes must call it, and the main process writes the file.

    Args:
        model: a model or a backbone alone.
        path: the file, whose name must end in ``.delta.safetensors``.
        parts: the parts to write: ``'method'`` for everything in the backbone, or names of children of the model
            (``'neck'``, ``'roi_head'``). None writes all.
        half: round trained values to float16 where they are in its range; statistics stay in float32.
        config: the text of the config, for people to read.
        base_file: the checkpoint of the whole model from which training started, if it did. When the delta is loaded
            into a model without that base, the file is looked for at this path and beside the delta.
        metrics: the metrics of the last evaluation, by name.
        dataset_meta: the names (and colours) of the classes.
        progress: the state of training, see :class:`~mona_mm.hooks.DeltaCheckpointHook`, from which a run can resume.
        state_dict: values to write in place of the model's own (such as averaged ones).
        allow_nonfinite: write the file even if it holds values that are not finite.

    Raises:
        ConfigError: if the file has another ending, a part does not exist, or nothing in the model trains.
        CheckpointMismatchError: if a tensor holds values that are not finite; the error names it.
    """
    if not str(path).endswith(SUFFIX):
        raise ConfigError(f'{path}: the name of a delta must end in {SUFFIX}, by which the file is recognised.')
    made = make_delta(
        model,
        parts,
        half,
        config=config,
        base_file=base_file,
        metrics=metrics,
        dataset_meta=dataset_meta,
        progress=progress,
        state_dict=state_dict,
    )
    if made is not None:
        write_delta(path, made.header, made.tensors, allow_nonfinite)


def make_delta(
    model: nn.Module,
    parts: Sequence[str] | None = None,
    half: bool = False,
    *,
    config: str = '',
    base_file: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset_meta: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Delta | None:
    """Make the delta that :func:`save_delta` writes, which has the same arguments.

    Returns:
        The delta; None on the processes that do not have the whole of a sharded model.

    Raises:
        ConfigError: if a part does not exist, or nothing in the model trains.
    """
    sharded, keep = is_sharded(model), has_whole(model)
    with whole(model) as inside:
        names = _chosen_names(inside, parts)
        if not keep:
            return None
        current = state_tensors(inside)
        state = current if state_dict is None or sharded else model_state(dict(state_dict=state_dict))
        backbone = _backbone_prefix(inside)
        trained = {name for name, p in inside.named_parameters(remove_duplicate=False) if p.requires_grad}
        followed = moving_copies(inside) if parts is None else {}
        copies = {copy: source for copy, source in followed.items() if _has_same_base(current, names, copy, source)}
        base = _base_tensors(current, names, None if parts is None else set(parts), backbone, copies)  # not averages
        header = DeltaHeader(
            methods=describe_methods(inside),
            backbone=backbone,
            parts=None if parts is None else sorted(parts),
            half=half,
            base=fingerprint(base, position_table_names()),
            versions=versions(),
            base_file=_absolute(base_file or ''),
            config=config,
            metrics=dict(metrics or {}),
            dataset_meta=dict(dataset_meta or {}),
            progress=dict(progress or {}),
            shared=shared_names({name: tensor for name, tensor in current.items() if name in names}),
            copies=copies,
        )
        tensors = {n: _halved(state[n]) if half and n in trained else state[n] for n in names}
        if sharded:  # FSDP frees what it has gathered
            tensors = {name: tensor.to('cpu', copy=True) for name, tensor in tensors.items()}
        return Delta(header, tensors, '')


def _chosen_names(model: nn.Module, parts: Sequence[str] | None) -> set[str]:
    """The names of the tensors of a delta: those that training changes, in these parts.

    Raises:
        ConfigError: if nothing trains, or a part is not among those that train.
    """
    names, backbone = changing(model), _backbone_prefix(model)
    if not names:
        raise ConfigError(f'Nothing in this {type(model).__name__} trains, so it has no delta.')
    if parts is None:
        return names
    present = sorted({part_of(name, backbone) for name in names})
    if not parts or not {*parts} <= {*present}:
        raise ConfigError(f'parts={list(parts)} must be among the parts that train: {", ".join(present)}.')
    return {name for name in names if part_of(name, backbone) in parts}


def _absolute(file: str) -> str:
    return osp.abspath(osp.expanduser(file)) if file and '://' not in file else file


def load_delta(
    model: nn.Module, path: str | Path, allow_other_base: bool = False, *, allow_nonfinite: bool = False
) -> LoadedDelta:
    """Load a delta into ``model``, in place, and restore the tensors that only an earlier delta has changed.

    So one process can serve several tasks with one backbone. Threads that predict at the same time use
    :func:`mona_mm.reading`, for which this function waits. If the model does not have the delta's base yet, the base is
    loaded first: the whole model from which the run started (its ``load_from``), if there is one and the file still
    exists at its path or beside the delta; otherwise, unless the model has been initialised, by its ``init_weights``.
    If the delta is refused, the model is unchanged. If the weights are sharded (FSDP), all processes must call it.

    Args:
        model: a model of the config with which the delta was trained.
        path: a file that :func:`save_delta` has written.
        allow_other_base: only warn if the frozen base is not the one on which the delta was trained.
        allow_nonfinite: load the delta even if it holds values that are not finite.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointMismatchError: if the delta is damaged, belongs to another method, width, number of classes or base
            (the error names the first tensors that differ), or holds values that are not finite.
    """
    start = time.perf_counter()
    with whole(model, write=True):
        loaded = apply_delta(model, read_delta(path, allow_nonfinite), allow_other_base, start)
    print_log(
        f'Loaded {path}: {", ".join(f"{count:,} values of {part}" for part, count in loaded.parts.items())}, in '
        f'{loaded.seconds:.2f} s; {loaded.restored} tensors of an earlier delta were restored; '
        f'{loaded.bytes / 2**20:.1f} MiB are kept to restore them when the next one is loaded.',
        logger='current',
    )
    return loaded


def _exclusively(load: Callable) -> Callable:
    """Decorate a function that loads into a model so that it holds the lock for :func:`writing` to the model."""

    @wraps(load)
    def exclusive(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with writing(model):
            return load(model, *args, **kwargs)

    return exclusive


def expect_delta(model: nn.Module, base_file: str | None = None, allow_other_base: bool = False) -> None:
    """Set the options for deltas that mmengine loads into ``model``, since no argument can be passed through it.

    They are kept in the model's record, which copies of the model (such as an ``EMAHook``'s) have as well.

    Args:
        model: the model into which mmengine's Runner will load deltas.
        base_file: the checkpoint of the whole model to use as base, in place of the one that a delta names.
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
    """Load a delta that has been read; see :func:`load_delta`.

    Args:
        model: see :func:`load_delta`.
        delta: the delta.
        allow_other_base: see :func:`load_delta`.
        start: the time at which reading the delta began; by default now.
        base_file: the checkpoint of the whole model to use as base, in place of the one that the delta names.
        loading: the files of the deltas that are being loaded, each of which has the next one as its base.

    Raises:
        CheckpointMismatchError: see :func:`load_delta`.
    """
    start = time.perf_counter() if start is None else start
    model, header = innermost(model), delta.header
    state = state_tensors(model)
    check_methods(model, delta)
    record = make_record(model)
    if base_file and record.base_file != base_file:
        record.base_file = base_file
        _load_whole(model, base_file, allow_other_base, loading)
    delta = replace(delta, tensors=_resized_tensors(model, state, delta.tensors))
    shared = shared_names({name: tensor for name, tensor in state.items() if name in delta.tensors})
    parts = None if header.parts is None else set(header.parts)
    copies = {copy: source for copy, source in header.copies.items() if _are_alike(model, copy, source)}
    base = _base_tensors(state, set(delta.tensors), parts, header.backbone, copies)
    _check_tensors(model, delta, state, shared, base)
    _check_base(model, delta, base, allow_other_base, loading)
    restored = _write_tensors(record.replaced, state, delta.tensors, shared, copies)
    if header.dataset_meta and hasattr(model, 'dataset_meta'):
        model.dataset_meta = dict(header.dataset_meta)
    if header.parts is not None:
        print_log(
            f'{delta.file} holds only {", ".join(header.parts)}: the other parts of the model keep their values.',
            logger='current',
            level=WARNING,
        )
    return LoadedDelta(
        file=delta.file,
        parts=part_sizes(header, delta.tensors),
        restored=restored,
        bytes=sum(tensor.nbytes for tensor, _ in record.replaced.values()),
        seconds=time.perf_counter() - start,
    )


def _check_tensors(
    model: nn.Module,
    delta: Delta,
    state: Mapping[str, Tensor],
    shared: Mapping[str, str],
    base: Mapping[str, Tensor],
) -> None:
    """Check that the names and shapes of a delta's tensors, and the names of its base, are those of the model."""
    given = {name: tensor for name, tensor in state.items() if name in delta.tensors}
    wrong = compare(given, delta.tensors, optional=lambda name: False) or _differing_shared(shared, delta.tensors)
    if not wrong and not same_names(delta.header.base, base):
        method, lacking = method_names(model), changing(model) & base.keys()
        lacking = sorted(lacking, key=lambda name: (name not in method, name))
        wrong = f'missing: {", ".join(lacking[:3])}.' if lacking else (
            f'its base has {delta.header.base["count"]} tensors, and the model has {len(base)}, or other names.'
        )  # fmt: skip
    if wrong:
        raise CheckpointMismatchError(
            f'{delta.file} does not fit this {type(model).__name__}: {wrong} It was written with another config '
            '(method, width, `trainable` rules) or number of classes.'
        )


def _write_tensors(
    replaced: dict[str, tuple[Tensor, int]],
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    shared: Mapping[str, str],
    copies: Mapping[str, str],
) -> int:
    """Write the tensors of a delta to the model, and return how many tensors of an earlier one were restored.

    ``replaced`` has, by name, the previous value of every tensor that a delta has written, and the digest of the
    written value. Where the model has another value by now, it was loaded or trained since, and is not restored.
    """
    with torch.no_grad():
        for name in [name for name, entry in replaced.items() if not _is_unchanged(state.get(name), *entry)]:
            del replaced[name]
        restored = [name for name in replaced if name not in tensors]
        for name in restored:
            state[name].copy_(replaced.pop(name)[0])
        names = [name for name in tensors if name not in shared]
        # All previous values before the first is written, since tensors may overlap in memory.
        previous = {
            name: replaced[name][0].to(state[name].dtype)
            if name in replaced
            else state[name].detach().to('cpu', copy=True)
            for name in names
        }
        for name in names:
            state[name].copy_(tensors[name])
        written = digests({name: state[name] for name in names})
        replaced.update({name: (previous[name], written[name]) for name in names})
        for name, source in _sources_of_copies(state, tensors, copies).items():
            state[name].copy_(state[source])
    return len(restored)


def _resized_tensors(model: nn.Module, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a delta as the host resizes them on loading, for another image or window size."""
    other = {n: t.to(state[n].dtype) for n, t in tensors.items() if n in state and state[n].shape != t.shape}
    if not other:
        return dict(tensors)
    # Some hosts expect the tensors that they compute themselves in every file.
    computed = {name: tensor for name, tensor in state.items() if name.endswith(recomputed_names())}
    values = rehearse(model, {**computed, **tensors, **other}).values
    return {name: values.get(name, tensor) if name in other else tensor for name, tensor in tensors.items()}


def _is_unchanged(tensor: Tensor | None, previous: Tensor, written: int) -> bool:
    """Whether a tensor still has the value that a delta wrote; one whose dtype was converted since counts as such."""
    return tensor is not None and (tensor.dtype != previous.dtype or digest(tensor) == written)


def part_sizes(header: DeltaHeader, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of values in a delta for each part, the method first. A tensor with several names counts once."""
    sizes: dict[str, int] = {}
    for name in sorted(tensors.keys() - header.shared.keys(), key=lambda name: (header.part(name) != 'method', name)):
        sizes[header.part(name)] = sizes.get(header.part(name), 0) + tensors[name].numel()
    return sizes


def _check_base(
    model: nn.Module, delta: Delta, base: Mapping[str, Tensor], allow_other_base: bool, loading: frozenset[Path]
) -> None:
    """Check that the model has the base of a delta; if it has not, try to load it first."""
    try:
        wrong = differing(delta.header.base, base)
        tables = resized(delta.header.base, base)
        if tables:
            print_log(
                f'{len(tables)} position tables of the frozen base ({tables[0]} is the first) had another size when '
                f'{delta.file} was trained, so their values cannot be compared; all other tensors are.',
                logger='current',
                level=WARNING,
            )
        if not wrong:
            return
        restore = _snapshot(model)
        # First the base file: if it has the base, the file of init_cfg need not exist.
        wrong = _try_base_file(model, delta, base, wrong, loading)
        try:
            if wrong and _initialise(model, wrong):
                wrong = differing(delta.header.base, base)
                if wrong and not delta.header.base_file.endswith(SUFFIX):  # the base file may hold only a part
                    wrong = _try_base_file(model, delta, base, wrong, loading)
        except Exception:
            restore()
            raise
        if not wrong:
            return
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointMismatchError(f'{delta.file}: its fingerprint of the base cannot be read ({error}).') from None
    message = (
        f'{delta.file} was trained on another frozen base than this {type(model).__name__} has: {len(wrong)} of '
        f'{len(base)} tensors differ, first {", ".join(wrong[:3])}.{_describe_other_dtypes(model, delta)}'
    )
    if not allow_other_base:
        restore()
        fix = (
            f'Its run started from {delta.header.base_file}: put that file there, or beside the delta, or load it first'
            if delta.header.base_file
            else 'Load the pretrained weights that it was trained on (the init_cfg of its config)'
        )
        raise CheckpointMismatchError(
            f'{message} {fix}, or load it anyway with --allow-other-base (in Python: allow_other_base=True).'
        )
    print_log(
        f'{message} It is loaded anyway, since another base is allowed: expect other, most likely worse, predictions '
        'than those of the training run.',
        logger='current',
        level=WARNING,
    )


def _describe_other_dtypes(model: nn.Module, delta: Delta) -> str:
    """Sentences for a message about frozen weights that had another dtype when a delta was trained."""
    in_model, in_file = (
        {path: method.get('frozen_dtype') for path, method in methods.items()}
        for methods in (describe_methods(model), delta.header.methods)
    )
    sentences = [
        f' The frozen weights of {path or "the model"} were in {in_file.get(path) or "float32"} and are in '
        f'{dtype or "float32"} here: set frozen_dtype={in_file.get(path)!r} in its PeftBackbone.'
        for path, dtype in in_model.items()
        if in_file.get(path) != dtype
    ]
    return ''.join(sentences)


def _initialise(model: nn.Module, wrong: Sequence[str]) -> bool:
    """Initialise the parts of a model that have these tensors, unless the model has been initialised.

    Returns:
        Whether they were initialised.
    """
    if getattr(model, 'is_init', False):
        return False
    children, parts = dict(model.named_children()), sorted({name.partition('.')[0] for name in wrong})
    # A parameter of the model itself, such as the level embedding of a DINO, is initialised with the whole of it.
    in_parts = _backbone_prefix(model) and not getattr(model, 'init_cfg', None) and children.keys() >= set(parts)
    modules = [children[part] for part in parts] if in_parts else [model]
    with torch.random.fork_rng(devices=[]):
        for module in modules:
            if hasattr(module, 'init_weights'):
                module.init_weights()
    return True


def _snapshot(model: nn.Module) -> Callable[..., None]:
    """Make a function that restores everything that initialising ``model`` or loading into it changes.

    The function may be called with the names of tensors, and then restores only those.
    """
    tensors = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    initialised = {module: module.is_init for module in model.modules() if isinstance(module, BaseModule)}
    has_meta, meta = 'dataset_meta' in vars(model), vars(model).get('dataset_meta')
    record = make_record(model)
    base, replaced = record.base_file, dict(record.replaced)

    def restore(names: Collection[str] | None = None) -> None:
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

    return restore


def _try_base_file(
    model: nn.Module, delta: Delta, base: Mapping[str, Tensor], wrong: Sequence[str], loading: frozenset[Path]
) -> Sequence[str]:
    """Load the base file that a delta names into ``model``, and return the base tensors that then differ.

    If any differ, the model is restored. Only local files are tried, so that no file can trigger a download. Parts of
    the model that are not in the delta keep their values.
    """
    header, base_file = delta.header, Path(delta.header.base_file)
    delta_file = Path(delta.file).expanduser()
    # The base may be a delta of the same file name; the file of that name beside this delta is then the delta itself.
    loading |= {delta_file.resolve()}
    for file in dict.fromkeys((base_file, delta_file.parent / base_file.name)):
        if not header.base_file or not osp.isfile(file) or file.resolve() in loading:
            continue
        restore = _snapshot(model)
        try:
            _load_whole(model, str(file), allow_other_base=False, loading=loading)
            still_wrong = differing(header.base, base)
        except UserError:
            still_wrong = wrong
        if not still_wrong:
            if header.parts is not None:
                restore({name for name in state_tensors(model) if header.part(name) not in header.parts})
            print_log(f'Loaded {file}, on which {delta.file} was trained.', logger='current')
            return still_wrong
        restore()
    return wrong


def _load_whole(model: nn.Module, file: str, allow_other_base: bool, loading: frozenset[Path]) -> None:
    """Load all tensors of a checkpoint that fit into ``model``. The caller compares fingerprints afterwards."""
    checkpoint = read_checkpoint(file)
    given = checkpoint.get('state_dict')
    delta = getattr(getattr(given, '_metadata', None), 'delta', None)
    if delta is not None:  # mona_mm.checkpoint.loading passes deltas on in this form
        apply_delta(model, delta, allow_other_base, loading=loading)
        return
    state = state_tensors(model)
    with torch.no_grad():
        for name, value in rehearse(model, model_state(checkpoint)).values.items():
            state[name].copy_(value)


def _base_tensors(
    state: Mapping[str, Tensor], changed: set[str], parts: set[str] | None, backbone: str, copies: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a delta's base: those of its parts that training does not change, without copies of others."""
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in changed
        and not name.endswith(recomputed_names())
        and not is_under(name, copies)
        and (parts is None or part_of(name, backbone) in parts)
    }


def _sources_of_copies(state: Iterable[str], changed: Collection[str], copies: Mapping[str, str]) -> dict[str, str]:
    """For every frozen tensor of a copy, by name, the name of the tensor in the part that the copy follows."""
    return {
        name: source + name.removeprefix(copy)
        for name in state
        for copy, source in copies.items()
        if name not in changed and is_under(name, [copy])
    }


def _has_same_base(state: Mapping[str, Tensor], changed: set[str], copy: str, source: str) -> bool:
    """Whether the frozen tensors of a copy equal those of the part that it follows."""
    names = _sources_of_copies(state, changed, {copy: source})
    return all(torch.equal(state[name], state[followed]) for name, followed in names.items())


def _are_alike(model: nn.Module, first: str, second: str) -> bool:
    modules = dict(model.named_modules())
    return first in modules and second in modules and alike(modules[first], modules[second])


def _differing_shared(shared: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Describe the first shared tensor of a model for which a delta has different values under its names."""
    return next(
        (
            f'{name} and {first} are one tensor in the model and differ in the delta.'
            for name, first in shared.items()
            if not torch.equal(tensors[name], tensors[first])
        ),
        '',
    )


def _backbone_prefix(model: nn.Module) -> str:
    path = backbone_path(model)
    return f'{path}.' if path else ''


def _halved(tensor: Tensor) -> Tensor:
    is_in_range = tensor.is_floating_point() and (tensor.abs() <= torch.finfo(torch.float16).max).all()
    return tensor.half() if is_in_range else tensor


def versions() -> dict[str, str]:
    """The versions of this package and of the loaded packages among torch and the OpenMMLab libraries."""
    found = dict(mona_mm=__version__)
    for name in _PACKAGES:
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, '__version__', ''))
    return found
