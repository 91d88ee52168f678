"""The terms that modules of methods add to the loss of a model, such as a penalty on their parameters.

A module states its terms in :meth:`~mona_mm.methods.base.PeftModule.auxiliary_losses`. The models of mmengine, and its
wrappers for distributed training, put the losses of an iteration together by ``BaseModel.parse_losses``, which adds the
terms of all modules in the model to them. So they are logged by name, and scaled, accumulated and averaged over
processes with the loss. They are computed once in an iteration, in the dtype of the parameters, after the forward pass:
activation checkpoints do not compute them again, and every parameter gets one gradient. Only modules that train count,
not those of a teacher in the model, and only while gradients are recorded.

A loop that does not call ``parse_losses`` adds :func:`auxiliary_loss` to its loss. If it does not, a warning says so at
the first step of the optimizer.
"""

import logging
from collections.abc import Mapping
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules
from mona_mm.methods.base import PeftModule
from mona_mm.nn.autocast import no_autocast

# The modules with terms that have not been asked for since the model was built.
_UNUSED: WeakSet[PeftModule] = WeakSet()


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Compute the terms that the methods in a model add to its loss, summed by name.

    There are none while gradients are not recorded.

    Raises:
        ConfigError: if the name of a term does not contain ``loss``, without which mmengine would not add it.
    """
    losses: dict[str, Tensor] = {}
    if not torch.is_grad_enabled():
        return losses
    for module in modules_with_terms(model):
        trained = next((p for p in module.parameters() if p.requires_grad), None)
        if trained is None:
            continue
        _UNUSED.discard(module)
        with no_autocast(trained.device.type):
            for name, term in module.auxiliary_losses().items():
                if 'loss' not in name:
                    raise ConfigError(
                        f'{type(module).__name__}: the term {name!r} of its auxiliary_losses must have "loss" in its '
                        'name: mmengine adds up the losses with such names alone.'
                    )
                losses[name] = losses[name] + term if name in losses else term
    return losses


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Compute the sum of the terms that the methods in a model add to its loss, zero if there are none.

    It is for loops that do not call ``parse_losses`` of mmengine's models, which adds the terms itself. It is computed
    once for every backward pass, and is scaled (for mixed precision, or by a number of accumulated batches) as the loss
    beside it::

        loss = criterion(model(images), labels) + mona_mm.auxiliary_loss(model)

    Raises:
        ConfigError: see :func:`auxiliary_losses`.
    """
    terms = list(auxiliary_losses(model).values())
    if terms:
        return sum(terms[1:], start=terms[0])
    return torch.zeros((), device=next((p.device for p in model.parameters()), None))


def modules_with_terms(model: nn.Module) -> list[PeftModule]:
    """The modules of methods in a model whose classes state terms, each once."""
    return [
        module
        for module in dict.fromkeys(method_modules(model))
        if isinstance(module, PeftModule) and type(module).auxiliary_losses is not PeftModule.auxiliary_losses
    ]


def expect_auxiliary_losses(model: nn.Module) -> None:
    """Let the first step of an optimizer say if it trains modules of this model whose terms no loss has had."""
    _UNUSED.update(modules_with_terms(model))


def _warn_of_unused(optimizer: Optimizer, args: tuple, kwargs: Mapping[str, Any]) -> None:
    if not _UNUSED:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group['params']}
    left = [module for module in _UNUSED if any(p.requires_grad and id(p) in trained for p in module.parameters())]
    _UNUSED.difference_update(left)
    with torch.no_grad():
        names = sorted({name for module in left for name in module.auxiliary_losses()})
    if names:
        methods = ', '.join(sorted({type(module).__name__ for module in left}))
        print_log(
            f'{methods}: the loss that is trained on lacks {", ".join(names)}, which belongs to the method. '
            "parse_losses of mmengine's models adds it; in a loop of your own, train on "
            '`loss + mona_mm.auxiliary_loss(model)`.',
            logger='current',
            level=logging.WARNING,
        )


register_optimizer_step_pre_hook(_warn_of_unused)


def _add_in(cls: type[BaseModel]) -> None:
    """Make ``parse_losses`` of all models of a class add the terms."""
    parse = cls.parse_losses

    @wraps(parse)
    def parse_losses(self: BaseModel, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = auxiliary_losses(self)
        taken = [name for name in terms if name in losses]
        if taken:
            raise ConfigError(
                f'{type(self).__name__} has a loss {taken[0]!r} of its own, and its method adds one of this name. Do '
                'not add it in the model, where it would count twice, or give one of them another name.'
            )
        return parse(self, {**losses, **terms} if terms else losses)

    cls.parse_losses = parse_losses


_add_in(BaseModel)
