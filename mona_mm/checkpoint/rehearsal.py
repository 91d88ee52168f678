"""Rehearse loading a state dict into a model, by mmengine's own steps, without writing any value.

Loading does more than compare names: mmengine looks through wrappers, and the hosts' own hooks rename, drop and resize
tensors. To know beforehand whether a checkpoint fits, all of that runs, and only the writing of values is suppressed.
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

load_state_dict = mmengine_checkpoint.load_state_dict  # the original, which mona_mm.checkpoint.loading replaces
# The errors that hosts raise for tensors that they cannot use.
_HOST_ERRORS = (RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal, by the names in the model.

    Args:
        values: the values that would have been written, as the host has resized them.
        missing: the tensors of the model for which nothing was given.
        unexpected: the given tensors that the model does not have.
        reshaped: the tensors of the model for which another shape was given, with both shapes in words.
        problem: the message of any other error of the host; empty if there was none.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    problem: str = ''


def model_state(checkpoint: Mapping[str, Any]) -> OrderedDict:
    """The state dict of a checkpoint as mmengine loads it into a model, without ``module.`` in front of the names."""
    given = checkpoint.get('state_dict', checkpoint)
    state_dict = OrderedDict((re.sub(r'^module\.', '', str(name)), value) for name, value in given.items())
    state_dict._metadata = getattr(given, '_metadata', OrderedDict())
    return state_dict


def rehearse(module: nn.Module, state_dict: Mapping[str, Any]) -> Rehearsal:
    """Find out what mmengine's ``load_state_dict`` would do, while ``module`` keeps its values.

    If a host fails with the given tensors, names and shapes are compared as they are.
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
        problem = _one_line(error)
    finally:
        hook.remove()
    if not keys:  # loading did not finish
        return _compare_as_given(current, state_dict, problem)
    missing = [name for name in keys[0].missing_keys if 'num_batches_tracked' not in name]
    unexpected = list(keys[0].unexpected_keys)
    values = {name: writing.values[id(t)] for name, t in current.items() if id(t) in writing.values}
    done = {*keys[0].missing_keys, *values}
    left = {n: t for n, t in current.items() if isinstance(t, Tensor) and n not in done}
    reshaped = {
        n: _describe_shapes(state_dict.get(n), t) for n, t in left.items() if _shape(state_dict.get(n)) != _shape(t)
    }
    # The error only repeats the lists, if there are any.
    return Rehearsal(values, missing, unexpected, reshaped, '' if missing or unexpected or reshaped else problem)


class _Writing(TorchFunctionMode):
    """A context in which nothing is copied into the given tensors; the values are recorded by the tensors' ids."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__()
        self.tensors = {id(tensor): tensor for tensor in tensors}
        self.values: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.copy_ and id(args[0]) in self.tensors:
            self.values[id(args[0])] = args[1]
            return args[0]
        return func(*args, **(kwargs or {}))


def _compare_as_given(current: Mapping[str, Any], given: Mapping[str, Any], problem: str) -> Rehearsal:
    reshaped = {
        n: _describe_shapes(given[n], t) for n, t in current.items() if n in given and _shape(given[n]) != _shape(t)
    }
    return Rehearsal(
        values={n: given[n] for n in current if isinstance(given.get(n), Tensor) and n not in reshaped},
        missing=[n for n in current if n not in given and 'num_batches_tracked' not in n],
        unexpected=[n for n in given if n not in current],
        reshaped=reshaped,
        problem=problem,
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _describe_shapes(given: Any, tensor: Tensor) -> str:
    if given is None:
        return f'the host converts the file to another shape than {_shape(tensor)}'
    actual = _shape(given) if isinstance(given, Tensor) else type(given).__name__
    return f'{actual} instead of {_shape(tensor)}'


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {"; ".join(lines)}'[:400]
