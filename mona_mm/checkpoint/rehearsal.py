"""What loading would do to a model: the loading itself, by mmengine's own steps, without a value being written.

Between a file and a model there are more steps than comparing names: mmengine looks through wrappers, and the hosts'
own hooks rename, drop and resize tensors while they load. Whoever has to know beforehand whether a checkpoint fits
therefore lets all of that happen, and only keeps the values from being written.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mona_mm.nn.wrappers import inner

load_state_dict = mmengine_checkpoint.load_state_dict  # before mona_mm.checkpoint.loading puts its own in that place
# What hosts raise of tensors that they cannot make anything of.
_HOST_ERRORS = (RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Rehearsal:
    """What became of the tensors in a state dict, by the names that the model has.

    Args:
        values: what would have been written, as the host resized it.
        missing: tensors of the model that would have kept their values because nothing was given for them.
        unexpected: given tensors that the model has no use for.
        reshaped: tensors of the model for which something of another shape was given; with both shapes, in words.
        problem: what else kept the host from loading, in its own words; empty if nothing did.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    problem: str = ''


def model_state(checkpoint: Mapping[str, Any]) -> OrderedDict:
    """The state dict in a checkpoint as mmengine hands it to a model, which takes ``module.`` off the names."""
    given = checkpoint.get('state_dict', checkpoint)
    state_dict = OrderedDict((re.sub(r'^module\.', '', str(name)), value) for name, value in given.items())
    state_dict._metadata = getattr(given, '_metadata', OrderedDict())
    return state_dict


def rehearse(module: nn.Module, state_dict: Mapping[str, Any]) -> Rehearsal:
    """What mmengine's ``load_state_dict`` would do; ``module`` keeps its values.

    Where a host fails at what it is given, names and shapes are compared as they are.
    """
    module = inner(module)
    given = OrderedDict(state_dict)
    given._metadata = getattr(state_dict, '_metadata', None)
    current = mmengine_checkpoint.get_state_dict(module, keep_vars=True)
    keys: list[Any] = []
    hook = module.register_load_state_dict_post_hook(lambda _, incompatible: keys.append(incompatible))
    writing, problem = _Writing(current.values()), ''
    try:
        with writing:
            load_state_dict(module, given, strict=True, logger='silent')
    except _HOST_ERRORS as error:
        problem = _words(error)
    finally:
        hook.remove()
    if not keys:  # it did not come to the end
        return _compared(current, state_dict, problem)
    missing = [name for name in keys[0].missing_keys if 'num_batches_tracked' not in name]
    unexpected = list(keys[0].unexpected_keys)
    values = {name: writing.values[id(t)] for name, t in current.items() if id(t) in writing.values}
    done = {*keys[0].missing_keys, *values}
    left = {n: t for n, t in current.items() if isinstance(t, Tensor) and n not in done}
    reshaped = {n: _shapes(state_dict.get(n), t) for n, t in left.items() if _shape(state_dict.get(n)) != _shape(t)}
    # Of what has been said in the lists, the error says nothing more.
    return Rehearsal(values, missing, unexpected, reshaped, '' if missing or unexpected or reshaped else problem)


class _Writing(TorchFunctionMode):
    """Within this context nothing is copied into these tensors; what would have been is kept by their ids."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__()
        self.tensors = {id(tensor): tensor for tensor in tensors}
        self.values: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.copy_ and id(args[0]) in self.tensors:
            self.values[id(args[0])] = args[1]
            return args[0]
        return func(*args, **(kwargs or {}))


def _compared(current: Mapping[str, Any], given: Mapping[str, Any], problem: str) -> Rehearsal:
    reshaped = {n: _shapes(given[n], t) for n, t in current.items() if n in given and _shape(given[n]) != _shape(t)}
    return Rehearsal(
        values={n: given[n] for n in current if isinstance(given.get(n), Tensor) and n not in reshaped},
        missing=[n for n in current if n not in given and 'num_batches_tracked' not in n],
        unexpected=[n for n in given if n not in current],
        reshaped=reshaped,
        problem=problem,
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _shapes(given: Any, tensor: Tensor) -> str:
    if given is None:
        return f'what the host makes of the file is not {_shape(tensor)}'
    what = _shape(given) if isinstance(given, Tensor) else type(given).__name__
    return f'{what} instead of {_shape(tensor)}'


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {"; ".join(lines)}'[:400]
