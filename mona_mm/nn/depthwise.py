"""Depthwise convolutions whose kernels train: their gradient, for which there are several ways on a CPU."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mona_mm.nn.choice import Ways, bucket


def kernel_gradient(grad: Tensor, grid: Tensor, size: int) -> Tensor:
    """Compute the gradient of a ``size x size`` depthwise kernel, whose padding keeps the size of the grid.

    On a CPU there are torch's own function and a correlation, by a depthwise convolution of the padded grid that has
    the gradient as its kernel. It works on strips of rows, so that no sum gets too long for the precision of the dtype.

    Args:
        grad: the gradient of the output, ``(B, n, H, W)``.
        grid: the input, ``(B, n, H, W)``.
        size: the size of the kernel, an odd number.

    Returns:
        The gradient ``(n, 1, size, size)``.
    """
    if grid.device.type != 'cpu' or not grid.numel():
        return _by_torch(grad, grid, size)
    batch, n, height, width = grid.shape
    return _GRADIENT(grad, grid, size, key=(grid.dtype, size, n, bucket(batch), bucket(height), bucket(width)))


def _by_torch(grad: Tensor, grid: Tensor, size: int) -> Tensor:
    n, pad = grid.shape[1], size // 2
    kernel = grid.new_empty(n, 1, size, size)
    return torch.ops.aten.convolution_backward(
        grad, grid, kernel, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], n, [False, True, False]
    )[1]


def _by_correlation(grad: Tensor, grid: Tensor, size: int, strip: int) -> Tensor:
    batch, n, height, width = grid.shape
    pad = size // 2
    strips = -(-height // strip)
    rows = -(-height // strips)
    missing = strips * rows - height
    grid = F.pad(grid, (pad, pad, pad, pad + missing)).unfold(2, rows + 2 * pad, rows)  # (B, n, strips, width, rows)
    grid = grid.transpose(3, 4).reshape(1, batch * n * strips, rows + 2 * pad, width + 2 * pad)
    grad = F.pad(grad, (0, 0, 0, missing)).reshape(batch * n * strips, 1, rows, width)
    out = F.conv2d(grid, grad, groups=batch * n * strips)
    return out.view(batch, n, strips, 1, size, size).sum((0, 2))


_GRADIENT = Ways(
    'depthwise_gradient',
    strips_of_32=partial(_by_correlation, strip=32),
    strips_of_8=partial(_by_correlation, strip=8),
    stock=_by_torch,
)


def convolve(grid: Tensor, kernel: Tensor, bias: Tensor | None = None, fast: bool = True) -> Tensor:
    """Convolve a grid depthwise, with padding that keeps its size.

    Args:
        grid: the grid, ``(B, n, H, W)``.
        kernel: the kernel, ``(n, 1, k, k)``, ``k`` odd, of the same dtype, except within autocast.
        bias: the bias, ``(n,)``.
        fast: whether the backward pass may use :func:`kernel_gradient`. Tracers cannot record it.

    Returns:
        The convolved grid, ``(B, n, H, W)``.
    """
    has_ways = grid.device.type == 'cpu' and kernel.requires_grad and grid.dtype == kernel.dtype
    if fast and has_ways and bias is None:
        return _Convolution.apply(grid, kernel)
    return F.conv2d(grid, kernel, bias, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])


class _Convolution(torch.autograd.Function):
    # Forward and backward run in the dtype that they are given, also within autocast, and can be differentiated again.

    @staticmethod
    def forward(ctx: Any, grid: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(grid, kernel)
        with torch.autocast(grid.device.type, enabled=False):
            return F.conv2d(grid, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grid, kernel = ctx.saved_tensors
        needs_grid, needs_kernel = ctx.needs_input_grad
        size = kernel.shape[-1]
        with torch.autocast(grad.device.type, enabled=False):
            of_grid = F.conv2d(grad, kernel.flip(2, 3), padding=size // 2, groups=len(kernel)) if needs_grid else None
            return of_grid, kernel_gradient(grad, grid, size) if needs_kernel else None
