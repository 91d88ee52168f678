"""Matrix products by the library that is fastest where they run.

In single precision on a CPU torch's own linear layer calls one library (MKL on x86), and oneDNN is another. Either may
be twice as fast as the other, depending on the processor, the shape, and whether the weight is transposed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mona_mm.nn.choice import Ways, bucket
from mona_mm.nn.private import HAS_ONEDNN_LINEAR, onednn_linear

_ROWS = 2048
"""Rows of a sum over tokens that are processed at once, so that they stay in a CPU's cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, in float32 on a CPU by the fastest library, without a gradient there.

    A weight that is neither contiguous nor the transpose of a contiguous matrix is left to torch: oneDNN would take
    minutes.
    """
    if not has_ways(x):
        return F.linear(x, weight, bias)
    is_contiguous = weight.is_contiguous()
    if not (is_contiguous or weight.t().is_contiguous()):
        return F.linear(x, weight, bias)
    ways = _LINEAR if is_contiguous else _LINEAR_TRANSPOSED
    return ways(x, weight, bias, key=(*weight.shape, bucket(x.numel() // x.shape[-1]), bias is None))


def over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a.T @ b`` of contiguous matrices with many rows, ``(N, n)`` and ``(N, m)``, without a gradient."""
    if not (has_ways(a) and a.is_contiguous() and b.is_contiguous()):
        return a.t().mm(b)
    return _OVER_TOKENS(a, b, key=(a.shape[1], b.shape[1], bucket(a.shape[0])))


def has_ways(x: Tensor) -> bool:
    """Whether there is more than one way to multiply ``x``: in single precision on a CPU with oneDNN."""
    return (
        HAS_ONEDNN_LINEAR
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and x.numel() > 0
    )


def _over_tokens_in_parts(a: Tensor, b: Tensor) -> Tensor:
    parts = (onednn_linear(x.t(), y.t(), None) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True))
    out, *others = parts
    for part in others:
        out.add_(part)
    return out


_LINEAR = Ways('linear', onednn=onednn_linear, stock=F.linear)
_LINEAR_TRANSPOSED = Ways(
    'linear_transposed',
    onednn=onednn_linear,
    stock=F.linear,
    onednn_copied=lambda x, weight, bias: onednn_linear(x, weight.contiguous(), bias),
    stock_copied=lambda x, weight, bias: F.linear(x, weight.contiguous(), bias),
)
_OVER_TOKENS = Ways(
    'over_tokens',
    onednn=_over_tokens_in_parts,
    stock=lambda a, b: a.t().mm(b),
    stock_transposed=lambda a, b: b.t().mm(a).t(),
)
