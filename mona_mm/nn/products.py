"""Matrix products by the fastest library that is available."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mona_mm.nn.private import HAS_ONEDNN_LINEAR, onednn_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, in float32 on a CPU by oneDNN, which is up to twice as fast as the library that torch uses there.

    A weight that is neither contiguous nor the transpose of a contiguous matrix is left to torch: oneDNN would take
    minutes.
    """
    if by_onednn(x.device.type, x.dtype) and (weight.is_contiguous() or weight.t().is_contiguous()):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def by_onednn(device: str, dtype: torch.dtype) -> bool:
    """Whether :func:`linear` uses oneDNN for tensors of this dtype on this type of device."""
    return device == 'cpu' and dtype == torch.float32 and HAS_ONEDNN_LINEAR and torch.backends.mkldnn.enabled
