"""Tools that the suites share: rounds in which the variants take turns, times, kept bytes, and medians with spread."""

import ctypes
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

T = TypeVar('T')


def take_turns(variants: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Call every variant in every round, and return the results of each variant, one for each round.

    The order of the variants changes from round to round, so that whatever else the machine does affects all of them
    alike. The first round is a warm-up: it comes on top of ``repeats``, and its results are dropped.
    """
    results: dict[str, list[T]] = {variant: [] for variant in variants}
    order = random.Random(0)
    for round_ in range(repeats + 1):
        for variant in order.sample(list(variants), len(variants)):
            result = variants[variant]()
            if round_:
                results[variant].append(result)
    return results


def seconds(function: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds that one call takes, including the work on the device."""
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def wait(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def return_freed_memory() -> None:
    """Return the freed memory that the C library (glibc) holds to the system.

    Do not call this between two measured calls: getting the memory from the system again takes time.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim:
        trim(0)


def kept_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """The bytes of all storages, except parameters, that a forward of ``model`` keeps for the backward pass."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward()
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


def times(
    seconds: Sequence[float], reference: Sequence[float]
) -> tuple[float, tuple[float, float], float, tuple[float, float]]:
    """The times in milliseconds and their ratios to the reference of the same round, each as a median and quartiles."""
    return *median([1e3 * t for t in seconds]), *median([t / r for t, r in zip(seconds, reference, strict=True)])


def median(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of some values, and their first and third quartile."""
    lower, middle, upper = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return middle.item(), (lower.item(), upper.item())


def with_spread(middle: float, spread: tuple[float, float]) -> str:
    """Format a median and its spread as ``median (first-third quartile)``, to about three digits."""
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f'{middle:,.{digits}f} ({spread[0]:,.{digits}f}-{spread[1]:,.{digits}f})'


def times_floor(time: float, floor: float) -> str:
    """Format a time as a multiple of its floor; both are in milliseconds."""
    return f'{time / floor:.1f} of {floor:,.{0 if floor >= 10 else 1 if floor >= 1 else 2}f} ms'


def heading(columns: Sequence[str]) -> str:
    """The first two lines of a table in Markdown."""
    return f'{cells(columns)}\n|{"---|" * len(columns)}'


def cells(values: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f'| {" | ".join(values)} |'
