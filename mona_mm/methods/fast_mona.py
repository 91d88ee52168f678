"""Mona as one autograd function: the same mathematics with fewer operations and less memory for the backward pass."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mona_mm.nn.depthwise import kernel_gradient
from mona_mm.nn.products import linear, over_tokens

Kernels = Literal['none', 'convolutions', 'all']
"""The parts of :func:`mona` that run as Triton kernels (:mod:`mona_mm.methods.triton_mona`)."""


_WIDEST = 256
"""The largest bottleneck for the kernels, a block of which holds all of it."""

_LARGEST_KERNEL = 7
"""The largest side of a depthwise kernel for them, which unroll the taps of a row."""


class ScaledNorm(NamedTuple):
    """The parameters of the scaled LayerNorm."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    gammax: Tensor
    eps: float


def mona(
    x: Tensor,
    hw: tuple[int, int],
    norm: ScaledNorm | None,
    down: tuple[Tensor, Tensor],
    depthwise: Sequence[tuple[Tensor, Tensor]],
    pointwise: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    filter_scale: float,
    dropout: float = 0.0,
    exact: bool = True,
    keeps: bool = False,
    kernels: Kernels = 'none',
) -> Tensor:
    """Compute :meth:`mona_mm.methods.Mona.forward` for a Mona without a scaled LayerNorm before the 1x1 convolution.

    It differs from the plain form as follows:

    - The depthwise convolutions are one convolution, whose kernel is their sum and is built in every call.
    - Tokens stay ``(B, N, C)`` in memory; the grid is a view in channels-last format.
    - The backward pass keeps the output, the mean and reciprocal standard deviation of ``x``, the hidden state ``p``
      and the dropout mask. Everything between is recomputed, unless ``keeps`` is True. ``x`` is recomputed as the
      output minus the branch, to the precision of the output: beside a branch a million times as large it would be
      lost. The next LayerNorm in a block keeps the output anyway. Changing the output in place is an error. In half
      precision (without autocast), where the sum is rounded, ``x`` itself is kept.
    - The gradients of all parameters before ``p`` follow from one product of ``x`` with ``[dp, rstd * dp]``, so that
      nothing as wide as ``x`` is summed over the tokens.

    Under autocast the projections and convolutions run in its dtype, and the LayerNorm in float32.

    Args:
        x: the tokens ``(B, N, C)``, of which the last ``H*W`` are the row-major grid; the others skip the convolutions.
        hw: the grid ``(H, W)``.
        norm: the scaled LayerNorm before the down projection; None if there is none.
        down: the weight ``(n, C)`` and bias of the down projection.
        depthwise: the weight ``(n, 1, k, k)``, ``k`` odd, and bias of each depthwise convolution.
        pointwise: the weight ``(n, n, 1, 1)`` and bias of the 1x1 convolution.
        up: the weight ``(C, n)`` and bias of the up projection.
        filter_scale: the factor on the sum of the depthwise convolutions.
        dropout: the drop probability.
        exact: whether the dropout mask is the one that ``torch.nn.functional.dropout`` draws. Otherwise it is drawn, on
            a CPU, from a quarter of the random numbers, with a probability that is rounded to a multiple of 2^-16.
        keeps: keep ``x`` and the results of the convolutions for the backward pass, in place of computing them again.
        kernels: the parts that run as Triton kernels, with the same results within rounding.

    Raises:
        RuntimeError: if the result is differentiated twice.
    """
    eps = norm.eps if norm else None
    entrance = norm[:4] if norm else (None,) * 4
    filters = [tensor for conv in depthwise for tensor in conv]
    settings = _Settings(hw, eps, filter_scale, dropout, exact, keeps, kernels)
    return _Mona.apply(x, settings, *entrance, *down, *pointwise, *up, *filters)


class _Settings(NamedTuple):
    """The arguments of :func:`mona` that are no tensors, with the ``eps`` of the norm, or None without one."""

    hw: tuple[int, int]
    eps: float | None
    scale: float
    dropout: float
    exact: bool
    keeps: bool
    kernels: Kernels


