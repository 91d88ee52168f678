"""Step time and memory of tuning single weights of a linear layer, by every variant.

A step is the layer's forward, its backward (the input needs a gradient, as inside a network) and AdamW; the gradient of
the weights is also timed alone. The variants:

===================  ==================================================================================================
``automatic``        :func:`~mona_mm.spt.sparse.sparse_weight_grad`: whichever of the next three it takes
``sampled product``  :func:`~mona_mm.spt.sparse.grad_by_sampled_product`
``gather``           :func:`~mona_mm.spt.sparse.grad_by_gather`
``dense product``    :func:`~mona_mm.spt.sparse.grad_by_dense_product`
``published``        the formula of SPT's published code: a ``K x K`` product, of which it takes the diagonal
``mask``             the layer's whole weight trains, and its gradient is multiplied by a mask
===================  ==================================================================================================
"""

import gc
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mona_mm.benchmark.module import rates
from mona_mm.benchmark.timing import cells, heading, seconds, take_turns, times, times_floor, wait, with_spread
from mona_mm.nn.replaced import replaced
from mona_mm.spt import sparse

VIT_B = (3072, 768)
"""``(out, in)`` of fc1 of a ViT-B."""

IMAGE = 197
"""Tokens of an image of 224 x 224."""

TOKENS = 8 * IMAGE
"""The tokens of 8 images, which a CPU can do; the published batch is 64. The gradients' costs grow with it alike."""

COUNTS = (1 << 10, 1 << 14, 1 << 17)

_PRODUCT_LIMIT = 2 << 30
"""A published ``K x K`` product of more bytes than this is not timed as a whole, but a slice of it."""


@dataclass(frozen=True)
class Row:
    """One variant at one number of weights. Times in milliseconds, sizes in MiB, spreads as (first, third) quartile.

    ``gradient`` is the weight's gradient alone, ``step`` all of a step. Ratios are to ``automatic`` in the same round.
    ``peak`` is what a step needs at most beyond what was there before it; ``kept`` is what training keeps: trained
    values, their gradients, AdamW's state, and indices or mask. ``estimated`` says that the published product did not
    fit, its time is that of a slice multiplied, and the peak is the sizes of its tensors. The floors are the times that
    the operations and the bytes that no variant can do without would take at this machine's measured rates, whichever
    is longer.
    """

    count: int
    variant: str
    gradient: float
    gradient_spread: tuple[float, float]
    gradient_ratio: float
    gradient_ratio_spread: tuple[float, float]
    step: float
    step_spread: tuple[float, float]
    step_ratio: float
    step_ratio_spread: tuple[float, float]
    gradient_floor: float
    step_floor: float
    peak: float
    kept: float
    estimated: bool = False


def published_gradient(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """``grad[:, rows].T @ x[:, columns]``, ``(K, K)``, and its diagonal: ``O(K^2 N)``."""
    rows, columns = sparse.rows_and_columns(indices, x.shape[1])
    return (grad[:, rows].t() @ x[:, columns]).diagonal().clone()


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    'automatic': sparse.sparse_weight_grad,
    'sampled product': sparse.grad_by_sampled_product,
    'gather': sparse.grad_by_gather,
    'dense product': sparse.grad_by_dense_product,
    'published': published_gradient,
}
VARIANTS = (*FORMS, 'mask')


