"""Write the page of a run at every evaluation."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import wraps
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner

from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.compat.runner import loaded_file, resumes
from mona_mm.frozen.count import count_trainable
from mona_mm.nn.wrappers import innermost
from mona_mm.options import Count, checked
from mona_mm.registry import HOOKS
from mona_mm.report import Evaluation, Evaluator, RunState, evaluator_for, write_run
from mona_mm.report.memory import peak_memory
from mona_mm.report.run import Row, main_metric, read_results

_POINTS = 300
"""The largest number of points of a line; of more, means over equally long parts are drawn."""


def _never_fatal(method: Callable[..., None]) -> Callable[..., None]:
    """Make what goes wrong in a method of the hook a warning, after which the hook does nothing any more."""

    @wraps(method)
    def call(self: 'RunReportHook', *args: Any, **kwargs: Any) -> None:
        if self.broken or not self.is_main:
            return
        begin = time.perf_counter()
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # the page must not stop a run of hours
            self.broken = True
            text = f'The page of the run is no longer written: {type(error).__name__}: {error}'
            print_log(text.splitlines()[0], logger='current', level=WARNING)
        self.own_seconds += time.perf_counter() - begin

    return call


@HOOKS.register_module()
class RunReportHook(Hook):
    """Write ``report.html`` and ``results.csv`` to the work dir at every evaluation and when training ends.

    The page needs no other file and no network: curves, metrics, the scores of each class, confusion, precision and
    recall, the best threshold, images with predictions beside the truth, what trains, time, memory and the command.
    What the model predicted is taken from the validation loop of the main process, which with several processes has its
    share of the images. A test writes ``test_report.html`` and ``test_results.csv``.

    What goes wrong here never stops a run: a warning says so, and the page is no longer written.

    Args:
        images: the largest number of images of an evaluation to look at; of more, every n-th one is.
    """

    priority = 'LOWEST'  # after the hooks that write checkpoints and deltas, whose sizes are on the page

    @checked
    def __init__(self, images: Count = 5000) -> None:
        self.images = images
        self.broken = False
        self.is_main = True
        self.own_seconds = 0.0
        self._rows: list[Row] = []
        self._evaluator: Evaluator | None = None
        self._evaluation: Evaluation | None = None
        self._trains = ''
        self._begin: float | None = None  # when training began, in seconds
        self._first = 0  # the iteration at which it began
        self._before = 0.0  # the seconds of the run that is resumed

    def before_run(self, runner: Runner) -> None:
        """Learn whether this is the main process, the only one that writes."""
        self.is_main = runner.rank == 0

    @_never_fatal
    def before_train(self, runner: Runner) -> None:
        """Take over the evaluations of the run that is resumed."""
        self._begin = time.perf_counter()
        self._first = runner.iter
        self._rows = read_results(Path(runner.work_dir, 'results.csv'), runner.iter) if resumes(runner) else []
        self._before = max((row.get('seconds') or 0 for row in self._rows), default=0)
        self._trains = count_trainable(innermost(runner.model)).table()

    @_never_fatal
    def before_val_epoch(self, runner: Runner) -> None:
        """Forget what the last evaluation has seen."""
        self._evaluator = None

    before_test_epoch = before_val_epoch

    @_never_fatal
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        """Take the predictions of a batch of the validation."""
        self._take(runner.val_dataloader, outputs)

    @_never_fatal
    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        """Take the predictions of a batch of the test."""
        self._take(runner.test_dataloader, outputs)

    def _take(self, dataloader: Any, outputs: Any) -> None:
        if not isinstance(outputs, list | tuple) or not outputs or not hasattr(outputs[0], 'metainfo'):
            return
        if self._evaluator is None:
            dataset = dataloader.dataset
            classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
            count = -(-len(dataset) // get_world_size())
            self._evaluator = evaluator_for(outputs[0], _names(classes, outputs[0]), dataset, count, self.images)
        if self._evaluator is not None:
            self._evaluator.add(outputs)

    @_never_fatal
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the page with the metrics of this evaluation."""
        seconds = None if self._begin is None else round(self._before + time.perf_counter() - self._begin, 1)
        step = dict(iteration=runner.iter, epoch=runner.epoch, seconds=seconds)
        self._write(runner, metrics, {name: value for name, value in step.items() if value is not None})

    @_never_fatal
    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the page of the test."""
        self._rows = []
        self._write(runner, metrics, {}, 'test_')

    @_never_fatal
    def after_train(self, runner: Runner) -> None:
        """Write the page for the last time, with the whole time of training."""
        self._write(runner, None, None, ended=True)
        print_log(f'The page of this run: {Path(runner.work_dir, "report.html")}', logger='current')

    def _write(
        self, runner: Runner, metrics: Mapping[str, Any] | None, step: Row | None, prefix: str = '', ended: bool = False
    ) -> None:
        """Write the page.

        Args:
            runner: the runner.
            metrics: the metrics of the evaluation that has ended.
            step: the step of this evaluation; None if there was none.
            prefix: what the names of the files begin with.
            ended: whether training has ended.
        """
        if step is not None:
            self._evaluation = None if self._evaluator is None else self._evaluator.summary()
            self._evaluator = None
            numbers = {name: float(value) for name, value in (metrics or {}).items() if _is_number(value)}
            classes = {} if self._evaluation is None else self._evaluation.by_class
            own = {f'class/{name}/{self._evaluation.score}': round(value, 5) for name, value in classes.items()}
            now = datetime.now().isoformat(timespec='seconds')
            own = {name: value for name, value in own.items() if value == value}
            self._rows = [row for row in self._rows if row.get('iteration') != step.get('iteration')]
            self._rows.append({**step, 'time': now, **numbers, **own})
        state = RunState(
            title=_title(runner, prefix),
            status=self._status(runner, prefix, ended),
            command=shlex.join(['python', *sys.argv]),
            facts=self._facts(runner, ended),
            evaluations=self._rows,
            evaluation=self._evaluation,
            trains='' if prefix else self._trains,
        )
        if not prefix:
            state.losses, state.rates = _curves(runner)
        write_run(state, Path(runner.work_dir), prefix)

    def _status(self, runner: Runner, prefix: str, ended: bool) -> str:
        if prefix:
            return f'Tested: {loaded_file(runner) or "the model as it was built"}.'
        text = f'Iteration {runner.iter:,} of {runner.max_iters:,}'
        if runner.max_epochs and runner.max_epochs > 1:
            text += f', epoch {runner.epoch:,} of {runner.max_epochs:,}'
        text += '. Training has ended.' if ended else '.'
        name = main_metric(name for row in self._rows for name in row)
        scores = [(row[name], row) for row in self._rows if _is_number(row.get(name))] if name else []
        if scores:
            best, row = max(scores, key=lambda pair: pair[0])
            text += f' Best {name}: {best:.4g}, at iteration {row["iteration"]:,}.'
        return text

    def _facts(self, runner: Runner, ended: bool) -> dict[str, str]:
        facts = {'folder of the command': str(Path.cwd()), 'work dir': str(Path(runner.work_dir).resolve())}
        if self._begin is not None:
            seconds = time.perf_counter() - self._begin
            done = runner.iter - self._first
            facts['time of training'] = _duration(self._before + seconds)
            if done:
                left = (runner.max_iters - runner.iter) * seconds / done
                facts['time of an iteration'] = f'{seconds / done:.3g} s with evaluation'
                if not ended:
                    facts['time to go'] = _duration(left)
        facts |= peak_memory()
        facts |= _files(runner)
        facts['this page'] = f'took {self.own_seconds:.1f} s of the run so far'
        threads = torch.get_num_threads()
        cpu = f'CPU, {threads} thread{"s" if threads > 1 else ""}'
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
        facts['device'] = f'{get_world_size()} x {device}' if get_world_size() > 1 else device
        facts['versions'] = ', '.join(
            f'{name} {sys.modules[name].__version__}'
            for name in ('mona_mm', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
            if hasattr(sys.modules.get(name), '__version__')
        )
        facts['written'] = datetime.now().isoformat(sep=' ', timespec='seconds')
        return facts


def _title(runner: Runner, prefix: str) -> str:
    name = Path(runner.cfg.filename).stem if runner.cfg.filename else Path(runner.work_dir).name
    return f'{name}, test' if prefix else name


def _names(classes: Sequence[str] | None, sample: Any) -> Sequence[str]:
    """The names of the classes; numbers if the data set has none and the sample shows how many there are."""
    if classes:
        return classes
    if 'seg_logits' in sample:
        return [str(i) for i in range(max(2, len(sample.seg_logits.data)))]
    return []


def _curves(runner: Runner) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The losses and the learning rates by iteration."""
    losses, rates = {}, {}
    for name, buffer in runner.message_hub.log_scalars.items():
        short = name.removeprefix('train/')
        if short == name:
            continue
        kind = losses if 'loss' in short else rates if short == 'lr' or short.endswith('.lr') else None
        if kind is not None:
            kind[short] = _binned(np.asarray(buffer.data[0], float), runner.iter)
    return losses, rates


def _binned(values: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of consecutive iterations, of which ``last`` is the number of the last one, as at most 300 points."""
    x = np.arange(last - len(values) + 1, last + 1)
    parts = min(len(values), _POINTS)
    if not parts:
        return x, values
    return tuple(np.array([part.mean() for part in np.array_split(line, parts)]) for line in (x, values))


def _files(runner: Runner) -> dict[str, str]:
    """The sizes of the last delta and the last whole checkpoint."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    folder = Path(getattr(hook, 'out_dir', None) or runner.work_dir)
    found = {}
    for name, suffix in (('delta', SUFFIX), ('whole checkpoint', '.pth')):
        files = sorted(folder.glob(f'*{suffix}'), key=lambda file: file.stat().st_mtime)
        if files and isinstance(getattr(runner, 'train_loop', None), BaseLoop):
            found[name] = f'{files[-1].stat().st_size / 1e6:,.1f} MB ({files[-1].name})'
    return found


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
