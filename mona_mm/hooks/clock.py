"""Keep the times of a run right when the clock of the machine is set."""

import time
from typing import Any

from mmengine.hooks import Hook, IterTimerHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mona_mm.options import checked
from mona_mm.registry import HOOKS

_JUMP = 10.0
"""Seconds by which the clock may differ from the time that has passed; it is adjusted by less all the time."""


@HOOKS.register_module()
class ClockHook(Hook):
    """Notice that the clock was set, say so in one line, and correct mmengine's timer.

    Nothing in training depends on the clock, but mmengine's times do: without the correction the log shows a negative
    time, or an ``eta`` of days, for the rest of the run.
    """

    priority = 'HIGHEST'  # before the timer measures

    @checked
    def __init__(self) -> None:
        self._offset = _offset()

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self._correct(runner)  # before the timer starts anew

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        self._correct(runner)

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'train'
    ) -> None:
        self._correct(runner)

    def _correct(self, runner: Runner) -> None:
        """Correct the timer, which measures right behind this."""
        offset = _offset()
        jump, self._offset = offset - self._offset, offset
        if abs(jump) < _JUMP:
            return
        for hook in runner.hooks:
            if isinstance(hook, IterTimerHook) and hasattr(hook, 't'):
                hook.t += jump
        print_log(
            f'The clock of this machine was set {"forward" if jump > 0 else "back"} by {abs(jump):.0f} s. Training '
            'goes on as before; the times of later lines of this log are those of the new clock.',
            logger='current',
            level=30,
        )


def _offset() -> float:
    """The difference between the clock and a time that nobody can set."""
    return time.time() - time.monotonic()
