"""Sharded checkpoints: a folder with a file of each process."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, distributed

from mona_mm.errors import CheckpointMismatchError
from mona_mm.strategies.replicated import write


def write_part(checkpoint: dict[str, Any], folder: str, rank: int) -> None:
    """Write what each process holds to a folder, which gets its name when all parts are in it.

    All processes must call it.
    """
    partial = Path(f'{folder}.partial')
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a stopped process
        partial.mkdir(parents=True)
    distributed.barrier()
    write(checkpoint, str(partial / f'rank{rank}.pth'))
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def read_part(folder: str, rank: int, processes: int) -> dict[str, Any]:
    """Read the part of a process.

    Raises:
        CheckpointMismatchError: if the folder holds the parts of another number of processes.
    """
    count = len(list(Path(folder).glob('rank*.pth')))
    if count != processes:
        raise CheckpointMismatchError(
            f'{folder} holds the parts of {count} processes, and there are {processes}. Resume on {count}, or from the '
            'delta beside it.'
        )
    return CheckpointLoader.load_checkpoint(str(Path(folder, f'rank{rank}.pth')), map_location='cpu')


def load_part(state: Mapping[str, Any], given: Mapping[str, Any], folder: str) -> None:
    """Write the part of a process to the tensors that it holds.

    Args:
        state: the tensors, by name.
        given: their values.
        folder: the sharded checkpoint, for the message.

    Raises:
        CheckpointMismatchError: if a name or shape differs, since the model or the strategy is another one.
    """
    shapes = [{name: t.shape for name, t in each.items() if isinstance(t, Tensor)} for each in (state, given)]
    wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    if wrong:
        raise CheckpointMismatchError(
            f'{folder} does not fit: parts of {len(set(wrong))} tensors have another name or shape, first {wrong[0]}. '
            'Resume with the config and the strategy that wrote it.'
        )
    with torch.no_grad():
        for name in shapes[0]:
            state[name].copy_(given[name])
