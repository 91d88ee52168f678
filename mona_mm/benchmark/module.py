"""The time and memory of all the Mona modules of a Swin, forward and backward, compared with the published formula.

Every block has two modules, with the width and the grid of its stage. One module of each stage is timed, and its time
is multiplied by the number of modules in the stage. The variants are:

=============  ========================================================================================================
``fast``       :class:`mona_mm.methods.Mona` as it runs by default, in its fast form (:mod:`mona_mm.methods.fast_mona`)
``plain``      the same module with ``fast = False``
``published``  the operations of Mona's published code, one by one: three convolutions of a channels-last view
``adapter``    for comparison, :class:`mona_mm.methods.Adapter` of the same width, without convolutions and norm
=============  ========================================================================================================
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.benchmark.timing import cells, heading, kept_bytes, seconds, take_turns, times, times_floor, with_spread
from mona_mm.methods import Adapter, Mona
from mona_mm.nn.products import linear

SWINS = {'swin_t': (96, (2, 2, 6, 2)), 'swin_b': (128, (2, 2, 18, 2)), 'swin_l': (192, (2, 2, 18, 2))}
"""The width of the first stage and the number of blocks in each stage, by backbone."""

SIZES = ((224, 224), (512, 512), (800, 1216))


@dataclass(frozen=True)
class Row:
    """The figures of one variant, summed over the modules of a backbone.

    Times are in milliseconds and sizes in MiB; a spread is the first and the third quartile.

    Args:
        step: the time of the forward and backward of a training step, including the gradient of the input.
        ratio: the ratio of ``step`` to that of ``fast`` in the same round.
        kept: the memory that is kept for the backward pass, without the parameters.
        peak: on CUDA, the most memory that one step of the module of the first stage allocates.
        difference: the largest difference of the output and the gradients from those of ``published``, each relative to
            its largest value.
        floor: the time that the necessary operations or the necessary transfer of bytes would take at the measured
            rates of this machine, whichever is longer.
        floor_ratio: the ratio of ``step`` to ``floor``.
    """

    host: str
    size: tuple[int, int]
    batch: int
    dtype: str
    variant: str
    step: float
    step_spread: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    kept: float
    peak: float | None
    difference: float | None
    floor: float | None
    floor_ratio: float | None


class PublishedMona(nn.Module):
    """The operations of the published code on the parameters of a Mona module.

    Args:
        mona: the module whose parameters are used.
    """

    def __init__(self, mona: Mona) -> None:
        super().__init__()
        self.mona = mona

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        m, (batch, tokens, _), grid = self.mona, x.shape, hw[0] * hw[1]
        p = m.down(m.entrance.norm(x) * m.entrance.gamma + x * m.entrance.gammax)
        others, p = p.split((tokens - grid, grid), 1)  # class and register tokens, which a Swin does not have
        p = p.reshape(batch, *hw, -1).permute(0, 3, 1, 2)
        q = (m.depthwise[0](p) + m.depthwise[1](p) + m.depthwise[2](p)) / 3 + p
        r = q + m.pointwise(q)
        r = r.permute(0, 2, 3, 1).reshape(batch, grid, -1)
        r = torch.cat((others, r), 1) if tokens > grid else r
        return x + m.up(m.dropout(F.gelu(r)))


def _module(variant: str, channels: int) -> nn.Module:
    torch.manual_seed(0)
    if variant == 'adapter':
        return Adapter(channels).train()
    module = Mona(channels).train()
    module.fast = variant == 'fast'
    return PublishedMona(module) if variant == 'published' else module


VARIANTS = ('fast', 'plain', 'published', 'adapter')


class _Case:
    """A module of one stage with its input and the gradient of its output."""

    def __init__(self, variant: str, device: str, dtype: torch.dtype, batch: int, channels: int, hw: tuple[int, int]):
        self.module = _module(variant, channels).to(device)
        self.x = torch.randn(batch, hw[0] * hw[1], channels, device=device, requires_grad=True)
        self.grad = torch.randn_like(self.x)
        self.hw = hw
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)

    def forward(self) -> Tensor:
        with self.autocast:
            return self.module(self.x, self.hw)

    def step(self) -> None:
        self.x.grad = None
        self.module.zero_grad()
        self.forward().backward(self.grad)

    def peak(self) -> int | None:
        """The most bytes that a step allocates in addition to those allocated before it; None if not on CUDA."""
        if self.x.device.type != 'cuda':
            return None
        self.step()
        before = torch.cuda.memory_allocated(self.x.device)
        torch.cuda.reset_peak_memory_stats(self.x.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.x.device) - before

    def results(self) -> list[Tensor]:
        torch.manual_seed(1)
        self.x.grad = None
        self.module.zero_grad()
        out = self.forward()
        out.backward(self.grad)
        return [out.detach(), self.x.grad, *(p.grad for p in self.module.parameters())]


def _difference(case: _Case, other: _Case) -> float:
    other.x, other.grad = case.x, case.grad
    fast = getattr(case.module, 'fast', False)
    if fast:
        case.module.fast = 'exact'  # the dropout masks of the others
    pairs = zip(case.results(), other.results(), strict=True)
    if fast:
        case.module.fast = fast
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def work(batch: int, channels: int, hw: tuple[int, int], itemsize: int, bottleneck: int = 64) -> tuple[float, float]:
    """The operations and the bytes that a step of a Mona module needs in any variant, at ``itemsize`` bytes a number.

    The operations are those of the two projections, the 1x1 convolution and one 7x7 depthwise convolution, each once
    in the forward and twice in the backward. As for bytes, the forward reads x and writes y, the backward reads dy and
    x and writes dx, and the hidden state is written and read once.
    """
    tokens = batch * hw[0] * hw[1]
    operations = 3 * 2 * tokens * (2 * channels * bottleneck + bottleneck**2 + 49 * bottleneck)
    return operations, itemsize * tokens * (5 * channels + 2 * bottleneck)


def rates(device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Measure the operations per second of a matrix product, and the bytes per second that a copy reads and writes."""
    side = 8192 if torch.device(device).type == 'cuda' else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    numbers = torch.randn(1 << 26, device=device)
    copy = torch.empty_like(numbers)
    product = min(seconds(lambda: linear(a, b), device, clock) for _ in range(9))
    moved = min(seconds(lambda: copy.copy_(numbers), device, clock) for _ in range(9))
    return 2 * side**3 / product, 2 * numbers.nbytes / moved


