"""Resume a run under other circumstances: say what changes, carry out what is sound, refuse the rest."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from mona_mm.checkpoint.config_text import parse_config
from mona_mm.compat.runner import loaded_file, resumes
from mona_mm.errors import ConfigError
from mona_mm.nn import choice
from mona_mm.options import checked, show
from mona_mm.registry import HOOKS

_COMPARED = ('model', 'data_preprocessor', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader')
_INDIFFERENT = {'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'init_cfg', 'checkpoint'}
"""Keys that change no result, or nothing after the weights have been loaded."""

_STRUCTURE = ('model.', 'optim_wrapper.paramwise_cfg', 'optim_wrapper.constructor', 'optim_wrapper.type')
"""Where settings may change which parameters train, or their groups."""

_MOVING = {'last_step', '_global_step', '_last_value', 'base_values', 'verbose'}
"""What changes in the state of a scheduler while it is used, or does not change its values."""

_INFO = 'circumstances'
"""The entry of the message hub, and so of every checkpoint, under which a run writes down its circumstances."""


_CHOICES = 'mona_mm_choices'
"""The entry of a checkpoint that holds :func:`mona_mm.nn.choice.chosen`."""


@HOOKS.register_module()
class ResumptionHook(Hook):
    """Make ``resume`` mean the config that is given, where that is sound, and refuse it where it is not.

    mmengine takes learning rates, their schedule and the counts of iterations from the checkpoint, whatever the config
    says. With this hook:

    - another learning rate, decay or schedule is that of the config: the schedule stands where it would stand if the
      config had been used from the start. The optimizer's moments are kept;
    - another batch size, number of processes or size of the data set changes how many iterations an epoch has: the
      iterations are counted anew from the epochs that are done;
    - a checkpoint from within an epoch goes on within it: the batches that it has seen are skipped, without loading;
    - other settings of the model, such as dropout, hold from here on;
    - a run that has reached its end says so and ends, with status 0.

    What changed is said in one line. Unchanged circumstances change nothing, bit for bit.

    Raises:
        ConfigError: when the checkpoint is read, if it was made with another optimizer or other trained parameters, by
            epochs in place of iterations or the reverse, or beyond the end of the config's training.
        SystemExit: with status 0, in ``before_train``, if nothing is left to train.
    """

    priority = 'HIGHEST'  # before other hooks read the number of the iteration

    @checked
    def __init__(self) -> None:
        self._old: _Circumstances | None = None
        self._groups: list[dict[str, Any]] = []
        self._schedulers: list[dict[str, Any]] | None = None
        self._differs: list[str] = []
        self._changed: dict[str, tuple[Any, Any]] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with this run, before the Runner loads its optimizer and schedulers."""
        meta = checkpoint.get('meta') or {}
        if resumes(runner):
            choice.restore(checkpoint.get(_CHOICES) or ())
        if not resumes(runner) or 'iter' not in meta or 'epoch' not in meta:
            return
        info = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        old, new = parse_config(meta.get('cfg') or ''), parse_config(runner.cfg.pretty_text) or {}
        self._old = _Circumstances(meta, info, old or {})
        self._changed = dict(_differences(old, new)) if old else {}
        self._check_loop(runner)
        self._check_optimizer(runner, checkpoint, old or {}, new)
        self._groups = [_settings(group) for group in _param_groups(runner)]
        self._schedulers = _states(runner)
        self._differs = self._other_schedule(checkpoint)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Write down which ways of computing this process has found to be fastest, so that the run that resumes from
        the checkpoint takes the same and rounds as this one does."""
        checkpoint[_CHOICES] = choice.chosen()

    def _check_loop(self, runner: Runner) -> None:
        """Refuse another kind of loop, and a checkpoint from beyond the end."""
        old, loop, file = self._old, runner.train_loop, loaded_file(runner)
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if old.by_epoch is not None and old.by_epoch != by_epoch:
            units = {True: 'epochs', False: 'iterations'}
            raise ConfigError(
                f'{file} was trained by {units[old.by_epoch]} and this config trains by {units[by_epoch]}, so its '
                'schedule cannot be resumed. Use the same kind of train_cfg, or start a new run from its weights: '
                f'--cfg-options load_from={file}, without --resume.'
            )
        done, most = (old.epoch, loop.max_epochs) if by_epoch else (old.iteration, loop.max_iters)
        name = 'max_epochs' if by_epoch else 'max_iters'
        if done > most:
            raise ConfigError(
                f'{file} has {done} {name[4:]} and train_cfg.{name}={most}: it is beyond the end of this run. Resume '
                f'an earlier checkpoint, or raise train_cfg.{name}.'
            )

    def _check_optimizer(
        self, runner: Runner, checkpoint: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
    ) -> None:
        """Refuse another optimizer, and other groups of parameters, whose moments would not fit."""
        file = loaded_file(runner)
        advice = f'To start a new run from its weights: --cfg-options load_from={file}, without --resume.'
        kind = partial(_at, path=('optim_wrapper', 'optimizer', 'type'))
        if old and kind(old) != kind(new):
            raise ConfigError(
                f'{file} holds the moments of {kind(old)} and optim_wrapper.optimizer.type is {kind(new)}. {advice}'
            )
        groups = (checkpoint.get('optimizer') or {}).get('param_groups')
        if not isinstance(groups, Sequence) or hasattr(runner, 'strategy'):
            return
        before = [len(group['params']) for group in groups]
        now = [len(group['params']) for group in _optimizer_groups(runner)]
        if before == now or not now:
            return
        changed = {path: pair for path, pair in self._changed.items() if path.startswith(_STRUCTURE)}
        why = f' Changed: {_as_text(changed)}.' if changed else ''
        raise ConfigError(
            f'{file} trained {sum(before)} tensors in {len(before)} groups of the optimizer, and this config trains '
            f'{sum(now)} in {len(now)}, so its optimizer cannot be resumed.{why} {advice}'
        )

    def _other_schedule(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """The settings of the optimizer and the schedulers that are others than the checkpoint's, by name."""
        states = checkpoint.get('param_schedulers')
        if self._schedulers is None or not isinstance(states, list):
            return []
        if len(states) != len(self._schedulers):
            return ['the number of schedulers']
        names = {state.get('param_name') for state in self._schedulers}
        pairs = [(fresh, old, _MOVING) for fresh, old in zip(self._schedulers, states, strict=True)]
        groups = (checkpoint.get('optimizer') or {}).get('param_groups')
        if isinstance(groups, Sequence):
            pairs += [(fresh, old, {*names, 'params'}) for fresh, old in zip(self._groups, groups, strict=False)]
        return list(
            dict.fromkeys(
                key
                for fresh, old, moving in pairs
                for key in fresh.keys() & old.keys() - moving
                if _as_plain(old[key]) != _as_plain(fresh[key])
            )
        )

    def before_train(self, runner: Runner) -> None:
        """Carry the changes out, say them, and write down the circumstances for the next time."""
        loop, old = runner.train_loop, self._old
        length = len(runner.train_dataloader)
        if old is not None:
            notes = []
            if isinstance(loop, EpochBasedTrainLoop):
                self._go_on_in_epoch(runner, length, notes)
            elif old.batch and old.batch != _batch(runner):
                notes.append(
                    f'an iteration has {_describe(_batch(runner))}, in the checkpoint {_describe(old.batch)}: the '
                    'iterations go on counting, and the order of the images is another one'
                )
            if self._differs:
                notes.append(self._follow_schedule(runner, length))
            self._say(runner, notes)
            self._end_if_done(runner)
            self._old = None
        runner.message_hub.update_info(_INFO, dict(_batch(runner), length=length))

    def _go_on_in_epoch(self, runner: Runner, length: int, notes: list[str]) -> None:
        """Count the iterations in epochs of this run, and skip what has been trained of a begun epoch."""
        old, loop = self._old, runner.train_loop
        within = old.iteration - old.epoch * (old.length or length)
        if old.length and old.length != length:
            # Rounded down: what has been trained in part is trained again, and the epoch has an iteration left.
            within = within * length // old.length if 0 < within < old.length else 0
            loop._iter = old.epoch * length + within  # as Runner.resume sets it; there is no public setter
            self._differs += ['the length of an epoch'] if self._schedulers else []
            notes.append(
                f'an epoch has {length} iterations of {_describe(_batch(runner))}, in the checkpoint {old.length}'
                f'{" of " + _describe(old.batch) if old.batch else ""}: they are counted on from {loop.iter} in place '
                f'of {old.iteration}, and the random numbers and the order of the images are others'
            )
        if 0 < within < length:
            _skip_in_epoch(loop, within)
            notes.append(
                f'the first {within} of the {length} iterations of epoch {old.epoch + 1} are trained and skipped'
            )

    def _follow_schedule(self, runner: Runner, length: int) -> str:
        """Bring learning rates and schedulers to where this config would have them, and say so."""
        schedulers = _schedulers(runner)
        if any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers):
            return (
                'a scheduler that follows the scores goes on from the checkpoint, with its learning rates and not '
                "those of the config, since it depends on the run's scores"
            )
        for group, fresh in zip(_param_groups(runner), self._groups, strict=True):
            group.update(copy.deepcopy(fresh))
        for scheduler, fresh in zip(schedulers, self._schedulers, strict=True):
            scheduler.load_state_dict(copy.deepcopy(fresh))
        epochs = runner.epoch if isinstance(runner.train_loop, EpochBasedTrainLoop) else 0
        with warnings.catch_warnings():  # on the order of the steps of optimizer and scheduler
            warnings.simplefilter('ignore')
            for _ in range(epochs):
                _step(schedulers, False, length)
                _step(schedulers, True, 1)
            _step(schedulers, False, runner.iter - epochs * length)
        rate = runner.optim_wrapper.get_lr()
        now = next(iter(rate.values()))[0] if rate else None
        return (
            f'the learning rate goes on at {now:.6g}, where the schedule of this config stands at iteration '
            f'{runner.iter}, since {", ".join(self._differs)} changed; '
            "the optimizer's moments are kept, so this equals no run from the start"
        )

    def _say(self, runner: Runner, notes: list[str]) -> None:
        if self._changed or notes:
            changed = f' with other settings ({_as_text(self._changed)})' if self._changed else ''
            text = f': {"; ".join(notes)}' if notes else ', which hold from here on'
            print_log(f'Resuming {loaded_file(runner)}{changed}{text}.', logger='current', level=30)

    def _end_if_done(self, runner: Runner) -> None:
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        done, most = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        if done >= most:
            name = 'max_epochs' if by_epoch else 'max_iters'
            print_log(
                f'Nothing is left to train: {loaded_file(runner)} has all {done} {name[4:]} of train_cfg.{name}. To '
                f'train on: --cfg-options train_cfg.{name}=..., and a longer schedule where the config has one.',
                logger='current',
                level=30,
            )
            raise SystemExit(0)


