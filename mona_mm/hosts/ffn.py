r"""A faster FFN for frozen weights. It equals the stock one within rounding and keeps a quarter of the memory for the
backward pass.

With frozen weights the stock FFN keeps only the GELU's input, which is four times as wide as the stream and the largest
tensor that a block keeps. This form keeps the FFN's own input and recomputes the first product in the backward pass.

That is a fifth product beside four. On a CPU the tokens are processed :data:`_ROWS` at a time, so that the wide
activations stay in the processor's cache, and single-precision products are made by the fastest library
(:mod:`mona_mm.nn.products`). Whether this outweighs the fifth product depends on the processor and the shape, so that
the form is compared with the stock one at the first call (:mod:`mona_mm.nn.choice`).

The stock path runs where a weight trains, a dropout is active, a part is hooked or was replaced, the activation is not
GELU, and under torch.compile, other tracers and ``torch.func``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts.fast import fast_form_of
from mona_mm.hosts.host import separate_linears
from mona_mm.nn.choice import Ways, bucket
from mona_mm.nn.mixin import Mixin, mix_in, qualified_name
from mona_mm.nn.products import linear
from mona_mm.nn.tracing import is_hooked, is_traced

FFN_LINEARS = separate_linears(fc1='ffn.layers.0.0', fc2='ffn.layers.1')
"""The linear layers of mmcv's FFN."""

_LINEAR = {'torch.nn.modules.linear.Linear', 'mmcv.cnn.bricks.wrappers.Linear'}

_ROWS = 1024
"""The number of tokens that are processed at once on a CPU. Values from 512 to 2048 are equally fast (measured at
widths of 128 to 1024)."""


@fast_form_of('mmcv.cnn.bricks.transformer.FFN')
def make_ffn_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of an FFN's layers, in place, if there are two linear layers."""
    if len(module.layers) != 3 or len(module.layers[0]) != 3:
        return False
    mix_in(module.layers, FrozenLayers)
    return True


class FrozenLayers(Mixin):
    """Mixin in front of an FFN's ``layers``, which are linear, GELU and dropout, then linear, then dropout."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        if is_traced() or not self._fits(x):
            return super().forward(x)
        key = *self[0][0].weight.shape, bucket(x.numel() // x.shape[-1])
        return _FORMS.choose_form(self, x, key=key)(self, x)

    def _recomputed(self, x: Tensor) -> Tensor:
        fc1, fc2 = self[0][0], self[1]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenFFN.apply(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def _stock(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _fits(self, x: Tensor) -> bool:
        """Whether :class:`_FrozenFFN` computes the same as the stock layers for this input."""
        if len(self) != 3 or not _is_sequence(self[0]) or len(self[0]) != 3:  # layers were exchanged after building
            return False
        (fc1, act, drop1), fc2, drop2 = self
        device = x.device.type
        if device not in ('cpu', 'cuda'):
            return False
        mixed = torch.is_autocast_enabled(device)
        products = torch.get_autocast_dtype(device) if mixed else x.dtype
        if not x.numel():
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
        if mixed:  # frozen weights may be kept in the dtype of the products
            dtypes = () if x.dtype == torch.float64 else (torch.float32, products)
        parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        return not trains and all(p.dtype in dtypes for p in parameters)


_FORMS = Ways('frozen_ffn', recomputed=FrozenLayers._recomputed, stock=FrozenLayers._stock)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _FrozenFFN(torch.autograd.Function):
    """The FFN in the dtype of ``x``, to which the parameters are cast. Only ``x`` gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters[:3])
        weight1, bias1, weight2, bias2 = (p.to(x.dtype) for p in parameters)
        parts = [linear(torch.ops.aten.gelu_(linear(rows, weight1, bias1)), weight2, bias2) for (rows,) in _rows(x)]
        return _whole(parts, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # it may be on where backward() is called
            weight1, bias1, weight2 = (p.to(x.dtype) for p in parameters)
            if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
                dx = torch.ops.aten.gelu_backward(grad @ weight2, F.linear(x, weight1, bias1)) @ weight1
                return dx, None, None, None, None
            parts = []
            for rows, grad_rows in _rows(x, grad):
                gelu_input = linear(rows, weight1, bias1)
                grad_rows = linear(grad_rows, weight2.t())
                torch.ops.aten.gelu_backward.grad_input(grad_rows, gelu_input, grad_input=grad_rows)
                parts.append(linear(grad_rows, weight1.t()))
            return _whole(parts, x), None, None, None, None


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors ``(..., C)`` into the pieces ``(tokens, C)`` that are processed at once."""
    flat = [t.contiguous().view(-1, t.shape[-1]) for t in tensors]
    size = _ROWS if flat[0].device.type == 'cpu' else len(flat[0])
    return zip(*(t.split(size) for t in flat), strict=True)


def _whole(parts: list[Tensor], x: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
