"""Try a training: build everything, make a few steps, and say what a run needs in memory and time."""

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mona_mm.commands.cli import build_runner, close_log_file, use_temporary
from mona_mm.frozen.count import backbone_path, count_trainable
from mona_mm.nn.wrappers import innermost
from mona_mm.report.memory import forget_peak, peak_of_process, peak_since, resident
from mona_mm.spt_plans.plans import make_plan

_STAGES = ('stages', 'layers', 'blocks')
"""The names of the lists in which backbones keep their stages."""

_STEPS = 3  # the first of which is not timed


class _Enough(Exception):
    """Ends the loop of a dry run."""


class DryRunHook(Hook):
    """Look at the first step of a training, time the next ones, and end it."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.activations: dict[str, int] = {}
        self.batch = ''
        self.before: int | None = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to count what the first step keeps for its backward pass."""
        if not self.seconds:
            self.batch = _shapes(data_batch)
            self.before = resident()
            forget_peak()
            self._recording = _recorded(innermost(runner.model), self.activations)
            self._recording.__enter__()
        self._begin = time.perf_counter()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Count and time; end after the last step."""
        if not self.seconds:
            self._recording.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        if len(self.seconds) == _STEPS:
            raise _Enough


def dry_run(cfg: Config, delta_base: str | None = None, allow_other_base: bool = False) -> str:
    """Try the training of a config; nothing of it stays on the disk.

    Args:
        cfg: the config, which is changed.
        delta_base: see :func:`mona_mm.commands.cli.build_runner`.
        allow_other_base: see there.

    Returns:
        What was found, as lines of text.
    """
    hook = DryRunHook()
    return _text(try_steps(cfg, hook, delta_base, allow_other_base), hook)


def try_steps(
    cfg: Config, hook: DryRunHook | None = None, delta_base: str | None = None, allow_other_base: bool = False
) -> Runner:
    """Train a few steps of a config, which is changed; nothing of it stays on the disk.

    Returns:
        The runner that has made them.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        use_temporary(cfg, folder)
        make_plan(cfg)
        runner = build_runner(cfg, delta_base, allow_other_base)
        runner.register_hook(hook or DryRunHook(), 'LOWEST')
        with suppress(_Enough):
            runner.train()
        close_log_file(runner)
    return runner


def _text(runner: Runner, hook: DryRunHook) -> str:
    model = innermost(runner.model)
    loader = runner.train_dataloader
    lines = [
        'Dry run: nothing is written.',
        f'model: {type(model).__name__}, {count_trainable(model).trainable:,} parameters train',
        f'data: {len(loader.dataset):,} training images, {len(loader):,} batches; a batch: {hook.batch}',
        'memory:',
    ]
    parts = {
        'weights': _bytes([*model.parameters(), *model.buffers()]),
        'gradients': _bytes([p for p in model.parameters() if p.requires_grad]),
        'moments of the optimizer': _moments(runner),
        **{f'activations, {name}': size for name, size in hook.activations.items()},
    }
    lines += [f'  {size / 2**20:9,.1f} MiB  {name}' for name, size in parts.items() if size]
    known, largest = sum(parts.values()), _largest(hook, parts['weights'])
    if largest is None:
        lines.append(f'  {known / 2**20:9,.1f} MiB  in all')
    else:
        rest = max(0, largest - known)
        lines.append(f'  {rest / 2**20:9,.1f} MiB  what operators need for a moment, and the allocator keeps')
        lines.append(f'  {largest / 2**20:9,.1f} MiB  in all, as measured in these steps')
    lines.append(f'  {peak_of_process() / 2**20:9,.1f} MiB  of the process at most, with Python and its libraries')
    steps, step = runner.max_iters, sum(hook.seconds[1:]) / max(len(hook.seconds) - 1, 1)
    if len(hook.seconds) > 1:
        lines.append(
            f'time: {step:.3g} s a step, {steps:,} steps: {timedelta(seconds=round(step * steps))} without loading of '
            'images and evaluation'
        )
    return '\n'.join(lines)


def _largest(hook: DryRunHook, weights: int) -> int | None:
    """The largest memory of the steps in bytes, weights included; None on systems that do not say it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = peak_since()
    return None if peak is None or hook.before is None else peak - hook.before + weights


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _moments(runner: Runner) -> int:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    states = [state for each in wrappers for state in each.optimizer.state.values()]
    return _bytes([value for state in states for value in state.values() if isinstance(value, Tensor)])


@contextmanager
def _recorded(model: nn.Module, found: dict[str, int]) -> Iterator[None]:
    """Add up the bytes that the forward passes within keep for the backward pass, by the part of the model.

    A storage counts once, for the part that keeps it first; parameters and buffers do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    running: list[str] = ['the rest']

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found[running[-1]] = found.get(running[-1], 0) + storage.nbytes()
        return tensor

    contexts: list[saved_tensors_hooks] = []

    def begin(*_: Any) -> None:
        contexts.append(saved_tensors_hooks(pack, lambda tensor: tensor))
        contexts[-1].__enter__()

    def end(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    for name, part in _parts(model):
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(part.register_forward_hook(lambda *_: [running.pop(), None][1]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module within a model, with the child of the model, or the stage of its backbone, that it belongs to.

    Every module, since a detector calls the modules of its heads and not the heads themselves.
    """
    stage = re.compile(rf'{re.escape(backbone_path(model))}\.?(?:{"|".join(_STAGES)})\.\d+')
    for path, module in model.named_modules():
        if path:
            found = stage.match(path)
            yield found[0] if found else path.partition('.')[0], module


def _shapes(batch: Any) -> str:
    inputs = batch.get('inputs') if isinstance(batch, dict) else None
    tensors = [inputs] if isinstance(inputs, Tensor) else inputs if isinstance(inputs, list | tuple) else []
    shapes = [str(tuple(t.shape)) for t in tensors if isinstance(t, Tensor)]
    return f'{len(shapes)} images of {", ".join(dict.fromkeys(shapes))}' if shapes else type(batch).__name__
