"""What the suites share: rounds in which the variants take turns, times, kept bytes, medians with their spread."""

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
    """Call every variant in every round, and return what it returned, by variant.

    The variants take turns, round by round in another order, so that what else the machine does meets all of them. The
    first round is not counted.
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
    """The seconds that one call takes, the device's work included."""
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def return_freed_memory() -> None:
    """Give memory that the C library (glibc) keeps back to the system.

    This is not to be called between two measured calls, since taking the memory again takes time.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim:
        trim(0)


def kept_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """The bytes of every storage that a forward of ``model`` keeps for the backward pass, parameters aside."""
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
    """Times in milliseconds and ratios to the reference of the same round, each as median and quartiles."""
    return *median([1e3 * t for t in seconds]), *median([t / r for t, r in zip(seconds, reference, strict=True)])


def median(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of some values, and their first and third quartile."""
    first, middle, third = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return middle.item(), (first.item(), third.item())


def with_spread(middle: float, spread: tuple[float, float]) -> str:
    """``median (first-third quartile)``, in about three digits."""
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f'{middle:,.{digits}f} ({spread[0]:,.{digits}f}-{spread[1]:,.{digits}f})'


def times_floor(time: float, floor: float) -> str:
    """How many times the floor a time is, both in milliseconds."""
    return f'{time / floor:.1f} of {floor:,.{0 if floor >= 10 else 1 if floor >= 1 else 2}f} ms'


def heading(columns: Sequence[str]) -> str:
    """The first two lines of a table in Markdown."""
    return f'{cells(columns)}\n|{"---|" * len(columns)}'


def cells(values: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f'| {" | ".join(values)} |'
