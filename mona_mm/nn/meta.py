"""Build modules of any size at once and without memory for their weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Hosts compute drop rates and window indices with these and read the values (`linspace(...).item()`).
_ON_THE_CPU = {torch.linspace, torch.arange, torch.tensor, torch.as_tensor}


class _SmallFactoriesOnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ON_THE_CPU:
            kwargs = {**kwargs, 'device': kwargs.get('device') or 'cpu'}
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """A context in which new parameters have a shape but no memory."""
    with torch.device('meta'), _SmallFactoriesOnCpu():
        yield