class _Case:
    """One layer that is tuned by one variant, and the gradient of one of its outputs."""

    def __init__(self, variant: str, device: str, shape: tuple[int, int], tokens: int, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        indices = torch.randperm(shape[0] * shape[1], generator=generator)[:count].sort().values.to(device)
        self.x = torch.randn(tokens, shape[1], generator=generator).to(device).requires_grad_()
        self.grad = torch.randn(tokens, shape[0], generator=generator).to(device)
        self.linear = nn.Linear(shape[1], shape[0], device=device)
        self.linear.bias.requires_grad = False
        self.form = FORMS.get(variant)
        if variant == 'mask':
            self.places = torch.zeros(shape, device=device)
            self.places.view(-1)[indices] = 1
            self.trained = self.linear.weight
            self.trained.register_hook(lambda grad: grad * self.places)
        else:
            delta = sparse.attach_sparse(self.linear, indices)
            self.trained, self.places = delta.values, delta.indices
        self.optimizer = torch.optim.AdamW([self.trained], weight_decay=0.0)

    def gradient(self) -> None:
        x = self.x.detach()
        if self.form is None:
            (self.grad.t() @ x) * self.places
        else:
            self.form(self.grad, x, self.places)

    def step(self) -> None:
        with replaced(sparse, 'sparse_weight_grad', self.form):
            self.optimizer.zero_grad()
            self.linear(self.x).backward(self.grad)
            self.x.grad = None
            self.optimizer.step()

    def kept(self) -> int:
        """How many bytes training keeps: trained values, gradients, AdamW's state, and indices or mask."""
        state = [t for t in self.optimizer.state[self.trained].values() if torch.is_tensor(t)]
        return sum(t.nbytes for t in (self.trained, self.trained.grad, self.places, *state))


class _SlicedPublished:
    """The published formula where its product does not fit: gathers of all ``K``, and so many rows of the product."""

    def __init__(self, device: str, shape: tuple[int, int], tokens: int, count: int) -> None:
        self.case = _Case('automatic', device, shape, tokens, count)
        self.device, self.count = device, count
        self.rows = max(1, _PRODUCT_LIMIT // 16 // count)

    def seconds(self, clock: Callable[[], float]) -> float:
        """The seconds that the whole gradient would take, were there the memory."""
        wait(self.device)
        start = clock()
        rows, columns = sparse.rows_and_columns(self.case.places, self.case.x.shape[1])
        grad, x = self.case.grad[:, rows].t(), self.case.x.detach()[:, columns]
        wait(self.device)
        gathered = clock()
        grad[: self.rows] @ x
        wait(self.device)
        return gathered - start + (clock() - gathered) * self.count / self.rows

    def peak(self) -> int:
        """The bytes of the tensors that the published formula needs."""
        return 4 * self.count * (self.count + 2 * len(self.case.x))


def work(count: int, shape: tuple[int, int], tokens: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Operations and bytes that no variant can do without, of the gradient alone and of a step, in single precision.

    The gradient: a product of ``tokens`` numbers for each of the ``count`` weights; dy, x and the indices read, the
    gradient written. A step adds the forward and the input's gradient: the weight read in each, x read and y written,
    dy read and dx written; and AdamW, which reads and writes the values and two moments.
    """
    weights, io = shape[0] * shape[1], tokens * (shape[0] + shape[1])
    gradient = 2.0 * count * tokens, 4.0 * (io + 3 * count)  # an index has the size of two numbers
    return gradient, (gradient[0] + 4 * tokens * weights, gradient[1] + 4.0 * (2 * weights + 2 * io + 7 * count))


def run(
    device: str = 'cpu',
    repeats: int = 9,
    counts: Sequence[int] = COUNTS,
    shape: tuple[int, int] = VIT_B,
    tokens: int = TOKENS,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Measure every variant at every number of weights, in single precision, as
    :func:`~mona_mm.benchmark.timing.take_turns` does; rows come as they are measured.

    Peaks are measured apart: on a CPU as the high-water mark of a process of its own.

    Args:
        device: where.
        repeats: rounds, after one that is not counted.
        counts: numbers of tuned weights.
        shape: ``(out, in)`` of the layer.
        tokens: ``N``.
        clock: in seconds. ``time.thread_time`` with one thread leaves out what other processes take of a busy machine.
    """
    speed = rates(device, torch.float32, clock)
    for count in counts:
        floors = [1e3 * max(o / speed[0], b / speed[1]) for o, b in work(count, shape, tokens)]
        yield from _rows(device, repeats, clock, floors, count, shape, tokens)


def _rows(device: str, repeats: int, clock: Callable[[], float], floors: list[float], count: int, *size):
    size = (*size, count)
    sliced = _SlicedPublished(device, *size) if 4 * count**2 > _PRODUCT_LIMIT else None
    # CUDA's sampled product is another library's, and sparse_weight_grad does not take it there.
    without = {'sampled product'} if torch.device(device).type != 'cpu' else set()
    cases = {variant: _Case(variant, device, *size) for variant in VARIANTS if variant not in without}

    def turn(variant: str) -> tuple[float, float | None]:
        """Seconds of the gradient and of a step."""
        if variant == 'published' and sliced:
            return sliced.seconds(clock), None
        return seconds(cases[variant].gradient, device, clock), seconds(cases[variant].step, device, clock)

    taken = take_turns({variant: partial(turn, variant) for variant in cases}, repeats)
    gradients = {variant: [gradient for gradient, _ in each] for variant, each in taken.items()}
    steps = {variant: [step for _, step in each] for variant, each in taken.items()}
    if sliced:
        parts = zip(steps['automatic'], gradients['automatic'], gradients['published'], strict=True)
        steps['published'] = [step - automatic + published for step, automatic, published in parts]
    for variant in cases:
        estimated = variant == 'published' and sliced is not None
        yield Row(
            count,
            variant,
            *times(gradients[variant], gradients['automatic']),
            *times(steps[variant], steps['automatic']),
            *floors,
            peak=(sliced.peak() if estimated else _peak(variant, device, *size)) / 2**20,
            kept=cases['automatic' if estimated else variant].kept() / 2**20,
            estimated=estimated,
        )


def _peak(variant: str, *args) -> float:
    """The most bytes that the second step of a layer needs beyond what is there before it."""
    if torch.device(args[0]).type == 'cuda':
        return _peak_on_cuda(_Case(variant, *args), args[0])
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    with _returning_freed_memory():
        process = context.Process(target=_peak_of_process, args=(sender, torch.get_num_threads(), variant, *args))
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f'The process that measures the memory of {variant!r} ended without a result.') from None
    finally:
        process.join()


def _peak_on_cuda(case: _Case, device: str) -> float:
    case.step()
    case.optimizer.zero_grad()
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    case.step()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _returning_freed_memory() -> Iterator[None]:
    """Processes that start here give memory back to the system when it is freed, so that a mark shows what is used."""
    names = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_')
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, '65536'))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _peak_of_process(sender, threads: int, variant: str, *args) -> None:
    torch.set_num_threads(threads)
    case = _Case(variant, *args)
    case.step()
    case.optimizer.zero_grad()
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # sets the mark to what is in use now
    before = _status('VmRSS')
    case.step()
    sender.send(_status('VmHWM') - before)


def _status(field: str) -> int:
    """A size in bytes from Linux's account of this process."""
    return 1024 * int(re.search(rf'{field}:\s+(\d+)', Path('/proc/self/status').read_text()).group(1))


def header(row: Row) -> str:
    """The head of the table, in Markdown. A ratio above 1 is so many times slower than ``automatic``."""
    ratios = 'ratio to automatic', 'times the floor'
    memory = 'peak of a step, MiB', 'kept for training, MiB'
    return heading(('K', 'variant', 'gradient, ms', *ratios, 'step, ms', *ratios, *memory))


def line(row: Row) -> str:
    """The line of the table for a row."""
    return cells(
        (
            f'{row.count:,}',
            f'{row.variant} (estimated)' if row.estimated else row.variant,
            with_spread(row.gradient, row.gradient_spread),
            with_spread(row.gradient_ratio, row.gradient_ratio_spread),
            times_floor(row.gradient, row.gradient_floor),
            with_spread(row.step, row.step_spread),
            with_spread(row.step_ratio, row.step_ratio_spread),
            times_floor(row.step, row.step_floor),
            f'{row.peak:,.0f}',
            f'{row.kept:.2f}',
        )
    )
