"""The memory that this process has used at most."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def peak_of_process() -> int:
    """The largest memory of this process so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int | None:
    """The memory of this process now, in bytes; None on systems that do not say it as Linux does."""
    return _status('VmRSS')


def forget_peak() -> None:
    """Let :func:`peak_since` begin anew, where the system can."""
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def peak_since() -> int | None:
    """The largest memory of this process since :func:`forget_peak`, in bytes; None as for :func:`resident`."""
    return _status('VmHWM')


def _status(name: str) -> int | None:
    file = Path('/proc/self/status')
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:')), None)


def peak_memory() -> dict[str, str]:
    """The largest memory of the process and of its GPU, in words."""
    found = {'largest memory of the process': f'{peak_of_process() / 2**30:.2f} GiB'}
    if torch.cuda.is_available():
        found = {'largest memory of the GPU': f'{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB', **found}
    return found