def run(
    device: str = 'cpu',
    repeats: int = 9,
    hosts: Sequence[str] = tuple(SWINS),
    sizes: Sequence[tuple[int, int]] = SIZES,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Measure every variant on every backbone at every size, and yield each row as soon as it is measured.

    The variants take turns, as :func:`~mona_mm.benchmark.timing.take_turns` describes.

    Args:
        device: the device to measure on.
        repeats: the number of rounds, after one that is not counted.
        hosts: the backbones, by their names in :data:`SWINS`.
        sizes: the sizes ``(height, width)`` of the image; the grids of the stages are 1/4, 1/8, 1/16 and 1/32 of it.
        batch: the number of images.
        dtype: float32, or the type of the autocast; the stream stays in float32, as in a Swin.
        clock: a function that returns the time in seconds. On a busy machine, ``time.thread_time`` with one thread
            leaves out the time of other processes.
    """
    speed = rates(device, dtype, clock)
    for host in hosts:
        for size in sizes:
            yield from _rows(device, repeats, host, size, batch, dtype, clock, speed)


def _rows(device, repeats, host, size, batch, dtype, clock, speed) -> Iterator[Row]:
    width, depths = SWINS[host]
    totals = {variant: [0.0] * repeats for variant in VARIANTS}
    kept, peaks, differences = dict.fromkeys(VARIANTS, 0), {}, dict.fromkeys(VARIANTS, 0.0)
    floor = [0.0, 0.0]
    for stage, depth in enumerate(depths):
        channels, hw = width << stage, tuple(-(-side // (4 << stage)) for side in size)
        count = 2 * depth
        cases = {variant: _Case(variant, device, dtype, batch, channels, hw) for variant in VARIANTS}
        for variant, case in cases.items():
            if variant != 'adapter':
                differences[variant] = max(differences[variant], _difference(case, cases['published']))
            kept[variant] += count * kept_bytes(case.forward, case.module)
            peaks.setdefault(variant, case.peak())
        turns = {variant: partial(seconds, case.step, device, clock) for variant, case in cases.items()}
        for variant, taken in take_turns(turns, repeats).items():
            totals[variant] = [total + count * t for total, t in zip(totals[variant], taken, strict=True)]
        for i, amount in enumerate(work(batch, channels, hw, dtype.itemsize)):
            floor[i] += count * amount / speed[i]
    for variant in VARIANTS:
        mona = variant != 'adapter'
        step, *others = times(totals[variant], totals['fast'])
        yield Row(
            host,
            tuple(size),
            batch,
            str(dtype).removeprefix('torch.'),
            variant,
            step,
            *others,
            kept=kept[variant] / 2**20,
            peak=None if peaks[variant] is None else peaks[variant] / 2**20,
            difference=differences[variant] if mona else None,
            floor=1e3 * max(floor) if mona else None,
            floor_ratio=step / (1e3 * max(floor)) if mona else None,
        )


def header(row: Row) -> str:
    """The head of the table in Markdown; a ratio is the time of a variant as a multiple of that of ``fast``."""
    return heading(
        (
            'backbone',
            'image',
            'batch',
            'type',
            'variant',
            'forward and backward, ms',
            'ratio to fast',
            'kept, MiB',
            'times the floor',
            'difference to published',
        )
    )


def line(row: Row) -> str:
    """The line of a row in the table in Markdown."""
    return cells(
        (
            f'Swin-{row.host[-1].upper()}',
            f'{row.size[0]}x{row.size[1]}',
            f'{row.batch}',
            row.dtype,
            row.variant,
            with_spread(row.step, row.step_spread),
            with_spread(row.ratio, row.ratio_spread),
            f'{row.kept:,.1f}',
            '' if row.floor is None else times_floor(row.step, row.floor),
            '' if row.difference is None else f'{row.difference:.0e}',
        )
    )
