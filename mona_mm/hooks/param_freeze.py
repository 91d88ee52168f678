"""Freeze, report what trains, and prove that the frozen weights stay."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mona_mm.compat.runner import trains
from mona_mm.errors import FreezeError
from mona_mm.frozen.averages import differing_frozen, keep_frozen_part
from mona_mm.frozen.copies import alike, moving_copies
from mona_mm.frozen.count import count_trainable
from mona_mm.frozen.rules import Rules, behind_outputs, check_trainable, freeze, select
from mona_mm.hosts import method_names
from mona_mm.nn.digest import digests
from mona_mm.options import checked
from mona_mm.record import freeze_records
from mona_mm.registry import HOOKS

_FEW = 64  # things that a hook holds in one place: what is longer is its history


@HOOKS.register_module()
class ParamFreezeHook(Hook):
    """Says before training what trains, and afterwards, and at every checkpoint, that nothing else moved.

    With a :func:`~mona_mm.PeftBackbone` or :func:`~mona_mm.FrozenModel` in the model, which freeze when the model is
    built, the hook checks. On a stock model, in one process, it freezes by itself: the Runner wraps the model for
    distributed training before any hook runs, and freezing after that is too late.

    Copies of the model are kept on its frozen part, bit for bit, whoever averages them, and however: those that other
    hooks hold (an ``EMAHook``) before they are validated or saved, and a teacher in the model
    (:func:`mona_mm.frozen.copies.moving_copies`) before every iteration. A copy whose frozen part was another one when
    the hook first saw it (a teacher with weights of its own) is left alone.

    Args:
        trainable: a rule or a list of rules of :mod:`mona_mm.frozen.rules`, over the names of the whole model
            (``['backbone.stages.3', 'neck', 'roi_head']``). None checks what the model's parts were built with.

    Raises:
        FreezeError: in ``before_run`` or ``before_train``, if the model does not train what the config asked for, or
            if the hook would have to freeze a model that is already wrapped; in ``before_save_checkpoint`` or
            ``after_train``, if a frozen weight changed, in the model or in a copy of it.
        ConfigError: if a rule matches nothing.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the model

    @checked
    def __init__(self, trainable: Rules | None = None) -> None:
        self.trainable = trainable
        self._digests: dict[str, int] = {}
        self._copies: dict[nn.Module, str] = {}  # that hooks hold, with whose
        self._seen: WeakSet[nn.Module] = WeakSet()  # what hooks hold, copy or not
        self._followers: dict[str, str] | None = None  # in the model: see moving_copies

    def before_run(self, runner: Runner) -> None:
        """Freeze a stock model, where ``trainable`` is given and nothing in the model was frozen when built."""
        model = _unwrap(runner.model)
        if self.trainable is None or not trains(runner):
            return
        if any(freeze_records(model)):
            self._check_rules(model)
            return
        if is_model_wrapper(runner.model):
            raise FreezeError(
                f'ParamFreezeHook(trainable={self.trainable!r}) cannot freeze a model that is already wrapped in '
                f'{type(runner.model).__name__}. Freeze when the model is built instead: '
                "model=dict(type='mona_mm.FrozenModel', base=<your model>, trainable=...)."
            )
        freeze(model, self.trainable)
        wrapper = runner.optim_wrapper
        for each in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            for group in each.optimizer.param_groups:
                group['params'] = [p for p in group['params'] if p.requires_grad]

    def _check_rules(self, model: nn.Module) -> None:
        method, asked = method_names(model), select(model, self.trainable) - behind_outputs(model)
        wrong = sorted(
            name for name, p in model.named_parameters() if name not in method and p.requires_grad != (name in asked)
        )
        if wrong:
            raise FreezeError(
                f'ParamFreezeHook(trainable={self.trainable!r}) contradicts how the model was built: '
                f'{len(wrong)} parameters differ, {", ".join(wrong[:3])} the first. Say it in one place: in '
                "PeftBackbone's or FrozenModel's `trainable`, and leave the hook's out."
            )

    def before_train(self, runner: Runner) -> None:
        """Check what trains, print the table, and remember the frozen weights (they have been loaded by now)."""
        model = _unwrap(runner.model)
        check_trainable(model)
        count = count_trainable(model)
        if not count.trainable:
            raise FreezeError('No parameter of the model trains: choose a method, or other `trainable` rules.')
        print_log(f'What trains:\n{count.table()}', logger='current')
        self._digests = frozen_digests(model)
        self._followers = None
        self._copies, self._seen = {}, WeakSet()
        self._find_copies(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep a teacher's frozen part, which its hook has averaged since."""
        model = _unwrap(runner.model)
        if self._followers is None:  # not before: such hooks make the teacher equal to the student before training
            self._followers = {
                copy: followed
                for copy, followed in moving_copies(model).items()
                if _is_averaged(model, copy)
                or not differing_frozen(model.get_submodule(copy), model.get_submodule(followed))
            }
        self._keep_followers(model)
        self._find_copies(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Keep the frozen part of what is validated."""
        self._keep_copies(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to write a checkpoint whose frozen weights moved."""
        if self._digests:
            self._keep_copies(runner)
            self._check_frozen(runner)

    def after_train(self, runner: Runner) -> None:
        """Say that the frozen weights are what they were."""
        self._keep_copies(runner)
        self._check_frozen(runner)
        whose = [*self._copies.values(), *(self._followers or ())]
        copies = f', in the model and in its copies ({", ".join(whose)})' if whose else ''
        print_log(f'{len(self._digests)} frozen parameters are unchanged, bit for bit{copies}.', logger='current')

    def _find_copies(self, runner: Runner) -> None:
        """Look for copies in what the hooks hold and has not been looked at: some begin late."""
        model = _unwrap(runner.model)
        for hook in runner.hooks:
            for held in _modules_in(hook):
                if held in self._seen:
                    continue
                self._seen.add(held)
                copy = next((m for m in held.modules() if alike(m, model)), None)
                if copy is None or copy is model:
                    continue
                if _is_averaged(held) or not differing_frozen(copy, model):
                    self._copies[copy] = type(hook).__name__

    def _keep_copies(self, runner: Runner) -> None:
        if not self._digests:
            return
        self._find_copies(runner)
        model = _unwrap(runner.model)
        self._keep_followers(model)
        for copy in self._copies:
            keep_frozen_part(copy, model)

    def _keep_followers(self, model: nn.Module) -> None:
        for copy, followed in (self._followers or {}).items():
            keep_frozen_part(model.get_submodule(copy), model.get_submodule(followed))

    def _check_frozen(self, runner: Runner) -> None:
        model = _unwrap(runner.model)
        for copy, whose in self._copies.items():
            wrong = differing_frozen(copy, model)
            if wrong:
                raise FreezeError(
                    f'{len(wrong)} frozen tensors of the copy of the model that {whose} holds are not those of the '
                    f'model: {", ".join(wrong[:5])}. Something else writes to them.'
                )
        now = frozen_digests(model)
        if now.keys() != self._digests.keys():
            changed = sorted(now.keys() ^ self._digests.keys())
            what = 'were frozen or unfrozen'
        else:
            changed = [name for name, each in now.items() if each != self._digests[name]]
            follows = {
                f'{copy}.{name}': now.get(f'{followed}.{name}')
                for copy, followed in (self._followers or {}).items()
                for name, _ in model.get_submodule(copy).named_parameters()
            }
            changed = [n for n in changed if n not in follows or follows[n] not in (None, now[n])]
            what = 'are frozen but changed'
        if changed:
            raise FreezeError(
                f'{len(changed)} parameters {what} during training: {", ".join(changed[:5])}. Something writes to '
                'them past the optimizer, or changed requires_grad after the model was built.'
            )


def _is_averaged(module: nn.Module, path: str = '') -> bool:
    """Whether a module, or another one on the way down a path in it, averages what is in it."""
    around = [module]
    for name in filter(None, path.split('.')):
        around.append(around[-1].get_submodule(name))
    return any(hasattr(m, 'update_parameters') for m in around)


def _modules_in(hook: Hook) -> Iterator[nn.Module]:
    for value in vars(hook).values():
        several = isinstance(value, dict | list | tuple) and len(value) <= _FEW
        for each in (value.values() if isinstance(value, dict) else value) if several else [value]:
            if isinstance(each, nn.Module):
                yield each


def frozen_digests(model: nn.Module) -> dict[str, int]:
    """The digest of every frozen parameter, computed where the parameters are; about 0.3 s for Swin-B on a CPU core."""
    return digests({name: p for name, p in model.named_parameters() if not p.requires_grad})


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