class _Mona(torch.autograd.Function):
    # params are the weight, bias, gamma and gammax of the norm (or four times None), the weight and bias of down,
    # pointwise and up, and those of each depthwise convolution. Lists of gradients have the same order.

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings, *params):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x = x.contiguous()
            parts = _parts(settings.kernels)
            hidden, mean, rstd = parts.down(x, settings.eps, params[:6], dtype)
            filters = list(zip(params[10::2], params[11::2], strict=True))
            kernel, kernel_bias = merged_filters(filters, settings.scale)
            mixing = [t.to(dtype) for t in (kernel, kernel_bias, params[6].flatten(1), params[7])]
            q, r = _mix(hidden, settings.hw, *mixing, parts.convolve)
            activated = mask = None
            if settings.dropout:
                mask, drop = _draw_mask(r, settings.dropout, settings.exact)
                settings = settings._replace(dropout=drop)
            if settings.keeps or parts.up is None:
                activated = _dropped(F.gelu(r), mask, settings.dropout)
            if parts.up is None:
                out = linear(activated, params[8].to(dtype), params[9].to(dtype))
                out = out.add_(x) if out.dtype == x.dtype else x + out
            else:
                out = parts.up(x, r, mask, settings.dropout, params[8], params[9])
        ctx.keeps_out = x.dtype.itemsize >= 4 and not settings.keeps
        mixed = (q, r, activated) if settings.keeps else (None, None, None)
        ctx.save_for_backward(out if ctx.keeps_out else x, mean, rstd, hidden, mask, *mixed, *mixing, *params)
        ctx.settings, ctx.dtype = settings, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        with torch.autocast(grad.device.type, enabled=False):
            return _backward(ctx, grad)


def kernels_fit(x: Tensor, bottleneck: int, kernel_size: int) -> bool:
    """Whether the Triton kernels can compute the parts of :func:`mona` for tokens ``x``."""
    device = x.device.type
    if device != 'cuda' or not _has_triton():
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    is_known = dtype in dtypes and x.dtype in (dtype, torch.float32)
    return is_known and bottleneck <= _WIDEST and kernel_size <= _LARGEST_KERNEL


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec('triton') is not None


class _Parts(NamedTuple):
    """The functions that compute the parts; the plain form of ``up``, None, is in the functions that need it."""

    down: Callable
    convolve: Callable
    filter_gradients: Callable
    up: Callable | None


@functools.cache
def _parts(kernels: Kernels) -> _Parts:
    if kernels == 'none':
        return _Parts(_down, _convolve, _filter_sums, None)
    from mona_mm.methods import triton_mona  # here, because importing Triton takes seconds

    if kernels == 'convolutions':
        return _Parts(_down, triton_mona.convolve, triton_mona.filter_gradients, None)
    return _Parts(triton_mona.down, triton_mona.convolve, triton_mona.filter_gradients, triton_mona.up)


def _down(x: Tensor, eps: float | None, params: Sequence[Tensor], dtype: torch.dtype):
    """Compute the hidden state, and the mean and reciprocal standard deviation of every token."""
    weight, bias, gamma, gammax, down, down_bias = params
    mean = rstd = None
    s = x
    if eps is not None:
        stat = x if x.dtype == weight.dtype else x.to(weight.dtype)
        s, mean, rstd = torch.native_layer_norm(stat, x.shape[-1:], gamma * weight, gamma * bias, eps)
        s.addcmul_(stat, gammax)
    return linear(s.to(dtype), down.to(dtype), down_bias.to(dtype)), mean, rstd


def _draw_mask(like: Tensor, probability: float, exact: bool) -> tuple[Tensor, float]:
    """Draw a mask that is False with the given probability; return it and the probability with which it is so.

    A random number of 64 bits makes four elements, of 16 bits each.
    """
    if exact or like.device.type != 'cpu':
        return torch.native_dropout(like, probability, True)[1], probability
    count, steps = like.numel(), min(round(probability * 2**16), 2**16 - 1)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[:count] >= steps - 2**15).view(like.shape), steps / 2**16


