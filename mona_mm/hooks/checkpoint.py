"""Write checkpoints that a stopped process cannot break."""

import shutil
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mona_mm.checkpoint.atomic import AtomicLocalBackend  # noqa: F401  registers what backend_args names
from mona_mm.compat.safe_globals import portable_names
from mona_mm.errors import ConfigError
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with the same options, whose last good checkpoint always survives.

    mmengine deletes outdated files before it writes the new one, and writes in place: a process that is stopped then,
    or a full disk, leaves a broken file or none. This hook writes a checkpoint to a temporary file beside it, renames
    that, and deletes outdated ones only then, so that for a moment there is one file more than ``max_keep_ckpts``. For
    exact resuming use it with :class:`~mona_mm.hooks.IterationSeedHook`, with which the iteration determines the random
    state.

    Raises:
        ConfigError: if ``backend_args`` or ``file_client_args`` is given, since files must be local.
    """

    def __init__(self, *args, **kwargs) -> None:
        if kwargs.get('backend_args') or kwargs.get('file_client_args'):
            raise ConfigError(
                'SafeCheckpointHook writes local files only; for another storage backend use CheckpointHook.'
            )
        super().__init__(*args, **{**kwargs, 'backend_args': dict(backend='mona_mm_atomic')})

    def before_train(self, runner: Runner) -> None:
        """Resolve the directory and remove incomplete files of a stopped process."""
        super().before_train(runner)
        if is_main_process():
            for folder in {Path(self.out_dir), Path(runner.work_dir)}:
                for partial in [*folder.glob('*.pth.*.partial'), *folder.glob('last_checkpoint.*.partial')]:
                    partial.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        with portable_names():
            runner.save_checkpoint(
                self.out_dir,
                filename,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        if is_main_process():
            self.file_backend.put_text(self.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))
            if outdated is not None:
                _remove(Path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend, self.file_backend = self.file_backend, _DeferredRemoval(self.file_backend)
        try:
            with portable_names():
                super()._save_best_checkpoint(runner, metrics)
            outdated = self.file_backend.removed
        finally:
            self.file_backend = backend
        for path in outdated:
            _remove(Path(path))


def _remove(path: Path) -> None:
    if path.is_dir():  # deepspeed writes folders
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _DeferredRemoval:
    """A file backend that records the paths to remove, and removes nothing."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self.removed: list[str] = []

    def remove(self, path: str) -> None:
        self.removed.append(path)

    rmtree = remove

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
