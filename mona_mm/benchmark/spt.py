"""The time and memory of a step that tunes single weights of a linear layer, for every variant.

A step is the forward of the layer, its backward (the input needs a gradient, as inside a network) and AdamW; the
gradient of the weights is also timed alone. The variants are:

===================  ==================================================================================================
``automatic``        :func:`~mona_mm.spt.sparse.sparse_weight_grad`, which chooses one of the next three
``sampled product``  :func:`~mona_mm.spt.sparse.grad_by_sampled_product`
``gather``           :func:`~mona_mm.spt.sparse.grad_by_gather`
``dense product``    :func:`~mona_mm.spt.sparse.grad_by_dense_product`
``published``        the formula of SPT's published code, which takes the diagonal of a ``K x K`` product
``mask``             the layer's whole weight trains, and its gradient is multiplied by a mask
===================  ==================================================================================================
"""

import gc
import multiprocessing
import os
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
from mona_mm.report.memory import peak_since, resident
from mona_mm.spt import sparse

VIT_B = (3072, 768)
"""The shape ``(out, in)`` of fc1 of a ViT-B."""

IMAGE = 197
"""The number of tokens of an image of 224 x 224 pixels."""

TOKENS = 8 * IMAGE
"""The number of tokens of 8 images, a batch that a CPU can handle.

The published batch is 64; the costs of all gradients grow with the batch at the same rate.
"""

COUNTS = (1 << 10, 1 << 14, 1 << 17)

_PRODUCT_LIMIT = 2 << 30
"""The largest size in bytes of a published ``K x K`` product that is timed as a whole; of a larger one, a slice is."""


@dataclass(frozen=True)
class Row:
    """The figures of one variant at one number of weights.

    Times are in milliseconds and sizes in MiB; a spread is the first and the third quartile. Ratios are to
    ``automatic`` in the same round. A floor is the time that the operations or the bytes that every variant needs would
    take at the measured rates of this machine, whichever is longer.

    Args:
        gradient: the time of the gradient of the weight alone.
        step: the time of a whole step.
        peak: the most memory that a step needs in addition to that in use before it.
        kept: the memory that training keeps: the trained values, their gradients, AdamW's state, and the indices or the
            mask.
        estimated: whether the published product was too large. Its time is then extrapolated from a slice, and
            its peak is the sum of the sizes of its tensors.
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
    """Compute the diagonal ``(K,)`` of the ``(K, K)`` product ``grad[:, rows].T @ x[:, columns]``, in ``O(K^2 N)``."""
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
    """A layer that one variant tunes, with an input and the gradient of its output."""

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
        """The bytes that training keeps: the trained values, gradients, AdamW's state, and the indices or the mask."""
        state = [t for t in self.optimizer.state[self.trained].values() if torch.is_tensor(t)]
        return sum(t.nbytes for t in (self.trained, self.trained.grad, self.places, *state))


class _SlicedPublished:
    """The published formula for a product that is too large: all of the gathers, and only a slice of the product."""

    def __init__(self, device: str, shape: tuple[int, int], tokens: int, count: int) -> None:
        self.case = _Case('automatic', device, shape, tokens, count)
        self.device, self.count = device, count
        self.rows = max(1, _PRODUCT_LIMIT // 16 // count)

    def seconds(self, clock: Callable[[], float]) -> float:
        """The seconds that the whole gradient would take if there were enough memory, extrapolated from the slice."""
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
        """The number of bytes of the tensors that the published formula needs."""
        return 4 * self.count * (self.count + 2 * len(self.case.x))


def work(count: int, shape: tuple[int, int], tokens: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The operations and the bytes that every variant needs for the gradient alone and for a step, in single precision.

    The gradient is a product of ``tokens`` numbers for each of the ``count`` weights; it reads dy, x and the indices,
    and is written. A step adds the forward, which reads the weight and x and writes y; the gradient of the input, which
    reads the weight and dy and writes dx; and AdamW, which reads and writes the values and two moments.
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
    """Measure every variant at every number of weights, in single precision, and yield each row once it is measured.

    The variants take turns, as :func:`~mona_mm.benchmark.timing.take_turns` describes. The peaks are measured
    separately; on a CPU, a peak is the high-water mark of a new process.

    Args:
        device: the device to measure on.
        repeats: the number of rounds, after one that is not counted.
        counts: the numbers of tuned weights.
        shape: the shape ``(out, in)`` of the layer.
        tokens: the number of tokens in the batch.
        clock: a function that returns the time in seconds. On a busy machine, ``time.thread_time`` with one thread
            leaves out the time of other processes.
    """
    speed = rates(device, torch.float32, clock)
    for count in counts:
        floors = [1e3 * max(o / speed[0], b / speed[1]) for o, b in work(count, shape, tokens)]
        yield from _rows(device, repeats, clock, floors, count, shape, tokens)


def _rows(device: str, repeats: int, clock: Callable[[], float], floors: list[float], count: int, *size):
    size = (*size, count)
    sliced = _SlicedPublished(device, *size) if 4 * count**2 > _PRODUCT_LIMIT else None
    # On CUDA another library computes the sampled product, and sparse_weight_grad does not use it there.
    without = {'sampled product'} if torch.device(device).type != 'cpu' else set()
    cases = {variant: _Case(variant, device, *size) for variant in VARIANTS if variant not in without}

    def turn(variant: str) -> tuple[float, float | None]:
        """Measure the seconds of the gradient and of a step."""
        if variant == 'published' and sliced:
            return sliced.seconds(clock), None
        return seconds(cases[variant].gradient, device, clock), seconds(cases[variant].step, device, clock)

    taken = take_turns({variant: partial(turn, variant) for variant in cases}, repeats)
    gradients = {variant: [gradient for gradient, _ in rounds] for variant, rounds in taken.items()}
    steps = {variant: [step for _, step in rounds] for variant, rounds in taken.items()}
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
    """The most bytes that the second step of a layer needs in addition to those in use before it."""
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
    """Make processes that start in this context return freed memory to the system at once.

    Their high-water mark then shows the memory in use.
    """
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
    Path('/proc/self/clear_refs').write_text('5')  # resets the high-water mark to the memory in use now
    before = resident()
    case.step()
    sender.send(peak_since() - before)


def header(row: Row) -> str:
    """The head of the table in Markdown; a ratio is the time of a variant as a multiple of that of ``automatic``."""
    ratios = 'ratio to automatic', 'times the floor'
    memory = 'peak of a step, MiB', 'kept for training, MiB'
    return heading(('K', 'variant', 'gradient, ms', *ratios, 'step, ms', *ratios, *memory))


def line(row: Row) -> str:
    """The line of a row in the table in Markdown."""
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
