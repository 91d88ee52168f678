"""The memory that this process has used at most."""

import resource
import sys

import torch


def peak_of_process() -> int:
    """The largest memory of this process so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory() -> dict[str, str]:
    """The largest memory of the process and of its GPU, in words."""
    found = {'largest memory of the process': f'{peak_of_process() / 2**30:.2f} GiB'}
    if torch.cuda.is_available():
        found = {'largest memory of the GPU': f'{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB', **found}
    return found