def _dropped(hidden: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """Apply dropout by a known mask, in place.

    Not by ``native_dropout``, which rounds the factor in half precision on CPUs.
    """
    return hidden if mask is None else hidden.mul_(mask).mul_(1 / (1 - probability))


def merged_filters(depthwise: Sequence[tuple[Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """The weight and bias of the depthwise convolution that equals ``scale`` times the sum of several."""
    widest, *others = sorted((weight for weight, _ in depthwise), key=lambda weight: -weight.shape[-1])
    kernel = widest * scale
    for weight in others:
        _centre(kernel, weight.shape[-1]).add_(weight, alpha=scale)
    bias = depthwise[0][1] * scale
    for _, other in depthwise[1:]:
        bias.add_(other, alpha=scale)
    return kernel, bias


def _centre(kernel: Tensor, size: int) -> Tensor:
    border = (kernel.shape[-1] - size) // 2
    return kernel[..., border : border + size, border : border + size]


def _grid(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """View the last ``H*W`` of the tokens ``(B, N, n)`` as a grid ``(B, n, H, W)``, without a copy."""
    return tokens[:, tokens.shape[1] - hw[0] * hw[1] :].unflatten(1, hw).permute(0, 3, 1, 2)


def _tokens(grid: Tensor) -> Tensor:
    """Bring a grid ``(B, n, H, W)`` to tokens ``(B, H*W, n)``, with a copy only if it is not channels-last."""
    return grid.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _convolve(tokens: Tensor, hw: tuple[int, int], kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve the grid of tokens ``(B, N, n)`` depthwise and add the grid itself; return tokens ``(B, H*W, n)``."""
    grid = _grid(tokens, hw)
    out = F.conv2d(grid, kernel, bias, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
    return _tokens(out).add_(_tokens(grid))


def _filter_sums(grad: Tensor, tokens: Tensor, hw: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the kernel and the bias of :func:`_convolve` from that of its output."""
    grad = _grid(grad, hw)
    return kernel_gradient(grad, _grid(tokens, hw), size), grad.sum((0, 2, 3))


def _mix(
    p: Tensor,
    hw: tuple[int, int],
    kernel: Tensor,
    kernel_bias: Tensor,
    pointwise: Tensor,
    pointwise_bias: Tensor,
    convolve: Callable,
) -> tuple[Tensor, Tensor]:
    """Compute ``q (B, H*W, n)`` of the grid and ``r (B, N, n)`` of all tokens; see :class:`mona_mm.methods.Mona`."""
    q = convolve(p, hw, kernel, kernel_bias)
    r = linear(q, pointwise, pointwise_bias).add_(q)
    extra = p.shape[1] - r.shape[1]
    return q, torch.cat((p[:, :extra], r), 1) if extra else r


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, hidden, mask, q, r, activated, *tensors = ctx.saved_tensors
    kernel, kernel_bias, pointwise, pointwise_bias, *params = tensors
    need = ctx.needs_input_grad
    need_x, need_down, need_pointwise, need_up = need[0], any(need[2:8]), any(need[8:10]), any(need[10:12])
    need_filters = any(need[12:])
    hw, drop, dtype, batch = ctx.settings.hw, ctx.settings.dropout, ctx.dtype, x.shape[0]
    parts, grads = _parts(ctx.settings.kernels), [None] * len(params)

    if r is None:
        q, r = _mix(hidden, hw, kernel, kernel_bias, pointwise, pointwise_bias, parts.convolve)
    g = grad.contiguous().to(dtype).view(-1, grad.shape[-1])  # (B*N, C)

    recomputes_x = ctx.keeps_out and (need_down or (need_x and mean is not None))
    if activated is None and (need_up or (recomputes_x and parts.up is None)):
        activated = _dropped(F.gelu(r), mask, drop)
    if recomputes_x and parts.up is not None:
        x = parts.up(x, r, mask, drop, params[8], params[9], -1)
    elif recomputes_x:  # by the operations of the forward, so that the branch is the same
        branch = linear(activated, params[8].to(dtype), params[9].to(dtype))
        x = torch.sub(x, branch, out=branch if branch.dtype == x.dtype else None)
        del branch
    if need_up:
        grads[8] = over_tokens(activated.flatten(0, 1), g).t()
        grads[9] = g.sum(0)
    if not (need_x or need_down or need_filters or need_pointwise):
        return _returned(ctx, None, grads)

    dr = _dropped(linear(g, params[8].to(dtype).t()).view_as(r), mask, drop)
    dr = torch.ops.aten.gelu_backward(dr, r)
    extra = r.shape[1] - q.shape[1]
    dr_grid = dr[:, extra:].reshape(-1, dr.shape[-1])  # (B*H*W, n)
    if need_pointwise:
        grads[6] = over_tokens(dr_grid, q.flatten(0, 1)).view_as(params[6])
        grads[7] = dr_grid.sum(0)
    if not (need_x or need_down or need_filters):
        return _returned(ctx, None, grads)

    dq = linear(dr_grid, pointwise.t()).add_(dr_grid).view(batch, hw[0] * hw[1], -1)
    if need_filters:
        sums = parts.filter_gradients(dq, hidden, hw, kernel.shape[-1])
        _filter_gradients(grads, params[10:], *sums, ctx.settings.scale)
    if not (need_x or need_down):
        return _returned(ctx, None, grads)

    dp = parts.convolve(dq, hw, kernel.flip(2, 3))
    if extra:
        dp = torch.cat((dr[:, :extra], dp), 1)
    dp = dp.flatten(0, 1)  # (B*N, n)
    x = x.flatten(0, 1)
    if need_down:
        _down_gradients(grads, params[:6], x, mean, rstd, dp)
    if not need_x:
        return _returned(ctx, None, grads)

    dx = _input_gradient(grad.flatten(0, 1), params[:5], x, mean, rstd, dp)
    return _returned(ctx, dx.to(x.dtype).view_as(grad), grads)


def _returned(ctx: Any, dx: Tensor | None, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:], strict=True))
    return (dx, None, *wanted)


def _input_gradient(
    grad: Tensor, params: Sequence[Tensor], x: Tensor, mean: Tensor | None, rstd: Tensor | None, dp: Tensor
) -> Tensor:
    """Compute the gradient of the tokens ``x (B*N, C)`` from those of the output and of the hidden state."""
    weight, _, gamma, gammax, down = params
    ds = linear(dp, down.to(dp.dtype).t()).to(grad.dtype if mean is None else weight.dtype)
    if mean is None:
        return ds.add_(grad)
    dx = torch.ops.aten.native_layer_norm_backward(
        ds, x.to(ds.dtype), x.shape[-1:], mean.view(-1, 1), rstd.view(-1, 1), gamma * weight, None, [True, False, False]
    )[0]
    return dx.addcmul_(ds, gammax).add_(grad)


def _filter_gradients(
    grads: list[Tensor | None], filters: Sequence[Tensor], merged: Tensor, bias: Tensor, scale: float
) -> None:
    """Write the gradients of the depthwise convolutions, each of which is the centre of the merged kernel's, to
    ``grads``."""
    merged = merged.to(filters[0].dtype) * scale
    bias = bias.to(filters[1].dtype) * scale
    for i in range(0, len(filters), 2):
        grads[10 + i] = _centre(merged, filters[i].shape[-1]).contiguous()
        grads[11 + i] = bias.clone()


def _down_gradients(
    grads: list[Tensor | None],
    params: Sequence[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    dp: Tensor,
) -> None:
    r"""Write the gradients of the down projection and the scaled norm to ``grads``.

    They follow from :math:`P = dp^T x` and :math:`Q = dp^T \hat x`. With the normalised tokens :math:`\hat x` and
    :math:`s = \gamma (w \hat x + b) + \gamma_x x`, the projection's gradient is
    :math:`dp^T s = \gamma w Q + \gamma b \textstyle\sum dp + \gamma_x P`. The norm's gradients are sums over tokens of
    :math:`ds = dp\,W` times :math:`x` or :math:`\hat x`, which equal sums over the ``n`` rows of :math:`W` times
    :math:`P` or :math:`Q`.
    """
    weight, bias, gamma, gammax, down, _ = params
    total = dp.sum(0, dtype=down.dtype)
    if mean is None:
        grads[4], grads[5] = over_tokens(dp, x.to(dp.dtype)), total
        return
    n = dp.shape[1]
    mean, rstd = mean.view(-1, 1), rstd.view(-1, 1)
    if dp.dtype.itemsize >= 4:
        p, q = over_tokens(torch.cat((dp, dp * rstd), 1), x).split(n)
        q = q - dp.t().mm(mean * rstd)
    else:  # half precision would lose too much beside a mean far from zero
        centred = torch.sub(x, mean, out=torch.empty_like(x, dtype=dp.dtype))
        scale = rstd.mean()  # the reciprocal of a large deviation would underflow in float16
        stacked = torch.cat((dp, (dp * (rstd / scale)).to(dp.dtype)), 1)
        p, q = over_tokens(stacked, centred).to(weight.dtype).split(n)
        q = q * scale
        p = p + dp.to(weight.dtype).t().mm(mean.to(weight.dtype))
    grads[4] = q.mul(gamma * weight).addcmul_(p, gammax).addcmul_(total[:, None], gamma * bias)
    grads[5] = total
    dnorm = (down * q).sum(0)  # the gradient of gamma * weight
    dbias = total @ down  # the gradient of gamma * bias
    grads[0], grads[1] = dnorm * gamma, dbias * gamma
    grads[2] = dnorm * weight + dbias * bias
    grads[3] = (down * p).sum(0)
