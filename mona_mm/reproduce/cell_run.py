"""Run one cell in a process of its own: ``python -m mona_mm.reproduce.cell_run FOLDER train|test PARENT``.

The folder holds ``config.py``. The measurements are written to ``train.json`` or ``test.json`` in it, and the message
of an error that ends the cell to ``train.error`` or ``test.error``. Training that was stopped resumes from its last
checkpoint.
"""

import fcntl
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from datetime import datetime, timezone
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, find_last_checkpoint, load_config
from mona_mm.data_check.check import check_data
from mona_mm.errors import UserError
from mona_mm.frozen.count import count_trainable
from mona_mm.hooks.preemption import SIGNALS, shield_workers
from mona_mm.nn import choice
from mona_mm.report.memory import peak_of_process
from mona_mm.report.processor import processor_name
from mona_mm.reproduce.class_scores import measure_classes, split_classes
from mona_mm.reproduce.comparison import STOPPED
from mona_mm.spt_plans.plans import make_plan, require_plan

_LOSS_EVERY = 10  # the number of iterations whose mean loss is recorded as one value


class CellHook(Hook):
    """A hook that measures training, keeps the measurements in the checkpoints, and ends training at one on request.

    Args:
        parent: the process id of the queue. Training ends when the queue is gone, since nothing waits for the result.
    """

    priority = 'VERY_HIGH'  # so that a checkpoint holds the measurements of the iteration after which it is written

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.stopping = False
        self.losses: list[list[float]] = []
        self.scores: dict[str, dict[str, float]] = {}
        self.classes: dict[str, float] = {}
        self.before = dict(wall=0.0, processor=0.0, training=0.0)  # seconds in earlier processes
        self.memory = 0
        self._begin = time.monotonic()
        self._recent: list[float] = []
        self._training = 0.0
        self._has_just_saved = False

    def seconds(self) -> dict[str, float]:
        """The wall time, processor time and processor time of the iterations so far, over all processes."""
        now = dict(wall=time.monotonic() - self._begin, processor=time.process_time(), training=self._training)
        return {name: self.before[name] + value for name, value in now.items()}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start timing, or exit if the cell was told to stop and the last iteration has written a checkpoint."""
        if os.getppid() != self.parent or (self.stopping and self._has_just_saved):
            sys.exit(STOPPED)
        self._has_just_saved = False
        self._iteration = time.process_time()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the loss and the processor time of the iteration.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        self._training += time.process_time() - self._iteration
        loss = float(outputs['loss'].detach())
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss is {loss} at iteration {runner.iter + 1}')
        self._recent.append(loss)
        if len(self._recent) == _LOSS_EVERY:
            self.losses.append([runner.iter + 1, round(sum(self._recent) / _LOSS_EVERY, 5)])
            self._recent.clear()
        if runner.iter + 1 == runner.max_iters:  # before the evaluation, which may use larger batches
            self.memory = max(self.memory, peak_memory())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the measurements to the checkpoint."""
        self._has_just_saved = True
        self.memory = max(self.memory, peak_memory())
        kept = dict(seconds=self.seconds(), losses=self.losses, recent=self._recent, memory=self.memory)
        checkpoint['cell'] = json.dumps(kept)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restore the measurements of earlier processes from the checkpoint."""
        if 'cell' in checkpoint:
            kept = json.loads(checkpoint['cell'])
            self.before, self.losses, self._recent = kept['seconds'], kept['losses'], kept['recent']
            self.memory = kept['memory']

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Record the validation scores."""
        self.scores[str(runner.iter)] = {name: float(value) for name, value in metrics.items()}

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Record the test scores, and those of each class."""
        whole, self.classes = split_classes(metrics, runner.test_loop.dataloader.dataset.metainfo['classes'])
        self.scores['test'] = {name: float(value) for name, value in whole.items()}


def peak_memory() -> int:
    """The peak memory in bytes: that of the GPU if there is one, else that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_of_process()


def machine() -> dict[str, Any]:
    """The processor, GPU, number of threads and versions with which a cell is run."""
    return dict(
        processor=processor_name(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def train(folder: Path, hook: CellHook) -> dict[str, Any]:
    """Train a cell, resuming from its last checkpoint if there is one, and score it on the validation images."""
    cfg = _config(folder)
    check_data(cfg, ('train', 'val'))
    last = find_last_checkpoint(cfg.work_dir)
    if last:
        cfg.load_from, cfg.resume = last, True
    make_plan(cfg)
    runner = build_runner(cfg)
    runner.register_hook(hook)
    runner.train()
    if not hook.scores:  # training was stopped between its last iteration and the evaluation
        runner.val_loop.run()
    count = count_trainable(runner.model)
    file = _keep_what_was_trained(folder, Path(find_last_checkpoint(cfg.work_dir)))
    return dict(
        scores=hook.scores,
        losses=hook.losses,
        trained_parameters=count.trainable,
        trained_in_backbone=count.backbone_trainable,
        backbone_share=count.backbone_trainable / count.backbone_base_total,
        seconds=_rounded(hook.seconds()),
        peak_memory=hook.memory,
        delta_bytes=file.stat().st_size,
    )


def test(folder: Path, hook: CellHook) -> dict[str, Any]:
    """Score the trained weights of a cell on the test images, and keep the predictions of a detector."""
    cfg = _config(folder)
    check_data(cfg, ('test',))
    require_plan(cfg, (cfg.work_dir,))
    cfg.load_from, cfg.resume = str(_trained(folder)), False
    runner = build_runner(cfg)
    runner.register_hook(hook)
    measure_classes(runner.test_loop.evaluator.metrics, folder / 'predictions')
    runner.test()
    return dict(scores=hook.scores, classes=hook.classes, seconds=_rounded(hook.seconds()))


def _config(folder: Path) -> Config:
    cfg = load_config(str(folder / 'config.py'))
    cfg.work_dir, cfg.launcher = str(folder / 'run'), 'none'
    adapt_to_device(cfg)
    return cfg


def _keep_what_was_trained(folder: Path, checkpoint: Path) -> Path:
    """Copy the delta, or if there is none since the whole model trains, the weights; return the path."""
    delta = checkpoint.with_suffix(SUFFIX)
    if delta.is_file():
        kept = Path(shutil.copyfile(delta, folder / f'trained{SUFFIX}'))
    else:
        kept = folder / 'trained.pth'
        content = torch.load(checkpoint, map_location='cpu', weights_only=False)  # trusted, since this run wrote it
        torch.save(dict(state_dict=content['state_dict'], meta=content['meta']), kept)
    return kept


def _trained(folder: Path) -> Path:
    return next(folder.glob('trained.*'))


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def main() -> None:
    folder, step, parent = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    hook = CellHook(parent)

    def stop(*_: Any) -> None:
        hook.stopping = True

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    register_after_fork(hook, lambda _: shield_workers(before))
    choice.measure(False)  # so that a cell has the same bits whatever runs beside it
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process whose queue is gone to exit
        error = folder / f'{step}.error'
        error.unlink(missing_ok=True)
        try:
            result = dict(train=train, test=test)[step](folder, hook)
        except Exception as problem:
            traceback.print_exc()
            text = str(problem) if isinstance(problem, UserError) else f'{type(problem).__name__}: {problem}'
            AtomicLocalBackend().put_text(text, error)
            sys.exit(1)
        result |= dict(machine=machine(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
        AtomicLocalBackend().put_text(json.dumps(result), folder / f'{step}.json')
        for checkpoint in (folder / 'run').glob('*.pth'):  # the trained weights have been copied already
            checkpoint.unlink()


if __name__ == '__main__':
    main()
