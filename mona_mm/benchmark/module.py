"""Time and memory of all the Mona modules of a Swin, forward and backward, against the published formula.

Every block has two, of its stage's width and grid; one module of each stage is timed and counts for all of them. The
ways:

=============  ========================================================================================================
``ours``       :class:`mona_mm.methods.Mona` as it is used: its fast form (:mod:`mona_mm.ops.mona`)
``plain``      the same with ``fast = False``
``published``  the operations of Mona's published code, one by one: three convolutions of a channels-last view
``adapter``    :class:`mona_mm.methods.Adapter` of the same width, which has no convolutions and no norm: for comparison
=============  ========================================================================================================

``python -m mona_mm.benchmark.module`` prints the table of ``docs/benchmarks.md``.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.benchmark.timing import median, seconds, with_spread
from mona_mm.methods import Adapter, Mona
from mona_mm.ops.mona import linear

SWINS = {'swin_b': (128, (2, 2, 18, 2)), 'swin_l': (192, (2, 2, 18, 2))}
"""Width of the first stage, and blocks of each."""

SIZES = ((224, 224), (512, 512), (800, 1216))


@dataclass(frozen=True)
class Row:
    """One way, summed over a backbone's modules. Times in milliseconds, sizes in MiB, spreads as (first, third)
    quartile.

    ``step`` is a training step's forward and backward, input gradient included; ``ratio`` is to ``ours`` in the same
    round. ``kept`` is what is kept for the backward pass beside the parameters, ``peak`` (CUDA alone) what one step of
    the first stage's module allocates at most. ``difference`` is the largest of output and gradients to ``published``,
    relative to each one's largest value. ``floor`` is the time that the operations and the bytes that must move would
    take at this machine's measured rates, whichever is longer, and ``floor_ratio`` how many times that a step takes.
    """

    host: str
    size: tuple[int, int]
    batch: int
    dtype: str
    way: str
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
    """The published code's operations on a Mona's parameters."""

    def __init__(self, mona: Mona) -> None:
        super().__init__()
        self.mona = mona

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        m, (batch, tokens, _) = self.mona, x.shape
        p = m.down(m.entrance.norm(x) * m.entrance.gamma + x * m.entrance.gammax)
        p = p.reshape(batch, *hw, -1).permute(0, 3, 1, 2)
        q = (m.depthwise[0](p) + m.depthwise[1](p) + m.depthwise[2](p)) / 3 + p
        r = q + m.pointwise(q)
        r = r.permute(0, 2, 3, 1).reshape(batch, tokens, -1)
        return x + m.up(m.dropout(F.gelu(r)))


def _module(way: str, channels: int) -> nn.Module:
    torch.manual_seed(0)
    if way == 'adapter':
        return Adapter(channels).train()
    module = Mona(channels).train()
    module.fast = way == 'ours'
    return PublishedMona(module) if way == 'published' else module


WAYS = ('ours', 'plain', 'published', 'adapter')


class _Case:
    """A module of one stage, its input and the gradient of its output."""

    def __init__(self, way: str, device: str, dtype: torch.dtype, batch: int, channels: int, hw: tuple[int, int]):
        self.module = _module(way, channels).to(device)
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

    def kept(self) -> int:
        """Bytes."""
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _note(storages, t), lambda t: t):
            out = self.forward()
        del out
        for p in self.module.parameters():
            storages.pop(p.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    def peak(self) -> int | None:
        """Bytes; None but on CUDA."""
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


def _note(storages: dict[int, int], tensor: Tensor) -> Tensor:
    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def _difference(case: _Case, other: _Case) -> float:
    other.x, other.grad = case.x, case.grad
    pairs = zip(case.results(), other.results(), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def work(batch: int, channels: int, hw: tuple[int, int], itemsize: int, hidden: int = 64) -> tuple[float, float]:
    """Operations and bytes that no way can do without, of a step of a Mona in ``itemsize`` bytes a number.

    Each of the two projections, the 1x1 and one 7x7 depthwise convolution once forward and twice backward; x read and
    y written; dy and x read and dx written; the hidden state written and read.
    """
    tokens = batch * hw[0] * hw[1]
    operations = 3 * 2 * tokens * (2 * channels * hidden + hidden**2 + 49 * hidden)
    return operations, itemsize * tokens * (5 * channels + 2 * hidden)


def rates(device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second that a copy reads and writes, as measured here."""
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
) -> list[Row]:
    """Measure every way on every backbone at every size.

    The ways take turns, round by round in another order, so that what else the machine does meets all of them; a ratio
    is of two times of one round.

    Args:
        device: where.
        repeats: rounds, after one that is not counted.
        hosts: names in :data:`SWINS`.
        sizes: ``(height, width)`` of the image; the stages' grids are a 4th, 8th, 16th and 32nd of it.
        batch: images.
        dtype: float32, or the autocast's type; the stream stays in float32, as in a Swin.
        clock: in seconds. ``time.thread_time`` with one thread leaves out what other processes take of a busy machine.
    """
    speed = rates(device, dtype, clock)
    return [
        row
        for host in hosts
        for size in sizes
        for row in _rows(device, repeats, host, size, batch, dtype, clock, speed)
    ]


