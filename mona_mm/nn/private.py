"""The only module that uses private names of torch, each with a fallback for a torch that lacks the name.

The classes that norms, convolutions and dropouts derive from have no public name. Their public children are listed
beside them, so that a torch without the private name loses only classes of others that derive from it directly
(mmengine's BatchNorm for a single device is one).
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def _find(module: str, name: str) -> Any:
    """The object of a private name in a module of torch; None if there is no such name or module."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _with_base(base: Any, *public: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    return public if base is None else (base, *public)


BATCH_NORMS = _with_base(
    _find('torch.nn.modules.batchnorm', '_BatchNorm'),
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip
NORMS_WITH_STATISTICS = _with_base(
    _find('torch.nn.modules.batchnorm', '_NormBase'),
    *BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
CONVOLUTIONS = _with_base(
    _find('torch.nn.modules.conv', '_ConvNd'),
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
DROPOUTS = _with_base(
    _find('torch.nn.modules.dropout', '_DropoutNd'),
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip

_FSDP_MODULE = _find('torch.distributed.fsdp', 'FSDPModule')
FSDP2 = () if _FSDP_MODULE is None else (_FSDP_MODULE,)
"""The class in front of those of the modules that ``fully_shard`` was called on, which is public since torch 2.6."""
FULLY_SHARD = _find('torch.distributed.fsdp', 'fully_shard')


def load_hooks(module: nn.Module) -> dict:
    """The hooks that run when a state dict has been loaded into a module; empty where torch keeps them elsewhere."""
    return getattr(module, '_load_state_dict_post_hooks', {})


_functorch_is_active = _find('torch._C', '_are_functorch_transforms_active')
_is_in_dispatch_mode = _find('torch.utils._python_dispatch', 'is_in_torch_dispatch_mode')


def may_be_transformed() -> bool:
    """Whether ``torch.func``, forward-mode differentiation or a dispatch mode may be active.

    It is True where torch does not tell, so that the plain forms run.
    """
    level = getattr(forward_ad, '_current_level', None)
    if _functorch_is_active is None or _is_in_dispatch_mode is None or level is None:
        return True
    return _functorch_is_active() or level >= 0 or _is_in_dispatch_mode()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on a module itself; True where torch keeps them under unknown names."""
    return any(getattr(module, name, True) for name in _HOOKS)


def change_count(tensor: Tensor) -> Any:
    """A value that changes whenever a tensor is changed in place.

    It is NaN, which equals nothing, where torch does not count changes, and 0 for inference tensors, which have no
    count.
    """
    return 0 if tensor.is_inference() else getattr(tensor, '_version', float('nan'))


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by oneDNN. It exists where :data:`HAS_ONEDNN_LINEAR` is True."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
