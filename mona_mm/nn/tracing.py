"""Tell when a module's parts must be called one by one, because hooks or tracers would miss a fused form of them."""

import torch
from torch import nn

from mona_mm.nn.private import has_hooks, may_be_transformed


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a call of any of the modules runs more than its class's forward: a hook, or a forward of its own."""
    return any(has_hooks(m) or 'forward' in vars(m) for m in modules)


def is_traced() -> bool:
    """Whether torch.compile, another tracer, ``torch.func``, forward-mode differentiation or a dispatch mode (such as
    one that counts operations or computes only shapes) is active."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or may_be_transformed()