def _rows(device, repeats, host, size, batch, dtype, clock, speed) -> Iterator[Row]:
    width, depths = SWINS[host]
    totals = {way: [0.0] * repeats for way in WAYS}
    kept, peaks, differences = dict.fromkeys(WAYS, 0), {}, dict.fromkeys(WAYS, 0.0)
    floor = [0.0, 0.0]
    order = random.Random(0)
    for stage, depth in enumerate(depths):
        channels, hw = width << stage, tuple(-(-side // (4 << stage)) for side in size)
        count = 2 * depth
        cases = {way: _Case(way, device, dtype, batch, channels, hw) for way in WAYS}
        for way, case in cases.items():
            if way != 'adapter':
                differences[way] = max(differences[way], _difference(case, cases['published']))
            kept[way] += count * case.kept()
            peaks.setdefault(way, case.peak())
            case.step()
        for i in range(repeats):
            for way in order.sample(WAYS, len(WAYS)):
                totals[way][i] += count * seconds(cases[way].step, device, clock)
        for i, amount in enumerate(work(batch, channels, hw, dtype.itemsize)):
            floor[i] += count * amount / speed[i]
    for way in WAYS:
        step, spread = median([1e3 * t for t in totals[way]])
        mona = way != 'adapter'
        yield Row(
            host,
            tuple(size),
            batch,
            str(dtype).removeprefix('torch.'),
            way,
            step,
            spread,
            *median([t / o for t, o in zip(totals[way], totals['ours'], strict=True)]),
            kept=kept[way] / 2**20,
            peak=None if peaks[way] is None else peaks[way] / 2**20,
            difference=differences[way] if mona else None,
            floor=1e3 * max(floor) if mona else None,
            floor_ratio=step / (1e3 * max(floor)) if mona else None,
        )


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown. A ratio above 1 is so many times slower than ``ours``."""
    lines = [
        '| backbone | image | batch | type | way | step, ms | ratio | kept, MiB | times the floor | difference |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for r in rows:
        what = f'{r.host} | {r.size[0]}x{r.size[1]} | {r.batch} | {r.dtype} | {r.way}'
        times = f'{with_spread(r.step, r.step_spread)} | {with_spread(r.ratio, r.ratio_spread)} | {r.kept:,.1f}'
        floor = '' if r.floor is None else f'{r.floor_ratio:.1f} of {r.floor:,.1f} ms'
        difference = '' if r.difference is None else f'{r.difference:.0e}'
        lines.append(f'| {what} | {times} | {floor} | {difference} |')
    return '\n'.join(lines)


def _size(text: str) -> tuple[int, int]:
    height, width = text.split('x')
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--hosts', nargs='+', choices=SWINS, default=list(SWINS))
    parser.add_argument('--sizes', nargs='+', type=_size, default=SIZES, metavar='HxW')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--threads', type=int, help='of torch on a CPU')
    parser.add_argument('--processor-time', action='store_true', help='of the one thread, instead of wall-clock time')
    args = parser.parse_args()
    if args.processor_time and (args.threads != 1 or torch.device(args.device).type != 'cpu'):
        parser.error('--processor-time is that of one thread: give --threads 1, on a CPU')
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    clock = time.thread_time if args.processor_time else time.perf_counter
    operations, moved = rates(args.device, dtype, clock)
    print(f'Products: {operations / 1e9:,.0f} G operations/s; copies: {moved / 1e9:,.1f} GB/s, read and written.')
    print('Medians, and first to third quartile. Ratios are to `ours`.')
    print(table(run(args.device, args.repeats, args.hosts, args.sizes, args.batch, dtype, clock)), flush=True)


if __name__ == '__main__':
    main()
