"""End a run on SIGTERM or SIGINT with a checkpoint, and keep the signals from the processes that load data."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.util import register_after_fork
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.compat.safe_globals import portable_names
from mona_mm.hooks.delta_checkpoint import DeltaCheckpointHook
from mona_mm.hooks.stop_messages import checkpoint_hook, how_to_go_on
from mona_mm.options import checked
from mona_mm.registry import HOOKS

SIGNALS = (signal.SIGTERM, signal.SIGINT)
NAME = 'interrupted'
"""The name of the checkpoint that is written outside of the usual intervals, without its ending."""

_POOLS = ('multiprocessing.pool', 'concurrent.futures.process')
"""The modules of the functions that the workers of a pool run."""

_ECHO = 2.0
"""Seconds in which further signals count as the same one: a terminal signals every process of its group, and the
launcher then passes the signal on to the same processes."""


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM or SIGINT, save after the running iteration, say how to go on, and exit with 128 + the signal.

    The handler only notes the signal. At the end of the iteration, or of the last part of an accumulated gradient,
    ``interrupted.pth`` and its delta are written, unless the checkpoint hook has just written one, and
    ``last_checkpoint`` names it, so that ``--resume`` goes on right there
    (:class:`~mona_mm.hooks.ResumptionHook` skips the part of the epoch that has been trained). The file is deleted when
    the next usual checkpoint has been written. A second signal ends the process at once.

    Several processes agree on the signal after every iteration by one reduction of a single number on their CPUs, so
    that all of them save at the same iteration, whichever of them was signalled. One process does not wait for the end
    of a validation, unless averaged weights are being validated that no checkpoint holds yet. The processes that load
    data, and those of pools, ignore both signals, but not their parent's.

    Raises:
        SystemExit: with 128 + the number of the signal, when everything is saved.
    """

    priority = 'LOWEST'  # after all others have seen the iteration; registered last, it comes behind the delta's hook

    @checked
    def __init__(self) -> None:
        self._signal = 0  # the first one that this process has received; only the handler sets it
        self._common = 0  # the one that all processes act on
        self._first = 0.0
        self._owner = os.getpid()
        self._handlers: dict[int, Any] = {}
        self._group: Any = None
        self._saved_at: int | None = None
        self.last_good: str | None = None  # the last checkpoint that was written completely
        register_after_fork(self, _shield)  # here, since an iteration-based loop starts its workers when it is built

    def before_train(self, runner: Runner) -> None:
        """Install the handlers. Before this, the signals do what they do by default, since nothing has been trained."""
        self.last_good = getattr(checkpoint_hook(runner), 'last_ckpt', None)
        if get_world_size() > 1 and self._group is None:
            self._group = _cpu_group()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number not in self._handlers:
                    self._handlers[number] = signal.signal(number, self._note)

    def after_train(self, runner: Runner) -> None:
        """Restore the handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. Nothing is printed by Python's files here, which may be in use."""
        if os.getpid() != self._owner:
            return
        if self._signal and time.monotonic() - self._first > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._owner, number)
        elif not self._signal:
            self._signal, self._first = number, time.monotonic()
            if get_rank() == 0:
                text = f'{signal.Signals(number).name}: saving after this iteration; a second signal ends at once.\n'
                os.write(2, text.encode())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Save and leave if a signal came. At the end of an epoch this is left to :meth:`after_train_epoch`."""
        self._forget_outdated(runner, runner.iter + 1)
        wrapper = runner.optim_wrapper
        accumulating = hasattr(wrapper, 'should_update') and not wrapper.should_update()
        ends_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop) and self.end_of_epoch(
            runner.train_dataloader, batch_idx
        )
        if self._agreed() and not accumulating and not ends_epoch:
            self._leave(runner, batch_idx, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save and leave if a signal came in the last iteration of an epoch."""
        self._forget_outdated(runner, runner.iter)
        if not isinstance(runner.train_loop, IterBasedTrainLoop) and self._agreed():
            self._leave(runner, None, epoch=runner.epoch + 1, iteration=runner.iter)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Leave a validation during training, in one process, if a checkpoint holds everything or can be written.

        Several processes may have different numbers of batches here, so they agree only behind the validation.
        """
        if not self._handlers or get_world_size() > 1 or not self._agreed():
            return
        averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)  # which has put its weights in the model
        if self._saved_at == runner.iter or not averaged:
            self._leave(runner, None, epoch=runner.epoch, iteration=runner.iter, within='validation, which is lost')

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """Leave after a validation that could not be left before."""
        if self._handlers and self._agreed():
            self._leave(runner, None, epoch=runner.epoch, iteration=runner.iter)

    def _agreed(self) -> bool:
        """Whether any process was signalled; every process then knows the signal."""
        self._common = self._signal
        if get_world_size() > 1:
            number = torch.tensor(self._signal)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
            self._common = int(number)  # a signal that has come meanwhile is seen the next time
        return bool(self._common)

    def _forget_outdated(self, runner: Runner, iteration: int) -> None:
        """Note the checkpoint that has just been written, and delete an earlier one of this hook."""
        hook = checkpoint_hook(runner)
        written = getattr(hook, 'last_ckpt', None)
        if written is None or written == self.last_good:
            return
        self.last_good, self._saved_at = written, iteration
        if is_main_process() and Path(written).stem != NAME:
            for name in (f'{NAME}.pth', f'{NAME}{SUFFIX}'):
                path = Path(hook.out_dir, name)
                if path.is_dir():  # of sharded weights
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _leave(self, runner: Runner, batch_idx: int | None, epoch: int, iteration: int, within: str = '') -> None:
        if self._saved_at != iteration:
            self._save(runner, batch_idx, dict(epoch=epoch, iter=iteration))
        name = signal.Signals(self._common).name
        within = f' within a {within}' if within else ''
        print_log(
            f'{name}: stopped after iteration {iteration}{within}. {how_to_go_on(runner)}', logger='current', level=30
        )
        if get_world_size() > 1:  # a launcher kills the others as soon as one has ended
            torch.distributed.barrier(group=self._group)
        raise SystemExit(128 + self._common)

    def _save(self, runner: Runner, batch_idx: int | None, meta: dict[str, int]) -> None:
        """Write a whole checkpoint, and its delta by the hook for that."""
        hook = checkpoint_hook(runner)
        if hook is None:
            return
        file = f'{NAME}.pth'
        with portable_names():
            runner.save_checkpoint(
                hook.out_dir,
                file,
                save_optimizer=True,
                save_param_scheduler=runner.param_schedulers is not None,
                meta=meta,
                by_epoch=False,
                backend_args=hook.backend_args or dict(backend='mona_mm_atomic'),
            )
        hook.last_ckpt = self.last_good = hook.file_backend.join_path(hook.out_dir, file)
        if is_main_process():
            AtomicLocalBackend().put_text(hook.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))
        for other in runner.hooks:
            if isinstance(other, DeltaCheckpointHook):
                other.after_train_iter(runner, batch_idx or 0)


def _cpu_group() -> Any:
    """A process group whose reductions leave the GPUs alone; the default one where gloo is missing."""
    distributed = torch.distributed
    if distributed.is_gloo_available() and distributed.get_backend() != 'gloo':
        return distributed.new_group(backend='gloo')
    return distributed.group.WORLD


def _shield(hook: PreemptionHook) -> None:
    shield_workers(hook._handlers)


def shield_workers(handlers: Mapping[int, Any]) -> None:
    """Let a worker that this process has just become ignore signals that do not come from its parent; call it behind a
    fork.

    Ctrl-C in a terminal, and the end of a job in many clusters, signal every process. If a worker of a loader, or of
    the pool among which an evaluation divides its images, ended then, its work would be lost, and its parent would wait
    for it without end. The parent's own SIGTERM, by which Python ends such processes, is obeyed. To any other process
    the signals do what they did before the run.

    Args:
        handlers: the signals that the run handles now, with what they did before; none before and after a run, when
            pools get their signals as other processes do.
    """
    target = getattr(multiprocessing.current_process(), '_target', None)
    module = getattr(target, '__module__', '')
    if not (module.startswith('torch.utils.data') or (handlers and module.startswith(_POOLS))):
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return
    if not hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)  # as torch's own handler does, so that the parent does not take it for a failure
