"""Go on when the work dir of a run is deleted."""

import logging
import os
import os.path as osp
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mona_mm.options import checked
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Make the folders of a run anew if somebody has deleted them, and go on with the log there.

    mmengine's log of scalars ends the run in that case. Checkpoints are written with their folder anyway. What was
    deleted is gone; that is said in one line. The cost is a look at one folder in every iteration.
    """

    priority = 'NORMAL'  # right before the log is written, behind other hooks of this priority

    @checked
    def __init__(self) -> None:
        """The hook has no options."""

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'train'
    ) -> None:
        self._restore(runner)

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self._restore(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the folders before the scores are logged."""
        self._restore(runner)

    def _restore(self, runner: Runner) -> None:
        scalars = osp.join(runner.log_dir, 'vis_data')
        if not is_main_process() or osp.isdir(scalars):
            return
        os.makedirs(scalars, exist_ok=True)
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                stream = Path(handler.baseFilename).open('a', encoding=handler.encoding)  # noqa: SIM115  stays open
                deleted = handler.setStream(stream)
                if deleted is not None:
                    deleted.close()
        print_log(
            f'{runner.log_dir} was deleted, and is written anew: what was there is gone. The run goes on.',
            logger='current',
            level=logging.WARNING,
        )
