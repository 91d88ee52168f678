"""Freeze, report what trains, and prove that the frozen weights stay."""

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mona_mm.errors import FreezeError
from mona_mm.freeze import Rules, check_trainable, count_trainable, freeze, select
from mona_mm.options import checked
from mona_mm.registry import HOOKS
from mona_mm.sites import method_names


@HOOKS.register_module()
class ParamFreezeHook(Hook):
    """Says before training what trains, and afterwards, and at every checkpoint, that nothing else moved.

    With a :func:`~mona_mm.PeftBackbone` or :func:`~mona_mm.FrozenModel` in the model, which freeze when the model is
    built, the hook checks. On a stock model, in one process, it freezes by itself: the Runner wraps the model for
    distributed training before any hook runs, and freezing after that is too late.

    Args:
        trainable: a rule or a list of rules of :mod:`mona_mm.freeze`, over the names of the whole model
            (``['backbone.stages.3', 'neck', 'roi_head']``). None checks what the model's parts were built with.

    Raises:
        FreezeError: in ``before_run`` or ``before_train``, if the model does not train what the config asked for, or
            if the hook would have to freeze a model that is already wrapped; in ``before_save_checkpoint`` or
            ``after_train``, if a frozen weight changed.
        ConfigError: if a rule matches nothing.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the model

    @checked
    def __init__(self, trainable: Rules | None = None) -> None:
        self.trainable = trainable
        self._checksums: dict[str, Tensor] = {}

    def before_run(self, runner: Runner) -> None:
        """Freeze a stock model, where ``trainable`` is given and nothing in the model was frozen when built."""
        model = _unwrap(runner.model)
        only_tests = not isinstance(runner._train_loop, BaseLoop)  # the loop's config, or None, until it trains
        if self.trainable is None or only_tests:
            return
        if any(hasattr(m, 'freeze_record') for m in model.modules()):
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
        method, asked = method_names(model), select(model, self.trainable)
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
        self._checksums = checksums(model)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to write a checkpoint whose frozen weights moved."""
        if self._checksums:
            self._check_frozen(runner)

    def after_train(self, runner: Runner) -> None:
        """Say that the frozen weights are what they were."""
        self._check_frozen(runner)
        print_log(f'{len(self._checksums)} frozen parameters are unchanged, bit for bit.', logger='current')

    def _check_frozen(self, runner: Runner) -> None:
        now = checksums(_unwrap(runner.model))
        if now.keys() != self._checksums.keys():
            changed = sorted(now.keys() ^ self._checksums.keys())
            what = 'were frozen or unfrozen'
        else:
            names = list(now)
            moved = torch.stack([*now.values()]) != torch.stack([*self._checksums.values()]) if names else []
            changed = [name for name, m in zip(names, torch.as_tensor(moved).tolist(), strict=True) if m]
            what = 'are frozen but changed'
        if changed:
            raise FreezeError(
                f'{len(changed)} parameters {what} during training: {", ".join(changed[:5])}. Something writes to '
                'them past the optimizer, or changed requires_grad after the model was built.'
            )


def checksums(model: nn.Module) -> dict[str, Tensor]:
    """A checksum of every frozen parameter, which any single change of a bit alters.

    One pass over the weights where they are, without a copy: 20 ms for Swin-B on one CPU core.
    """
    return {name: _checksum(p.detach()) for name, p in model.named_parameters() if not p.requires_grad}


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes, taken as 64-bit integers (which is as fast as memory), and of what is left over."""
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
