"""Leave autocast where a product must not be rounded."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp import is_autocast_available  # not on every device: none on meta


def no_autocast(device: str) -> AbstractContextManager:
    """Make a context in which operations on a type of device, such as ``'cuda'``, compute in the dtype of their inputs.

    Outside of autocast it does nothing, so that tracers do not record it.
    """
    is_on = is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
