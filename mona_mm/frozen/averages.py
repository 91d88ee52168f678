"""Averages of a model keep its frozen part: it is no average of anything, and rounding would let it drift.

mmengine's and torch's classes average every parameter, those that never change too, and most formulas round. After
hundreds of updates a frozen weight of the average is another one than the base's (in half precision by percents), and
what was trained beside it belongs on a base that exists nowhere else. So every averaging object that is built of a
model with something frozen by :mod:`mona_mm.frozen.rules` copies the frozen part after each update.
"""

from functools import wraps
from weakref import WeakKeyDictionary

import torch
from mmengine.model.averaged_model import BaseAveragedModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mona_mm.frozen.changes import changing
from mona_mm.nn.mixin import Mixin, mix_in
from mona_mm.nn.wrappers import innermost
from mona_mm.record import freeze_records

# By copy: what trained when the names of the frozen tensors were looked for, which is slow, and those.
_FROZEN: WeakKeyDictionary[nn.Module, tuple[list[bool], list[str]]] = WeakKeyDictionary()


class KeepsFrozenPart(Mixin):
    """Mixin in front of an averaging class."""

    def update_parameters(self, model: nn.Module) -> None:
        """The class's own update, of what changes in ``model``."""
        super().update_parameters(model)
        keep_frozen_part(innermost(self.module), innermost(model))


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes nothing of, parameters and buffers, by their names in the state dict."""
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
    """The names of the frozen tensors of ``model`` that are others in ``copy``."""
    state = copy.state_dict()
    return [name for name, t in frozen_tensors(model).items() if not torch.equal(state[name].to(t.device), t)]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _keep_in(cls: type[nn.Module]) -> None:
    """Let all objects of an averaging class, and of those derived from it, keep the frozen part."""
    init = cls.__init__

    @wraps(init)
    def __init__(self: nn.Module, model: nn.Module, *args, **kwargs) -> None:
        init(self, model, *args, **kwargs)
        if any(freeze_records(model)):
            mix_in(self, KeepsFrozenPart)

    cls.__init__ = __init__


for _class in (BaseAveragedModel, AveragedModel):
    _keep_in(_class)
