"""When a module's parts have to be called one by one: somebody sees them who would not see another form of the same."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

# Private names of torch: where a later one has renamed them, the fast forms are taken there, too.
_are_functorch_transforms_active = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)
_is_in_dispatch_mode = getattr(_python_dispatch, 'is_in_torch_dispatch_mode', lambda: False)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a call of any of the modules runs more than its class's forward: a hook, or a forward of its own."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or 'forward' in vars(m)
        for m in modules
    )


def is_traced() -> bool:
    """Whether torch.compile, another tracer, ``torch.func``, derivatives in forward mode or a dispatch mode (one that
    counts operations, or computes shapes alone) follow what is computed now."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _are_functorch_transforms_active()
        or getattr(forward_ad, '_current_level', -1) >= 0  # within forward_ad.dual_level()
        or _is_in_dispatch_mode()
    )
