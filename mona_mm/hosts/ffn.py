r"""The FFN of frozen weights, equal to the stock one within rounding, with a quarter of it kept for the backward pass.

The stock modules keep the GELU's input, of four times the stream's width, and under frozen weights nothing else of the
FFN; it is the largest thing that a block keeps. Here the FFN's own input is kept, and the first product computed again
in the backward pass.

That is a fifth product beside four. On a CPU the tokens are taken :data:`_ROWS` at a time, so that nothing of the
hidden width leaves the processor's cache; and in single precision the products are oneDNN's, see
:mod:`mona_mm.nn.products`, where they take half of MKL's time (measured on an AMD EPYC with AVX-512): forward and
backward are then done in half of the stock time, the fifth product included, at any width. Elsewhere it is computed
again where the stream is at most :data:`_WIDEST` wide, as in the first stage of a Swin. There it costs least: the
blocks of all stages have about as many operations, but those of a stage keep half of what those of the stage before
keep.

The stock path is taken where a weight trains, a dropout drops, a part is hooked or was replaced, by anything but GELU
between two linears, by what torch.compile or another tracer sees, and under ``torch.func``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts.fast import fast_form_of
from mona_mm.hosts.host import separate_linears
from mona_mm.nn.mixin import Mixin, mix_in, qualified_name
from mona_mm.nn.products import by_onednn, linear
from mona_mm.nn.tracing import is_hooked, is_traced

FFN_LINEARS = separate_linears(fc1='ffn.layers.0.0', fc2='ffn.layers.1')
"""The linear layers of mmcv's FFN."""

_LINEAR = {'torch.nn.modules.linear.Linear', 'mmcv.cnn.bricks.wrappers.Linear'}

_ROWS = 1024
"""Tokens at once on a CPU. Between 512 and 2048 nothing changes (measured, widths 128 to 1024)."""

_WIDEST = 192
"""Of the streams whose first product is computed again, unless it is oneDNN's. With MKL's, forward and backward take
0.8 to 0.9 of the stock time for 12,544 tokens of 96 and of 192 channels, 1.0 to 1.2 for 128, 0.8 for 60,800 of 128, and
1.25 for 3,136 of 256. For half precision and CUDA the limit is an estimate, not measured."""


@fast_form_of('mmcv.cnn.bricks.transformer.FFN')
def make_ffn_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of an FFN's layers, in place, if it has as many as are known."""
    if len(module.layers) != 3 or len(module.layers[0]) != 3:
        return False
    mix_in(module.layers, FrozenLayers)
    return True


class FrozenLayers(Mixin):
    """Mixin in front of an FFN's ``layers``: linear, GELU and dropout, linear, dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C) -> (..., C)``."""
        if is_traced() or not self._fits(x):
            return super().forward(x)
        fc1, fc2 = self[0][0], self[1]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _FrozenFFN.apply(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def _fits(self, x: Tensor) -> bool:
        """Whether :class:`_FrozenFFN` does the same here."""
        if len(self) != 3 or not _is_sequence(self[0]) or len(self[0]) != 3:  # no longer what it was built as
            return False
        (fc1, act, drop1), fc2, drop2 = self
        device = x.device.type
        if device not in ('cpu', 'cuda'):
            return False
        mixed = torch.is_autocast_enabled(device)
        products = torch.get_autocast_dtype(device) if mixed else x.dtype
        if not x.numel() or (x.shape[-1] > _WIDEST and not by_onednn(device, products)):
            return False
        if type(act) is not nn.GELU or act.approximate != 'none':
            return False
        if any(type(drop) is not nn.Dropout or (drop.training and drop.p > 0) for drop in (drop1, drop2)):
            return False
        if any(qualified_name(type(fc)) not in _LINEAR or fc.bias is None for fc in (fc1, fc2)):
            return False
        if is_hooked(self[0], fc1, act, drop1, fc2, drop2):
            return False
        dtypes = (x.dtype,)
        if mixed:  # frozen weights may be kept in the type of the products
            dtypes = () if x.dtype == torch.float64 else (torch.float32, products)
        parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        return not trains and all(p.dtype in dtypes for p in parameters)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _FrozenFFN(torch.autograd.Function):
    """``x`` is in the type of the products, the parameters are cast to it; none of them gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters[:3])
        weight1, bias1, weight2, bias2 = (p.to(x.dtype) for p in parameters)
        parts = [linear(torch.ops.aten.gelu_(linear(rows, weight1, bias1)), weight2, bias2) for (rows,) in _rows(x)]
        return _whole(parts, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # who calls backward may have one on
            weight1, bias1, weight2 = (p.to(x.dtype) for p in parameters)
            if torch.is_grad_enabled():  # to be differentiated again
                dx = torch.ops.aten.gelu_backward(grad @ weight2, F.linear(x, weight1, bias1)) @ weight1
                return dx, None, None, None, None
            parts = []
            for rows, grad_rows in _rows(x, grad):
                hidden = linear(rows, weight1, bias1)
                dhidden = linear(grad_rows, weight2.t())
                torch.ops.aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)
                parts.append(linear(dhidden, weight1.t()))
            return _whole(parts, x), None, None, None, None


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of tensors ``(..., C)`` as many tokens as are taken at once, each ``(tokens, C)``."""
    flat = [t.contiguous().view(-1, t.shape[-1]) for t in tensors]
    size = _ROWS if flat[0].device.type == 'cpu' else len(flat[0])
    return zip(*(t.split(size) for t in flat), strict=True)


def _whole(parts: list[Tensor], x: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
