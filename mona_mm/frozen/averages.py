"""Keep the frozen part of a model's averages equal to the model's.

mmengine's and torch's classes average every parameter, frozen ones included, and most of their formulas round. After
hundreds of updates the frozen weights of the average differ from the base's (by percents in half precision), and the
trained weights beside them fit no base that exists. So every averaging object of a model that was frozen by
:mod:`mona_mm.frozen.rules` copies the frozen part after each update.

mmengine's classes with ``update_buffers=True`` also average a parameter that modules share once for each of its names,
so that it follows the model that many times as fast as others. Here each has one name.
"""

from functools import wraps
from weakref import WeakKeyDictionary

import torch
from mmengine.model.averaged_model import BaseAveragedModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mona_mm.frozen.changes import changing
from mona_mm.nn.mixin import Mixin, mix_in
from mona_mm.nn.shared import shared_names
from mona_mm.nn.wrappers import innermost
from mona_mm.record import freeze_records

# For every copy, the names of the frozen tensors, which are slow to find, and the requires_grad flags at that time.
_FROZEN: WeakKeyDictionary[nn.Module, tuple[list[bool], list[str]]] = WeakKeyDictionary()


class KeepsFrozenPart(Mixin):
    """Mixin in front of an averaging class."""

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average, except for the frozen part, which is copied from ``model``."""
        super().update_parameters(model)
        keep_frozen_part(innermost(self.module), innermost(model))


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that training does not change, by their names in the state dict."""
    changes = changing(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in changes and _is_tensor(tensor)}


def keep_frozen_part(copy: nn.Module, model: nn.Module) -> None:
    """Give ``copy`` the frozen tensors of ``model``, in place."""
    flags = [p.requires_grad for p in model.parameters()]
    if copy not in _FROZEN or _FROZEN[copy][0] != flags:
        _FROZEN[copy] = flags, list(frozen_tensors(model))
    state, given = copy.state_dict(), model.state_dict()
    with torch.no_grad():
        for name in _FROZEN[copy][1]:
            state[name].copy_(given[name])


def differing_frozen(copy: nn.Module, model: nn.Module) -> list[str]:
    """The names of the frozen tensors of ``model`` whose values differ in ``copy``."""
    state = copy.state_dict()
    return [name for name, t in frozen_tensors(model).items() if not torch.equal(state[name].to(t.device), t)]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _keep_in(cls: type[nn.Module]) -> None:
    """Make all objects of an averaging class, and of classes derived from it, keep the frozen part."""
    init = cls.__init__

    @wraps(init)
    def __init__(self: nn.Module, model: nn.Module, *args, **kwargs) -> None:
        init(self, model, *args, **kwargs)
        if any(freeze_records(model)):
            mix_in(self, KeepsFrozenPart)
            if isinstance(self, BaseAveragedModel):
                others = shared_names(self.avg_parameters)
                self.avg_parameters = {name: t for name, t in self.avg_parameters.items() if name not in others}

    cls.__init__ = __init__


for _class in (BaseAveragedModel, AveragedModel):
    _keep_in(_class)