class _Circumstances:
    """What a checkpoint says about the run that has written it."""

    def __init__(self, meta: Mapping[str, Any], info: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.epoch, self.iteration = int(meta['epoch']), int(meta['iter'])
        noted = info.get(_INFO) if isinstance(info.get(_INFO), Mapping) else {}
        train_cfg = config.get('train_cfg') if isinstance(config.get('train_cfg'), Mapping) else {}
        self.by_epoch: bool | None = None
        for key, by_epoch in (('max_epochs', True), ('max_iters', False)):
            if isinstance(train_cfg.get(key), int):
                self.by_epoch = by_epoch
        epochs, iterations = info.get('max_epochs'), info.get('max_iters')
        self.length = noted.get('length')
        if self.length is None and self.by_epoch and epochs and iterations:
            self.length = iterations // epochs
        self.batch = {key: noted[key] for key in ('images', 'processes') if key in noted}


def _batch(runner: Runner) -> dict[str, int]:
    loader = runner.train_dataloader
    images = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
    return dict(images=images, processes=get_world_size())


def _describe(batch: Mapping[str, int]) -> str:
    processes = batch.get('processes', 1)
    return f'{batch.get("images", "?")} images on {processes} process{"es" if processes > 1 else ""}'


def _skip_in_epoch(loop: EpochBasedTrainLoop, count: int) -> None:
    """Let the next epoch of a loop begin behind ``count`` batches, which are drawn and not loaded.

    The loop's own numbers of the iterations in the epoch go on, for the log and for what is done at an epoch's end.
    """
    loader = loop.dataloader
    name = 'batch_sampler' if loader.batch_sampler is not None else 'sampler'
    vars(loader)[name] = _Begun(getattr(loader, name), count)  # a loader does not let this be assigned
    run_iter = loop.run_iter
    remaining = len(loader) - count

    def later(index: int, batch: Any) -> None:
        run_iter(index + count, batch)
        if index + 1 == remaining:
            loop.run_iter = run_iter

    loop.run_iter = later


class _Begun:
    """A sampler of batches whose first pass begins later. A loader with persistent workers keeps it for all epochs."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler = sampler
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        count, self._count = self._count, 0
        return islice(iter(self._sampler), count, None)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):  # a copy or pickle that is not filled yet
            raise AttributeError(name)
        return getattr(self._sampler, name)


def _as_plain(value: Any) -> Any:
    """A value for comparison: what a checkpoint gives back has lost the difference between some kinds of numbers."""
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _schedulers(runner: Runner) -> list[Any]:
    return runner.param_schedulers if isinstance(runner.param_schedulers, list) else []


def _states(runner: Runner) -> list[dict[str, Any]] | None:
    """Copies of the states of all schedulers; None if there are several optimizers, each with its own."""
    if isinstance(runner.param_schedulers, dict):
        return None
    return [copy.deepcopy(scheduler.state_dict()) for scheduler in _schedulers(runner)]


def _param_groups(runner: Runner) -> list[dict[str, Any]]:
    """The groups that schedulers change: the optimizer's, and with several of them mmengine's group of defaults."""
    return getattr(runner.optim_wrapper, 'param_groups', [])


def _optimizer_groups(runner: Runner) -> list[dict[str, Any]]:
    return getattr(getattr(runner.optim_wrapper, 'optimizer', None), 'param_groups', [])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != 'params'}


def _step(schedulers: Sequence[Any], by_epoch: bool, count: int) -> None:
    chosen = [scheduler for scheduler in schedulers if scheduler.by_epoch == by_epoch]
    for _ in range(count if chosen else 0):
        for scheduler in chosen:
            scheduler.step()


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in _COMPARED:
        yield from _differ(key, old.get(key), new.get(key))


def _differ(path: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            if key not in _INDIFFERENT:
                yield from _differ(f'{path}.{key}', old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differ(f'{path}.{i}', a, b)
    elif old != new:
        yield path, (old, new)


def _as_text(changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f'{path}: {show(old)} -> {show(new)}' for path, (old, new) in list(changed.items())[:8]]
    return ', '.join(shown) + (f' and {len(changed) - 8} more' if len(changed) > 8 else '')
