"""Stop a run whose loss is not finite, or skip the iteration, and write nothing that is not finite."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from mona_mm.errors import DivergedError
from mona_mm.hooks.stop_messages import how_to_go_on, image_names
from mona_mm.nn.wrappers import innermost
from mona_mm.options import Count, checked
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop when a loss is not finite, naming the iteration, the images and the last good checkpoint.

    The loss of every iteration is looked at. On a GPU that costs nothing more: mmengine's ``RuntimeInfoHook`` reads
    every term of the loss in every iteration anyway, and this hook reads ``loss`` right before it. Before a
    checkpoint is written, the trained parameters, the statistics of norms and the optimizer's moments are looked at,
    on their device, with one synchronisation: a gradient may overflow although its loss did not.

    Args:
        skip: leave out an iteration whose loss is not finite, in place of stopping, and count it. The weights do not
            change in it, in no process; a gradient that is being accumulated keeps its other parts. The loss is then
            read before the backward pass, and several processes agree about it, which costs one synchronisation of
            the device and one reduction of a single number in every iteration.
        most: the number of such iterations in a row after which the run stops even so, since the weights themselves
            are then to blame.

    Raises:
        DivergedError: in ``after_train_iter``, if the loss is not finite; in ``before_save_checkpoint``, if a value of
            the checkpoint is not finite, but was when training began.
    """

    priority = 'HIGHEST'  # before the loss enters the log, and before anything is saved

    @checked
    def __init__(self, skip: bool = False, most: Count = 20) -> None:
        self.skip = skip
        self.most = most
        self.skipped = 0
        self._in_a_row = 0
        self._skips_this = False
        self._exempt: set[str] = set()  # tensors that are not finite from the beginning, such as masks

    def before_train(self, runner: Runner) -> None:
        """Note which values are not finite from the beginning, and guard the optimizer if iterations are skipped."""
        self._exempt = set(_not_finite(_tensors(runner)))
        if self.skip:
            for wrapper in _wrappers(runner.optim_wrapper):
                update = wrapper.update_params
                if getattr(update, 'func', None) != self._update:
                    wrapper.update_params = partial(self._update, update)

    def _update(self, update: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Update the parameters, unless the loss is not finite in any process."""
        finite = torch.isfinite(loss.detach()).all().to(torch.uint8)
        all_reduce(finite, 'min')
        if finite:
            update(loss, *args, **kwargs)
        else:
            self._skips_this = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Stop, or count the skipped iteration and keep its loss out of the log, whose averages it would spoil."""
        wrong = _wrong_losses(outputs or {})
        if self._skips_this:
            self._skips_this = False
            self._count(runner, wrong, data_batch)
            if isinstance(outputs, dict):
                outputs.clear()
        elif wrong:
            raise DivergedError(
                f'The loss of iteration {runner.iter + 1} is not finite: {wrong}. {_images(data_batch)} '
                'Nothing of it has been saved. Try a lower learning rate, a longer warm-up or clip_grad, look at these '
                'images and their annotations, or leave such iterations out with --skip-nonfinite. '
                f'{how_to_go_on(runner)}'
            )
        else:
            self._in_a_row = 0

    def _count(self, runner: Runner, wrong: str, data_batch: Any) -> None:
        self.skipped += 1
        self._in_a_row += 1
        found = (wrong, image_names(data_batch))
        of_all = all_gather_object(found) if get_world_size() > 1 else [found]
        values = '; '.join(value for value, _ in of_all if value) or 'in another loss than those of the log'
        images = ', '.join(names for value, names in of_all if names and (value or not wrong))
        print_log(
            f'Iteration {runner.iter + 1} is left out, since its loss is not finite ({values}). Images: '
            f'{images or "not named in the batch"}. {self.skipped} so far.',
            logger='current',
            level=30,
        )
        if self._in_a_row >= self.most:
            raise DivergedError(
                f'The losses of {self._in_a_row} iterations in a row, up to {runner.iter + 1}, are not finite, so it '
                f'is not a matter of single images. Try a lower learning rate. {how_to_go_on(runner)}'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse to write weights or moments that are not finite."""
        wrong = [name for name in _not_finite(_tensors(runner)) if name not in self._exempt]
        if wrong:
            raise DivergedError(
                f'No checkpoint is written at iteration {runner.iter}: {len(wrong)} tensors have values that are not '
                f'finite, first {", ".join(wrong[:3])}. Training has diverged: try a lower learning rate, a longer '
                f'warm-up or clip_grad. {how_to_go_on(runner)}'
            )

    def after_train(self, runner: Runner) -> None:
        """Say how many iterations were left out."""
        if self.skipped:
            print_log(
                f'{self.skipped} iterations were left out, since their loss was not finite.', logger='current', level=30
            )


def _images(batch: Any) -> str:
    names = image_names(batch)
    return f'Its images: {names}.' if names else 'Its batch does not name its images.'


def _wrong_losses(outputs: Mapping[str, Any]) -> str:
    """The losses that are not finite, as text. The terms are read only if their sum is not finite or absent."""
    if 'loss' in outputs and _is_finite(outputs['loss']):
        return ''
    wrong = {name: value for name, value in outputs.items() if 'loss' in name and not _is_finite(value)}
    return ', '.join(f'{name}={float(value)}' for name, value in wrong.items())


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value.detach()).all())
    try:
        return math.isfinite(value)
    except TypeError:  # not a number, so not a loss
        return True


def _wrappers(wrapper: Any) -> Iterator[OptimWrapper]:
    if isinstance(wrapper, OptimWrapperDict):
        for each in wrapper.values():
            yield from _wrappers(each)
    elif wrapper is not None and hasattr(wrapper, 'update_params'):
        yield wrapper


def _tensors(runner: Runner) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by name: trained parameters, buffers, and the optimizer's moments."""
    model = innermost(runner.model)
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[parameter] = name
            yield name, parameter
    yield from model.named_buffers()
    for wrapper in _wrappers(runner.optim_wrapper):
        state = getattr(getattr(wrapper, 'optimizer', None), 'state', {})
        for parameter, moments in list(state.items()):
            for key, value in moments.items() if isinstance(moments, Mapping) else ():
                if isinstance(value, Tensor):
                    yield f'{key} of {names.get(parameter, "a parameter")}', value


def _not_finite(tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that have a value that is not finite, found with one synchronisation for each device."""
    by_device: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        tensor = tensor.to_local() if hasattr(tensor, 'to_local') else tensor  # the part of this process
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
            continue
        names, found = by_device.setdefault(tensor.device, ([], []))
        names.append(name)
        found.append(torch.isfinite(tensor).all())
    wrong = []
    for names, found in by_device.values():
        wrong += [name for name, fine in zip(names, torch.stack(found).tolist(), strict=True) if not fine]
    return wrong
