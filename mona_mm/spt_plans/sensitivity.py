"""Measure the sensitivity of the base of a config on the config's data."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import get_dist_info
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from mona_mm.config.nodes import datasets
from mona_mm.data_check.check import sensitivity_split
from mona_mm.errors import ConfigError, SensitivityError
from mona_mm.spt.sensitivity import NO_LABELS, Sensitivity, alone, compute_sensitivity, first_batches, set_seed
from mona_mm.type_names import enter_scope, is_type, type_name, with_names

# Settings of a data loader that do not change the data.
_LOADER_SETTINGS = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor')


def measure(cfg: Config, num_batches: int = 16, per_sample: bool = False, seed: int | None = None) -> Sensitivity:
    """Measure the sensitivity of a config's base with the config's own data and losses.

    The data are those of the config's ``sensitivity_dataloader``, which has the form of ``train_dataloader``, or else
    the training data. The backbone has no method, and all of its base trains; heads are initialised and pretrained
    weights loaded as for training. The images of a batch and their augmentation depend only on the seed and the number
    of the batch, not on the numbers of processes and workers.

    Args:
        cfg: a training config. A process group has to be joined before.
        num_batches: see :func:`compute_sensitivity`.
        per_sample: see :func:`compute_sensitivity`.
        seed: the seed; by default that of the config, or 0.

    Raises:
        UserError: if the model cannot be built or its weights cannot be loaded; see also :func:`compute_sensitivity`.
    """
    enter_scope(cfg)
    if seed is None:
        seed = (cfg.get('randomness') or {}).get('seed') or 0
    set_random_seed(seed)
    model_cfg = base_model_config(cfg)
    model = MODELS.build(model_cfg)
    if not isinstance(getattr(model, 'backbone', None), nn.Module):
        raise ConfigError(f'{type(model).__name__} has no `backbone`, so no sensitivity can be measured.')
    model._dump_init_info = lambda *_: None  # suppresses mmengine's report of four lines for each parameter
    model.init_weights()
    del model._dump_init_info
    model = revert_sync_batchnorm(model).to(get_device())
    loader = build_loader(cfg, num_batches, seed)
    split = sensitivity_split(cfg)
    settings = cfg[f'{split}_dataloader']
    info = dict(
        config=os.path.basename(cfg.filename or ''),
        config_fingerprint=config_fingerprint(cfg),
        data=[d.get('ann_file') or d.get('data_root') or type_name(d['type']) for d in datasets(cfg, split)],
        images=len(loader.dataset),
        batch_size=settings.get('batch_size'),
    )
    if cfg.get('task'):
        info['task'] = cfg.task
    return compute_sensitivity(model, loader, num_batches, per_sample, seed=seed, info=info)


def base_model_config(cfg: Config) -> dict[str, Any]:
    """Copy the model of a config, without the method, so that all of its backbone's base trains."""

    def without_method(node: Any) -> Any:
        if isinstance(node, dict):
            if is_type(node, 'mona_mm.PeftBackbone'):
                return ConfigDict(type='mona_mm.PeftBackbone', base=node['base'])
            # dict.items, since ConfigDict.items would import the lazy objects of a pure-Python config
            return ConfigDict({key: without_method(value) for key, value in dict.items(node)})
        if isinstance(node, list | tuple):
            return type(node)(without_method(value) for value in node)
        return node

    return without_method(cfg.model)


def config_fingerprint(cfg: Config) -> str:
    """The shortened SHA-256 of the parts of a config on which a sensitivity depends: the model without method, and the
    data."""
    settings = cfg[f'{sensitivity_split(cfg)}_dataloader']
    parts = base_model_config(cfg), {key: value for key, value in dict.items(settings) if key not in _LOADER_SETTINGS}
    # SyncBN counts as BN, which replaces it on a CPU, and as the SyncBN for CPUs.
    text = re.sub(
        r'"(SyncBN|[\w.]+\.(CPU)?SyncBatchNorm)"', '"BN"', json.dumps(with_names(parts), sort_keys=True, default=str)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_loader(cfg: Config, num_batches: int, seed: int) -> DataLoader:
    """Build the loader of this process's share of the first batches of the data for a config's sensitivity.

    Raises:
        SensitivityError: if the data set is empty.
    """
    settings = dict(cfg[f'{sensitivity_split(cfg)}_dataloader'])
    workers = settings.get('num_workers', 0)
    for key in ('persistent_workers', 'prefetch_factor'):  # not accepted without workers
        settings.pop(key, None)
    rank, processes = get_dist_info()
    with alone():  # the samplers then give this process all batches, of which it takes its share below
        try:
            loader = Runner.build_dataloader({**settings, 'num_workers': 0}, seed=seed)
        except ValueError as error:
            # parts of torch's and mmengine's messages for an empty data set
            if 'num_samples' not in str(error) and 'at least one array' not in str(error):
                raise
            raise SensitivityError(NO_LABELS.format('in the training data')) from error
    if not len(loader.dataset):
        raise SensitivityError(NO_LABELS.format('in the training data'))
    return DataLoader(
        _SeededDataset(loader.dataset, seed),
        batch_sampler=_ShareOfBatches(loader.batch_sampler, rank, processes, num_batches),
        collate_fn=loader.collate_fn,
        num_workers=workers,
        pin_memory=loader.pin_memory,
    )


class _ShareOfBatches:
    """Every n-th batch of a batch sampler, as lists of the number of the batch and its indices."""

    def __init__(self, batches: Iterable[list[int]], rank: int, processes: int, num_batches: int) -> None:
        self.batches = batches
        self.rank = rank
        self.processes = processes
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for number, indices in enumerate(first_batches(self.batches, self.num_batches)):
            if number % self.processes == self.rank:
                yield [number, *indices]


class _SeededDataset:
    """A data set whose random numbers, also those of the transforms, depend only on the number of the batch."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        number, *indices = numbers
        set_seed(self.seed, number)
        return [self.dataset[i] for i in indices]
