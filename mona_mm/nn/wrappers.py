"""Find the model inside the wrappers for distributed training or test-time augmentation."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn


def inner(module: nn.Module) -> nn.Module:
    """The module inside one wrapper for distributed training or test-time augmentation, into which mmengine loads."""
    return module.module if is_model_wrapper(module) or isinstance(module, BaseTTAModel) else module


def innermost(module: nn.Module) -> nn.Module:
    """The model inside all of its wrappers."""
    while inner(module) is not module:
        module = inner(module)
    return module
