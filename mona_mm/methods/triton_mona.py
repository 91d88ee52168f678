"""Parts of Mona's fast form as Triton kernels for CUDA, each with the signature of its plain form in ``fast_mona.py``.

A kernel reads and writes wide tensors once where the plain form does so several times, and the depthwise convolution
works on tokens as they are in memory. Sums are in float32 and have a fixed order, so that equal inputs give equal bits.

Importing this module imports Triton. It is imported where a tensor is on a GPU, and by nothing else.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNKS = 256
"""The number of partial sums of a filter gradient, at most."""


def _reported(function: Callable) -> Callable:
    """Let a kernel that cannot be compiled or launched be told once, and raise an error by which it is not chosen."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:  # of which the first is a tensor
        try:
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device
                return function(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's have no class in common
            _warn(function.__name__, f'{type(error).__name__}: {error}')
            raise RuntimeError(f'the Triton kernel of {function.__name__!r} failed: {error}') from error

    return run


@functools.cache
def _warn(name: str, error: str) -> None:
    warnings.warn(f'The Triton kernel of {name!r} failed, so other forms are used: {error[:500]}', stacklevel=2)


@_reported
def down(
    x: Tensor, eps: float | None, params: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the scaled LayerNorm and the down projection.

    Args:
        x: the tokens ``(B, N, C)``, contiguous.
        eps: the epsilon of the norm; None if there is no norm.
        params: the weight, bias, gamma and gammax of the norm, and the weight ``(n, C)`` and bias of the projection.
        dtype: the type of the product.

    Returns:
        The hidden state ``(B, N, n)``, and the mean and reciprocal standard deviation ``(B, N, 1)`` in float32, or
        twice None.
    """
    weight, bias, gamma, gammax, projection, projection_bias = params
    tokens, channels, width = x.numel() // x.shape[-1], x.shape[-1], projection.shape[0]
    out = torch.empty(*x.shape[:-1], width, dtype=dtype, device=x.device)
    has_norm = eps is not None
    mean = rstd = None
    if has_norm:
        mean, rstd = (torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device) for _ in range(2))
    rows, wide, narrow = _blocks(dtype, width)
    _down_kernel[(triton.cdiv(tokens, rows),)](
        x,
        *(t if has_norm else projection for t in (weight, bias, gamma, gammax)),
        projection.contiguous(),
        projection_bias,
        out,
        mean if has_norm else out,
        rstd if has_norm else out,
        tokens,
        channels,
        width,
        eps or 0.0,
        HAS_NORM=has_norm,
        ROWS=rows,
        WIDE=wide,
        NARROW=narrow,
        PRECISION=_precision(),
        WIDENS=_WIDENS,
    )
    return out, mean, rstd


@_reported
def convolve(tokens: Tensor, hw: tuple[int, int], kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve the grid of tokens depthwise, and add the grid itself.

    Args:
        tokens: the tokens ``(B, N, n)``, contiguous, of which the last ``H*W`` are the row-major grid.
        hw: the grid ``(H, W)``.
        kernel: the kernel ``(n, 1, k, k)``, ``k`` odd.
        bias: the bias ``(n,)``.

    Returns:
        The convolved grid as tokens ``(B, H*W, n)``.
    """
    (batch, count, channels), places, size = tokens.shape, hw[0] * hw[1], kernel.shape[-1]
    out = tokens.new_empty(batch, places, channels)
    rows, narrow = 32, _narrow_block(channels)
    _convolve_kernel[triton.cdiv(batch * places, rows), triton.cdiv(channels, narrow)](
        tokens,
        kernel.contiguous(),
        kernel if bias is None else bias,
        out,
        batch * places,
        *hw,
        channels,
        count,
        SIZE=size,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        NARROW=narrow,
    )
    return out


@_reported
def filter_gradients(grad: Tensor, tokens: Tensor, hw: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the kernel and the bias of :func:`convolve`.

    Args:
        grad: the gradient of the output, ``(B, H*W, n)``, contiguous.
        tokens: the input of :func:`convolve`, ``(B, N, n)``, contiguous.
        hw: the grid ``(H, W)``.
        size: the side of the kernel.

    Returns:
        The gradients ``(n, 1, size, size)`` and ``(n,)``, in float32.
    """
    (batch, places, channels), count = grad.shape, tokens.shape[1]
    rows, narrow, taps = 32, _narrow_block(channels), triton.next_power_of_2(size + 1)
    steps = triton.cdiv(batch * places, rows)
    steps_of_one = triton.cdiv(steps, min(steps, _CHUNKS))
    chunks = triton.cdiv(steps, steps_of_one)
    sums = torch.empty(chunks, size, taps, channels, dtype=torch.float32, device=grad.device)
    _filter_kernel[chunks, triton.cdiv(channels, narrow), size](
        grad,
        tokens,
        sums,
        batch * places,
        *hw,
        channels,
        count,
        steps_of_one,
        SIZE=size,
        TAPS=taps,
        ROWS=rows,
        NARROW=narrow,
    )
    total = sums.sum(0)
    return total[:, :size].permute(2, 0, 1).unsqueeze(1), total[0, size]


@_reported
def up(
    base: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    dropout: float,
    weight: Tensor,
    bias: Tensor,
    sign: int = 1,
) -> Tensor:
    """Compute GELU, dropout and the up projection, and add them to, or subtract them from, the tokens.

    The same branch is computed for both signs, so that subtracting it undoes adding it, but for the rounding of the
    sum.

    Args:
        base: the tokens ``(B, N, C)``, contiguous.
        hidden: the input of the GELU ``(B, N, n)``, contiguous, in the type of the product.
        mask: the dropout mask ``(B, N, n)`` of booleans; None if nothing is dropped.
        dropout: the drop probability.
        weight: the weight ``(C, n)``.
        bias: the bias ``(C,)``.
        sign: 1 to add, -1 to subtract.

    Returns:
        The sum ``(B, N, C)``, in the type of ``base``.
    """
    width, channels = hidden.shape[-1], base.shape[-1]
    tokens = base.numel() // channels
    out = torch.empty_like(base)
    rows, wide, narrow = _blocks(hidden.dtype, width)
    _up_kernel[(triton.cdiv(tokens, rows),)](
        base,
        hidden,
        hidden if mask is None else mask.view(torch.uint8),
        weight.contiguous(),
        bias,
        out,
        tokens,
        channels,
        width,
        1 / (1 - dropout),
        SIGN=sign,
        HAS_MASK=mask is not None,
        ROWS=rows,
        WIDE=wide,
        NARROW=narrow,
        PRECISION=_precision(),
        WIDENS=_WIDENS,
    )
    return out


def _blocks(dtype: torch.dtype, width: int) -> tuple[int, int, int]:
    """The sides of a block: tokens, channels of the stream, and the whole bottleneck."""
    narrow = max(16, triton.next_power_of_2(width))
    rows = 64 if dtype.itemsize < 4 and narrow <= 64 else 32
    return rows, 64 if narrow <= 128 else 32, narrow


def _narrow_block(channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(channels)))


_WIDENS = os.environ.get('TRITON_INTERPRET') == '1'
"""Whether products of half precision have their factors converted to float32: Triton's interpreter, in which tests run
the kernels on a CPU, would multiply the bits of bfloat16 as integers."""


def _precision() -> str:
    """The precision of float32 products, as torch is set."""
    return 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'ieee'


@triton.jit
def _statistics(first, is_row, channels, eps, ROWS: tl.constexpr, WIDE: tl.constexpr):
    # The mean and reciprocal standard deviation of rows that begin at the pointers ``first (ROWS, 1)``, in parts by
    # Chan's formula, which a mean far from zero does not harm.
    centre = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)  # of the distances from the mean
    for start in range(0, channels, WIDE):
        wide = start + tl.arange(0, WIDE)
        is_wide = wide < channels
        value = tl.load(first + wide[None, :], mask=is_row[:, None] & is_wide[None, :], other=0.0).to(tl.float32)
        size = tl.minimum(channels - start, WIDE).to(tl.float32)
        part = tl.sum(value, 1) / size
        distance = tl.where(is_wide[None, :], value - part[:, None], 0.0)
        share = size / (start + size)
        squares += tl.sum(distance * distance, 1) + (part - centre) * (part - centre) * (start * share)
        centre += (part - centre) * share
    return centre, 1.0 / tl.sqrt(squares / channels + eps)


@triton.jit
def _down_kernel(
    x,
    weight,
    bias,
    gamma,
    gammax,
    projection,
    projection_bias,
    out,
    mean,
    rstd,
    tokens,
    channels,
    width,
    eps,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, NARROW)
    is_row = row < tokens
    start_of_row = row.to(tl.int64)[:, None] * channels
    centre = tl.zeros((ROWS,), tl.float32)
    scale = tl.zeros((ROWS,), tl.float32)
    if HAS_NORM:
        centre, scale = _statistics(x + start_of_row, is_row, channels, eps, ROWS, WIDE)
        tl.store(mean + row, centre, mask=is_row)
        tl.store(rstd + row, scale, mask=is_row)
    total = tl.zeros((ROWS, NARROW), tl.float32)
    for start in range(0, channels, WIDE):
        wide = start + tl.arange(0, WIDE)
        is_wide = wide < channels
        value = tl.load(x + start_of_row + wide[None, :], mask=is_row[:, None] & is_wide[None, :], other=0.0)
        if HAS_NORM:
            value = value.to(tl.float32)
            of_weight = tl.load(weight + wide, mask=is_wide, other=0.0).to(tl.float32)
            of_bias = tl.load(bias + wide, mask=is_wide, other=0.0).to(tl.float32)
            of_gamma = tl.load(gamma + wide, mask=is_wide, other=0.0).to(tl.float32)
            of_gammax = tl.load(gammax + wide, mask=is_wide, other=0.0).to(tl.float32)
            normal = (value - centre[:, None]) * scale[:, None] * of_weight[None, :] + of_bias[None, :]
            value = normal * of_gamma[None, :] + value * of_gammax[None, :]
        matrix = tl.load(
            projection + column[None, :] * channels + wide[:, None],
            mask=(column < width)[None, :] & is_wide[:, None],
            other=0.0,
        )
        value, matrix = value.to(out.dtype.element_ty), matrix.to(out.dtype.element_ty)
        if WIDENS:
            value, matrix = value.to(tl.float32), matrix.to(tl.float32)
        total = tl.dot(value, matrix, total, input_precision=PRECISION)
    total += tl.load(projection_bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & (column < width)[None, :])


@triton.jit
def _convolve_kernel(
    tokens,
    kernel,
    bias,
    out,
    places,
    height,
    width,
    channels,
    count,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    NARROW: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * NARROW + tl.arange(0, NARROW)
    is_place, is_channel = place < places, channel < channels
    image = place // (height * width)
    y = place % (height * width) // width
    x = place % (height * width) % width
    first = image.to(tl.int64) * count + (count - height * width)  # the token that the grid of the image begins with
    here = (first + place % (height * width)) * channels
    total = tl.load(
        tokens + here[:, None] + channel[None, :], mask=is_place[:, None] & is_channel[None, :], other=0.0
    ).to(tl.float32)
    for i in range(SIZE):  # unrolled as a whole, 49 taps would take the compiler more than a minute
        for j in tl.static_range(SIZE):
            row, column = y + (i - SIZE // 2), x + (j - SIZE // 2)
            is_inside = is_place & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = (first + row * width + column) * channels
            value = tl.load(
                tokens + offset[:, None] + channel[None, :], mask=is_inside[:, None] & is_channel[None, :], other=0.0
            ).to(tl.float32)
            tap = tl.load(kernel + channel * (SIZE * SIZE) + (i * SIZE + j), mask=is_channel, other=0.0)
            total += value * tap.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    offset = place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=is_place[:, None] & is_channel[None, :])


@triton.jit
def _filter_kernel(
    grad,
    tokens,
    sums,
    places,
    height,
    width,
    channels,
    count,
    steps,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    NARROW: tl.constexpr,
):
    # One row of the kernel for some places: its taps in the first slots, and the sum for the bias in the next one.
    chunk, i = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * NARROW + tl.arange(0, NARROW)
    is_channel = channel < channels
    slot = tl.arange(0, TAPS)
    total = tl.zeros((TAPS, NARROW), tl.float32)
    for step in range(steps):
        place = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        is_place = place < places
        image = place // (height * width)
        y = place % (height * width) // width
        x = place % (height * width) % width
        first = image.to(tl.int64) * count + (count - height * width)
        offset = place.to(tl.int64)[:, None] * channels + channel[None, :]
        of_output = tl.load(grad + offset, mask=is_place[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        row = y + i - SIZE // 2
        is_inside = is_place & (row >= 0) & (row < height)
        for j in tl.static_range(SIZE):
            column = x + (j - SIZE // 2)
            is_value = is_inside & (column >= 0) & (column < width)
            offset = (first + row * width + column) * channels
            value = tl.load(
                tokens + offset[:, None] + channel[None, :], mask=is_value[:, None] & is_channel[None, :], other=0.0
            ).to(tl.float32)
            total += tl.where((slot == j)[:, None], tl.sum(of_output * value, 0)[None, :], 0.0)
        total += tl.where((slot == SIZE)[:, None], tl.sum(of_output, 0)[None, :], 0.0)
    offset = ((chunk * SIZE + i) * TAPS + slot)[:, None] * channels + channel[None, :]
    tl.store(sums + offset, total, mask=is_channel[None, :] & (slot <= SIZE)[:, None])


@triton.jit
def _up_kernel(
    base,
    hidden,
    mask,
    weight,
    bias,
    out,
    tokens,
    channels,
    width,
    scale,
    SIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, NARROW)
    is_row, is_column = row < tokens, column < width
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    is_place = is_row[:, None] & is_column[None, :]
    value = tl.load(hidden + place, mask=is_place, other=0.0).to(tl.float32)
    value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    if HAS_MASK:
        value = tl.where(tl.load(mask + place, mask=is_place, other=0) != 0, value * scale, 0.0)
    value = value.to(hidden.dtype.element_ty)
    if WIDENS:
        value = value.to(tl.float32)
    for start in range(0, channels, WIDE):
        wide = start + tl.arange(0, WIDE)
        is_wide = wide < channels
        matrix = tl.load(
            weight + wide[None, :] * width + column[:, None], mask=is_wide[None, :] & is_column[:, None], other=0.0
        )
        matrix = matrix.to(hidden.dtype.element_ty).to(value.dtype)
        branch = tl.dot(value, matrix, input_precision=PRECISION)
        branch += tl.load(bias + wide, mask=is_wide, other=0.0).to(tl.float32)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + wide[None, :]
        is_token = is_row[:, None] & is_wide[None, :]
        token = tl.load(base + offset, mask=is_token, other=0.0).to(tl.float32)
        tl.store(out + offset, (token + SIGN * branch).to(out.dtype.element_ty), mask=is_token)
