"""Say in one line why a run ended that failed for reasons outside of the code: memory, disks, workers."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.runner import Runner

from mona_mm.errors import OutOfMemoryError, UserError
from mona_mm.hooks.stop_messages import how_to_go_on

_WORKER = re.compile(r'DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (is killed by signal: (?P<signal>[\w ]+)|exited)')
_NO_MEMORY = re.compile(r'out of memory|can.t allocate memory|not enough memory', re.IGNORECASE)
_TRIED = re.compile(r'[Tt]ried to allocate ([\d.]+ ?\w+)')
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained(runner: Runner) -> Iterator[None]:
    """A context that turns failures of training which are nobody's bug into errors of one line.

    Raises:
        OutOfMemoryError: if the model and its batch do not fit into the memory of the device or the machine.
        UserError: if a process that loads data was ended, or a file could not be written or read.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        worker = _WORKER.search(text)
        if worker:
            raise UserError(f'{_of_worker(runner, worker)} {how_to_go_on(runner)}') from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(text):
            raise OutOfMemoryError(f'{_of_memory(runner, text)} {how_to_go_on(runner)}') from error
        raise
    except OSError as error:
        raise UserError(f'{_of_disk(error)} {how_to_go_on(runner)}') from error


def _of_worker(runner: Runner, found: re.Match) -> str:
    loader = runner.train_dataloader
    signal = (found['signal'] or '').strip()
    how = f'was ended by the signal {signal!r}' if signal else 'ended unexpectedly'
    advice = {
        'Killed': "The system does that when the machine's memory is full: lower train_dataloader.num_workers",
        'Bus error': 'Shared memory is too small: enlarge /dev/shm, or lower train_dataloader.num_workers',
    }.get(signal, 'Lower train_dataloader.num_workers if the memory of the machine was full')
    return f'A process that loads data {how}. {advice} (now {loader.num_workers}).'


def _of_memory(runner: Runner, text: str) -> str:
    tried = _TRIED.search(text)
    what = f', which lacks {tried[1]}' if tried else ''
    device = next(runner.model.parameters()).device
    where = 'machine'
    if device.type == 'cuda':
        free, total = torch.cuda.mem_get_info(device)
        where = (
            f'GPU ({total / 2**30:.1f} GiB, {free / 2**30:.1f} free, '
            f'{torch.cuda.max_memory_allocated(device) / 2**30:.1f} used by this process at most)'
        )
    images = runner.train_dataloader.batch_size or getattr(runner.train_dataloader.batch_sampler, 'batch_size', 1)
    accumulated = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    ways = []
    if images > 1:
        ways.append(
            f'train_dataloader.batch_size={images // 2} optim_wrapper.accumulative_counts={2 * accumulated}, which '
            f'trains on the same {images * accumulated} images in a step'
        )
    ways.append('model.backbone.base.with_cp=True, which recomputes activations')
    ways.append('smaller images in the pipeline')
    amp = '' if device.type == 'cpu' or 'Amp' in type(runner.optim_wrapper).__name__ else ', or --amp'
    return (
        f'The model and a batch of {images} images do not fit into the memory of this {where}{what}. Lower it with '
        f'--cfg-options {"; ".join(ways)}{amp}.'
    )


def _of_disk(error: OSError) -> str:
    if error.errno in _FULL:
        where = f' while {error.filename} was written' if error.filename else ''
        why = 'a limit on the size of files was reached' if error.errno == errno.EFBIG else 'the disk is full'
        return f'Training ended because {why}{where}. Free some space, or keep fewer checkpoints (max_keep_ckpts).'
    return f'Training ended: {in_one_line(error)}.'


def in_one_line(error: BaseException) -> str:
    """An error as one line of text; of one that a worker process passed on with its traceback, the last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith('Caught ') and len(lines) > 1:
        return re.sub(r'^[\w.]+: ', '', lines[-1])
    return ' '.join(line.strip() for line in lines)
