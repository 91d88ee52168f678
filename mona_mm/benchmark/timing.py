"""What the suites share: a call's time, medians with their spread."""

import time
from collections.abc import Callable, Sequence

import torch


def seconds(function: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, the device's work included."""
    wait(device)
    start = clock()
    function()
    wait(device)
    return clock() - start


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """And the first and third quartile."""
    first, middle, third = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return middle.item(), (first.item(), third.item())


def with_spread(middle: float, spread: tuple[float, float]) -> str:
    """``median (first-third quartile)``, in about three digits."""
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f'{middle:,.{digits}f} ({spread[0]:,.{digits}f}-{spread[1]:,.{digits}f})'
