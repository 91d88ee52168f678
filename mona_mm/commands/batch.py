"""``--batch``: the number of images in a step, given or as many as the memory has room for."""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config

from mona_mm.config.load import has_accelerator
from mona_mm.config.nodes import dicts_of
from mona_mm.config.recipe import batch_of, scale_learning_rate
from mona_mm.errors import ConfigError, UserError
from mona_mm.type_names import is_type

_GIB = 2**30
_LARGEST = 1024
_ON_GPU = 0.9  # the share of a GPU's memory that the probe may fill: later batches can have larger images
_ON_CPU = 0.8  # the same of the memory that is free on this machine, which others use, too


@dataclass(frozen=True)
class Batch:
    """What ``--batch`` asks for.

    Args:
        size: the number of images; None for as many as the memory has room for.
        limit: the memory in bytes that the run may use; None for what is free.
    """

    size: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Probe:
    """The largest memory in bytes of a few steps with a batch; None if it was not enough."""

    batch: int
    memory: int | None


def batch_argument(text: str) -> Batch:
    """Parse the argument of ``--batch``: ``8``, ``auto``, or ``auto:12`` for at most 12 GiB.

    Raises:
        argparse.ArgumentTypeError: if it is none of these.
    """
    word, _, limit = text.partition(':')
    try:
        if word == 'auto':
            gib = float(limit) if limit else None
            if gib is None or 0 < gib < math.inf:
                return Batch(limit=None if gib is None else int(gib * _GIB))
        elif not limit and int(word) >= 1:
            return Batch(size=int(word))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text}: give a number of images, auto, or auto:GIB (auto:12 for 12 GiB)')


def set_batch(cfg: Config, batch: Batch, given: Collection[str] = ()) -> list[str]:
    """Set the batch of a config in place, and its learning rate with it, where no recipe does that later.

    Args:
        cfg: the config, adapted to this machine.
        batch: the batch, or that it is to be found.
        given: the keys of ``--cfg-options``, whose values are kept.

    Returns:
        What was chosen, in lines for the user.

    Raises:
        UserError: if not even one image fits, or several processes are to find a batch.
    """
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size') or batch_of(cfg)
    lines = []
    size = batch.size
    if size is None:
        if cfg.get('launcher', 'none') != 'none':
            raise ConfigError('--batch auto looks for it in one process. Do that first, and give the number here.')
        limit = batch.limit or (_free_on_gpu() if has_accelerator() else int(_ON_CPU * _free_on_cpu()))
        probes: list[Probe] = []
        size = largest_batch(
            lambda n: probes.append(_probe(cfg, n)) or probes[-1], limit, _most(cfg), has_accelerator()
        )
        measured = ', '.join(
            f'{each.batch}: ' + ('too much' if each.memory is None else f'{each.memory / _GIB:.2f} GiB')
            for each in probes
        )
        lines.append(f'Batch {size} fits {limit / _GIB:.2f} GiB of memory (measured with batches of {measured}).')
    cfg.train_dataloader.batch_size = size
    return lines + ([] if cfg.get('recipe') and cfg.get('own_data') else scale_learning_rate(cfg, base, given))


def _most(cfg: Config) -> int:
    """The largest batch to try: an eighth of the images, where their number is known."""
    images = (cfg.get('own_data') or {}).get('images', {}).get('train')
    return _LARGEST if images is None else max(1, images // 8)


def largest_batch(measure: Callable[[int], Probe], limit: int, most: int, measure_all: bool) -> int:
    """The largest power of two whose memory is within a limit.

    Args:
        measure: measures a batch.
        limit: the memory in bytes.
        most: the largest batch to choose.
        measure_all: whether every batch is measured until one is too large, as on a GPU, where that is quick. Without,
            batches of one and two are measured, and the memory of larger ones follows from the line through both.

    Raises:
        UserError: if one image is too much.
    """
    first = measure(1)
    if first.memory is None or first.memory > limit:
        need = '' if first.memory is None else f' needs {first.memory / _GIB:.2f} GiB, and'
        raise UserError(
            f'--batch auto: one image{need} is too much for {limit / _GIB:.2f} GiB of memory. Take smaller images, or '
            'model.backbone.base.with_cp=True (docs/training.md, "Memory").'
        )
    chosen = 1
    if most < 2:
        return chosen
    second = measure(2)
    if second.memory is None or second.memory > limit:
        return chosen
    slope = max(second.memory - first.memory, 1)
    for batch in _doubled(most):
        if measure_all and batch > 2:
            memory = measure(batch).memory
        else:
            memory = first.memory + (batch - 1) * slope
        if memory is None or memory > limit:
            break
        chosen = batch
    return chosen


def _doubled(most: int) -> Iterator[int]:
    batch = 2
    while batch <= most:
        yield batch
        batch *= 2


def _probe(cfg: Config, batch: int) -> Probe:
    """Measure a few steps in a process of its own, which may die of them."""
    trial = Config(cfg._cfg_dict.to_dict())
    trial.train_dataloader.batch_size = batch
    trial.load_from, trial.resume = None, False
    trial.custom_hooks = [hook for hook in trial.get('custom_hooks') or [] if is_type(hook, 'mona_mm.ParamFreezeHook')]
    for part in dicts_of(trial.model):
        if is_type(dict.get(part, 'init_cfg'), 'Pretrained'):
            part['init_cfg'] = None  # random weights need as much memory
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, result = Path(folder, 'config.py'), Path(folder, 'memory.json')
        trial.dump(str(file))
        command = [sys.executable, '-m', 'mona_mm.commands.batch_probe', str(file), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
        if result.is_file():
            return Probe(batch, json.loads(result.read_text(encoding='utf-8'))['memory'])
    if done.returncode in (-9, 137):  # killed by the system, for want of memory
        return Probe(batch, None)
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'--batch auto: a step with a batch of {batch} ends with {last}')


# The memory that is free --------------------------------------------------------------------------------------------


def _free_on_gpu() -> int:
    free, _ = torch.cuda.mem_get_info()
    return int(_ON_GPU * free)


def _free_on_cpu() -> int:
    """The memory in bytes that a new process may use: what is free on the machine, within the limits of this process
    and of its control group."""
    limits = [_available(), _of_control_group()]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise UserError('--batch auto: this system does not say how much memory is free. Say it: --batch auto:GIB.')
    return min(known)


def _available() -> int | None:
    file = Path('/proc/meminfo')
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:')), None)


def _of_control_group(root: Path = Path('/sys/fs/cgroup')) -> int | None:
    """What the control group of this process leaves of its limit, by version 2 or 1; None without a limit."""
    for limit, used in (
        ('memory.max', 'memory.current'),
        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
    ):
        try:
            return max(int((root / limit).read_text()) - int((root / used).read_text()) + _reclaimable(root), 0)
        except (OSError, ValueError):  # 'max' is no number
            continue
    return None


def _reclaimable(root: Path) -> int:
    """The bytes of files in memory that count as used, and are given back when memory is short."""
    file = root / 'memory.stat'
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith('inactive_file ')), 0)
