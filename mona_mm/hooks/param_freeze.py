"""Freeze parameters, report which ones train, and check that the frozen weights do not change."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mona_mm.compat.runner import trains
from mona_mm.errors import FreezeError
from mona_mm.frozen.activations import measure_activations, training_size
from mona_mm.frozen.averages import differing_frozen, keep_frozen_part
from mona_mm.frozen.copies import alike, moving_copies
from mona_mm.frozen.count import backbone_path, count_trainable
from mona_mm.frozen.rules import Rules, behind_outputs, check_trainable, freeze, select
from mona_mm.hosts import method_names
from mona_mm.methods.queries import check_linked
from mona_mm.nn.digest import digests
from mona_mm.nn.sharded import is_sharded, local_parameters, unwrapped, whole
from mona_mm.nn.wrappers import innermost
from mona_mm.options import checked
from mona_mm.record import freeze_records
from mona_mm.registry import HOOKS

_FEW = 64  # longer lists and dicts in a hook are histories, and are not searched for copies of the model


@HOOKS.register_module()
class ParamFreezeHook(Hook):
    """Report which parameters train, and check at every checkpoint and after training that no others have changed.

    A model with a :func:`~mona_mm.PeftBackbone` or :func:`~mona_mm.FrozenModel` is frozen when it is built, and the
    hook only checks it. A stock model is frozen by the hook, which works in one process only: the Runner wraps the
    model for distributed training before any hook runs, and freezing is too late then.

    The frozen part of copies of the model is kept equal to the model's, bit for bit, however the copies are averaged:
    for copies in other hooks (such as an ``EMAHook``) before they are validated or saved, and for a teacher in the
    model (:func:`mona_mm.frozen.copies.moving_copies`) before every iteration. A copy whose frozen part already differs
    when the hook first finds it (a teacher with its own weights) is left alone.

    Args:
        trainable: a rule or a list of rules of :mod:`mona_mm.frozen.rules`, for the names of the whole model
            (``['backbone.stages.3', 'neck', 'roi_head']``). None checks the rules with which the parts were built.

    Raises:
        FreezeError: in ``before_run`` or ``before_train``, if other parameters train than the config selects, or the
            hook would have to freeze a model that is already wrapped; in ``before_save_checkpoint`` or ``after_train``,
            if a frozen weight has changed in the model or in a copy of it.
        ConfigError: if a rule selects nothing.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the model

    @checked
    def __init__(self, trainable: Rules | None = None) -> None:
        self.trainable = trainable
        self._digests: dict[str, int] = {}
        self._copies: dict[nn.Module, str] = {}  # copies of the model in hooks, with the names of the hooks
        self._seen: WeakSet[nn.Module] = WeakSet()  # all modules in hooks that have been looked at
        self._followers: dict[str, str] | None = None  # copies within the model, see moving_copies

    def before_run(self, runner: Runner) -> None:
        """Freeze a stock model if ``trainable`` is given and nothing in the model was frozen when it was built."""
        model = innermost(runner.model)
        if self.trainable is None or not trains(runner):
            return
        if any(freeze_records(model)):
            with unwrapped(runner.model):
                self._check_rules(model)
            return
        if model is not runner.model or is_sharded(model):
            raise FreezeError(
                f'ParamFreezeHook(trainable={self.trainable!r}) cannot freeze a model that is already wrapped in '
                f'{type(runner.model).__name__}. Freeze when the model is built instead: '
                "model=dict(type='mona_mm.FrozenModel', base=<your model>, trainable=...)."
            )
        freeze(model, self.trainable)
        wrapper = runner.optim_wrapper
        for optim_wrapper in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            for group in optim_wrapper.optimizer.param_groups:
                group['params'] = [p for p in group['params'] if p.requires_grad]

    def _check_rules(self, model: nn.Module) -> None:
        method, selected = method_names(model), select(model, self.trainable) - behind_outputs(model)
        parameters = {name: p for name, p in model.named_parameters() if name not in method}
        wrong = sorted(name for name, p in parameters.items() if p.requires_grad != (name in selected))
        if wrong:
            raise FreezeError(
                f'ParamFreezeHook(trainable={self.trainable!r}) contradicts how the model was built: '
                f'{len(wrong)} parameters differ, first {", ".join(wrong[:3])}. Set `trainable` only in PeftBackbone '
                'or FrozenModel, and leave it out of the hook.'
            )

    def before_train(self, runner: Runner) -> None:
        """Check and print which parameters train, and take the digests of the frozen weights, which are now loaded."""
        sharded = is_sharded(runner.model)
        with whole(runner.model) as model:
            check_trainable(model)
            check_linked(model)
            if not any(p.requires_grad for p in model.parameters()):
                raise FreezeError('No parameter of the model trains. Choose a method, or other `trainable` rules.')
            # A backbone by itself does not run where the model around it gathers its weights.
            kept = '' if sharded else _kept_activations(runner, model)
            print_log(f'What trains:\n{count_trainable(model).table()}{kept}', logger='current')
        self._digests = frozen_digests(runner.model)
        self._followers = None
        self._copies, self._seen = {}, WeakSet()
        self._find_copies(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Restore the frozen part of a teacher, which its hook has averaged since the last iteration."""
        model = innermost(runner.model)
        if self._followers is None:  # only now, since the hook of a teacher makes it equal to the student before
            self._followers = {
                copy: followed
                for copy, followed in moving_copies(model).items()
                if _is_averaged(model, copy)
                or not differing_frozen(model.get_submodule(copy), model.get_submodule(followed))
            }
        self._keep_followers(model)
        self._find_copies(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Restore the frozen part of the copies that are validated."""
        self._keep_copies(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raise an error instead of writing a checkpoint whose frozen weights have changed."""
        if self._digests:
            self._keep_copies(runner)
            self._check_frozen(runner)

    def after_train(self, runner: Runner) -> None:
        """Check the frozen weights for the last time, and log that they are unchanged."""
        self._keep_copies(runner)
        self._check_frozen(runner)
        holders = [*self._copies.values(), *(self._followers or ())]
        copies = f', in the model and in its copies ({", ".join(holders)})' if holders else ''
        print_log(f'{len(self._digests)} frozen parameters are unchanged, bit for bit{copies}.', logger='current')

    def _find_copies(self, runner: Runner) -> None:
        """Look for copies of the model in hooks, some of which make them only after training has started."""
        model = innermost(runner.model)
        for hook in runner.hooks:
            for module in _modules_in(hook):
                if module in self._seen:
                    continue
                self._seen.add(module)
                copy = next((m for m in module.modules() if alike(m, model)), None)
                if copy is None or copy is model:
                    continue
                if _is_averaged(module) or not differing_frozen(copy, model):
                    self._copies[copy] = type(hook).__name__

    def _keep_copies(self, runner: Runner) -> None:
        if not self._digests:
            return
        self._find_copies(runner)
        model = innermost(runner.model)
        self._keep_followers(model)
        for copy in self._copies:
            keep_frozen_part(copy, model)

    def _keep_followers(self, model: nn.Module) -> None:
        for copy, followed in (self._followers or {}).items():
            keep_frozen_part(model.get_submodule(copy), model.get_submodule(followed))

    def _check_frozen(self, runner: Runner) -> None:
        model = innermost(runner.model)
        for copy, hook in self._copies.items():
            wrong = differing_frozen(copy, model)
            if wrong:
                raise FreezeError(
                    f'{len(wrong)} frozen tensors in the copy of the model in {hook} differ from those of the model: '
                    f'{", ".join(wrong[:5])}. Other code writes to them.'
                )
        now = frozen_digests(runner.model)
        if now.keys() != self._digests.keys():
            changed = sorted(now.keys() ^ self._digests.keys())
            problem = 'were frozen or unfrozen'
        else:
            changed = [name for name, value in now.items() if value != self._digests[name]]
            follows = {
                f'{copy}.{name}': now.get(f'{followed}.{name}')
                for copy, followed in (self._followers or {}).items()
                for name, _ in model.get_submodule(copy).named_parameters()
            }
            changed = [n for n in changed if n not in follows or follows[n] not in (None, now[n])]
            problem = 'are frozen but changed'
        if is_sharded(runner.model):  # each process has looked at its own part
            changed = sorted({name for names in all_gather_object(changed) for name in names})
        if changed:
            raise FreezeError(
                f'{len(changed)} parameters {problem} during training: {", ".join(changed[:5])}. Other code writes to '
                'them without the optimizer, or has changed requires_grad after the model was built.'
            )


def _kept_activations(runner: Runner, model: nn.Module) -> str:
    """A line on what the backbone does not keep for the backward pass; empty if it trains from the first block on."""
    wrapper = runner.optim_wrapper
    with wrapper.optim_context(model) if isinstance(wrapper, OptimWrapper) else nullcontext():
        kept = measure_activations(model.get_submodule(backbone_path(model)), training_size(runner.cfg))
    return f'\n{kept.text()}' if kept else ''


def _is_averaged(module: nn.Module, path: str = '') -> bool:
    """Whether a module, or any module along a path in it, is an averaging object."""
    modules = [module]
    for name in filter(None, path.split('.')):
        modules.append(modules[-1].get_submodule(name))
    return any(hasattr(m, 'update_parameters') for m in modules)


def _modules_in(hook: Hook) -> Iterator[nn.Module]:
    for value in vars(hook).values():
        is_container = isinstance(value, dict | list | tuple) and len(value) <= _FEW
        for item in (value.values() if isinstance(value, dict) else value) if is_container else [value]:
            if isinstance(item, nn.Module):
                yield item


def frozen_digests(model: nn.Module) -> dict[str, int]:
    """The digest of every frozen parameter, by name; of sharded ones, of the part that this process has.

    Swin-B takes about 0.3 s on one CPU core.
    """
    return digests({name: p for name, p in local_parameters(model).items() if not p.requires_grad})
