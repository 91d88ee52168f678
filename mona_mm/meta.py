"""Build a model of any size in seconds, without memory for its weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from mona_mm.freeze import freeze
from mona_mm.type_names import enter_scope, is_type

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
    """Parameters made in this context have a shape and no memory."""
    with torch.device('meta'), _SmallFactoriesOnCpu():
        yield


def build_on_meta(cfg: Config) -> nn.Module:
    """The model of a config, its parameters on the meta device: for counting and inspecting, not for running.

    What a ``ParamFreezeHook`` of the config would freeze is frozen.
    """
    enter_scope(cfg)
    with meta_device():
        model = MODELS.build(cfg.model)
    freeze_by_hooks(model, cfg)
    return model


def freeze_by_hooks(model: nn.Module, cfg: Config) -> None:
    """Freeze what a ``ParamFreezeHook`` of the config would freeze."""
    for hook in cfg.get('custom_hooks') or []:
        if is_type(hook, 'mona_mm.ParamFreezeHook') and hook.get('trainable') is not None:
            freeze(model, hook['trainable'])
