"""Write a delta, the small file of the tensors that training has changed, beside every whole checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor

from mona_mm.checkpoint.base import base_file
from mona_mm.checkpoint.delta import make_delta
from mona_mm.checkpoint.delta_file import SUFFIX, Delta, read_delta, write_delta
from mona_mm.nn.wrappers import innermost
from mona_mm.options import Rule, checked
from mona_mm.registry import HOOKS

# The state that a scheduler needs to continue; all other state comes from the config.
_SCHEDULER_STATE = ('last_step', '_global_step', '_last_value', 'base_values')


Parts = Annotated[Sequence[str], Rule("a list of parts of the model, such as ['method', 'neck']", bool)]


@HOOKS.register_module()
class DeltaCheckpointHook(Hook):
    """Write ``epoch_3.delta.safetensors`` beside ``epoch_3.pth``, and delete it when that file is deleted.

    So intervals, the number of files and the choice of the best are those of the run's checkpoint hook, and no setting
    has to be given twice. The values are those of the whole checkpoint, which are averaged ones with an ``EMAHook``.
    The header holds the method, the config, the versions, the classes, the metrics of the validation, a fingerprint of
    the frozen base, and the state for resuming without the moments of the optimizer: iteration, learning rates,
    schedulers.

    Args:
        parts: the parts of the model to write; None for all that train. ``'method'`` is everything in the backbone.
        half: round trained values to float16.
    """

    priority = 'LOWEST'  # after EMAHook has changed the checkpoint, and after the checkpoint hook has written it

    @checked
    def __init__(self, parts: Parts | None = None, half: bool = False) -> None:
        self.parts = parts
        self.half = half
        self._checkpoints: CheckpointHook | None = None
        self._useful = False
        self._delta: Delta | None = None
        self._written: dict[Path, tuple[int, int]] = {}  # whole checkpoints and their versions, see _version
        self._latest: tuple[Path, int] | None = None  # the latest checkpoint and its iteration

    def before_train(self, runner: Runner) -> None:
        """Find the checkpoint hook, and remove incomplete files of a stopped process."""
        self._checkpoints = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        self._useful = any(not p.requires_grad for p in innermost(runner.model).parameters())
        if not self._useful:
            print_log('Nothing is frozen, so no deltas are written: each would be the whole model.', logger='current')
        if self._checkpoints is not None and runner.rank == 0:
            for partial in Path(self._checkpoints.out_dir).glob(f'*{SUFFIX}.*.partial'):
                partial.unlink(missing_ok=True)
        self._written = {}
        if self._checkpoints is not None and self._useful:
            self._adopt(runner.message_hub.runtime_info)
            self._record(runner)

    def _adopt(self, info: Mapping[str, Any]) -> None:
        """Take over the deltas of the run that is resumed, by the names of checkpoints in the one that is loaded.

        Only deltas with these names in this run's folder are taken over. Other files belong to the user, and so does a
        delta whose checkpoint was deleted by anything but the checkpoint hook.
        """
        if 'delta_of' not in info:  # no run is resumed, or one without this hook
            return
        hook = self._checkpoints
        best = {Path(path).name for key, path in info.items() if key.startswith('best_ckpt') and path}
        steps = {hook.filename_tmpl.format(step) for step in info.get('keep_ckpt_ids', ())}
        others = {Path(path).name for path in (*info['delta_of'], info.get('last_ckpt')) if path}
        kept = best | {hook.filename_tmpl.format(step) for step in getattr(hook, 'keep_ckpt_ids', ())}
        for name in best | steps | others:
            path = Path(hook.out_dir, name)
            if path.exists():
                self._written[path] = _version(path)
            elif name not in kept and (hook.max_keep_ckpts > 0 or name.startswith('best_')):
                _delta_of(path).unlink(missing_ok=True)

    def _record(self, runner: Runner) -> None:
        runner.message_hub.update_info('delta_of', [str(path) for path in self._written])

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Make the delta of the checkpoint, and keep it until that has been written and its name is known.

        Where weights are sharded this is called in all processes, which gather them; otherwise in the main process.
        """
        if self._checkpoints is None or not self._useful:
            return
        meta = checkpoint['meta']
        self._delta = make_delta(
            runner.model,
            parts=self.parts,
            half=self.half,
            config=meta.get('cfg', ''),
            base_file=base_file(runner.cfg),
            dataset_meta=meta.get('dataset_meta'),
            progress=_progress(checkpoint),
            state_dict=checkpoint['state_dict'],
        )

    def after_train_epoch(self, runner: Runner) -> None:
        """Write a delta beside the checkpoint of the epoch, if there is one."""
        self._write_beside_checkpoints(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Write a delta beside the checkpoint of the iteration, if there is one."""
        self._write_beside_checkpoints(runner)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """Write a delta beside the best checkpoint, and the metrics to the latest delta."""
        metrics = {name: float(value) for name, value in (metrics or {}).items() if _is_number(value)}
        if self._latest is not None and self._latest[1] == runner.iter:
            delta = read_delta(_delta_of(self._latest[0]))
            delta.header.metrics = metrics
            write_delta(delta.file, delta.header, delta.tensors)
        self._latest = None
        self._write_beside_checkpoints(runner, metrics)

    def _write_beside_checkpoints(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        delta, self._delta = self._delta, None
        if delta is None:
            return
        hook = self._checkpoints
        best = getattr(hook, 'best_ckpt_path', None), *(getattr(hook, 'best_ckpt_path_dict', None) or {}).values()
        for path in {Path(path) for path in (hook.last_ckpt, *best) if path}:
            version = _version(path)
            if version is not None and self._written.get(path) != version:
                write_delta(_delta_of(path), replace(delta.header, metrics=dict(metrics or {})), delta.tensors)
                self._written[path] = version
                if metrics is None:
                    self._latest = path, delta.header.progress['iter']
        for path in [path for path in self._written if not path.exists()]:
            _delta_of(path).unlink(missing_ok=True)
            del self._written[path]
        self._record(runner)


def _delta_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix('.pth') + SUFFIX)


def _version(path: Path) -> tuple[int, int] | None:
    """A value that changes when a file is written again, since an atomic write makes a new inode; None if absent."""
    if not path.exists():
        return None
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state for resuming that is small: all but the moments of the optimizer."""
    meta = checkpoint['meta']
    progress = {key: meta[key] for key in ('epoch', 'iter', 'seed') if key in meta}
    info = checkpoint.get('message_hub', {}).get('runtime_info', {})
    progress['runtime_info'] = {
        key: value for key, value in info.items() if key.startswith('best_') and isinstance(value, str | int | float)
    }
    optimizer = checkpoint.get('optimizer', {})
    if 'param_groups' in optimizer:
        progress['param_groups'] = [
            {**_plain_settings(g), 'params': len(g['params'])} for g in optimizer['param_groups']
        ]
    if 'base_param_settings' in optimizer:
        progress['base_param_settings'] = _plain_settings(optimizer['base_param_settings'])
    schedulers = checkpoint.get('param_schedulers')
    if isinstance(schedulers, list):
        progress['param_schedulers'] = [
            {key: state[key] for key in _SCHEDULER_STATE if key in state} for state in schedulers
        ]
    return progress


def _plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
    return {key: v for key, v in plain.items() if key != 'params' and (v is None or _is_plain(v))}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(_is_plain(item) for item in value)
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
