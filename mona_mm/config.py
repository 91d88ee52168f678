"""Read a config for the command lines: options, data paths, and what a machine without an accelerator needs."""

import os.path as osp
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mona_mm.errors import MissingFileError


def load_config(file: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    mmengine merges after the file has been evaluated, so an option does not reach what was computed from it. For
    ``data_root``, the one variable of every data path in the shipped configs, it does here.

    Raises:
        MissingFileError: if there is no such file.
    """
    if not osp.isfile(file):
        raise MissingFileError(f'There is no config file {file}.')
    cfg = Config.fromfile(file)
    options = dict(options or {})
    new_root = options.get('data_root')
    if new_root is not None and 'data_root' in cfg:
        _replace_root(cfg._cfg_dict, cfg.data_root, osp.join(new_root, ''))
        options['data_root'] = cfg.data_root
    cfg.merge_from_dict(options)
    return cfg


def _replace_root(node: Any, old: str, new: str) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if isinstance(value, str) and value.startswith(old):
            node[key] = new + value[len(old) :]
        elif isinstance(value, dict | list):
            _replace_root(value, old, new)


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check, before anything is built, that the data which ``splits`` (``'train'``, ...) name are there.

    Raises:
        MissingFileError: if a dataset's root, annotation file or image folder is missing; it says what to set.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for dataset in _datasets(loader.get('dataset')):
            root = dataset.get('data_root') or ''
            prefix = dataset.get('data_prefix')
            paths = [root, dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
            for path in paths:
                full = path and osp.join(root, path)
                if full and '://' not in full and not osp.exists(full):
                    raise MissingFileError(
                        f'The {split} data of this config are not there: no {full}. Put the data set at {root or full} '
                        'or say where it is with --cfg-options data_root=/path/to/it'
                    )


def _datasets(cfg: Any) -> Iterator[dict]:
    """The datasets in a dataset config, within wrappers (RepeatDataset, ConcatDataset, ...)."""
    if not isinstance(cfg, dict):
        return
    inner = cfg.get('dataset') or cfg.get('datasets')
    if inner is None:
        yield cfg
    for dataset in inner if isinstance(inner, list | tuple) else [inner]:
        yield from _datasets(dataset)


def adapt_to_device(cfg: Config) -> None:
    """Without an accelerator, replace what needs one: mixed precision, SyncBN, NCCL. Says so in one line."""
    if torch.accelerator.is_available():
        return
    replaced = []
    wrapper = cfg.get('optim_wrapper')
    if wrapper is not None and wrapper.get('type') == 'AmpOptimWrapper':
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        replaced.append('fp32 in place of mixed precision')
    if _replace_type(cfg._cfg_dict, 'SyncBN', 'BN'):
        replaced.append('BN in place of SyncBN')
    if cfg.get('launcher', 'none') != 'none':
        cfg.merge_from_dict(
            {
                'env_cfg.dist_cfg': dict(backend='gloo'),
                'model_wrapper_cfg': {'type': 'MMDistributedDataParallel', **cfg.get('model_wrapper_cfg', {})},
            }
        )
        replaced.append('gloo in place of nccl')
    if replaced:
        print_log(f'No accelerator here: running on the CPU with {", ".join(replaced)}.', logger='current')


def _replace_type(node: Any, old: str, new: str) -> bool:
    found = False
    if isinstance(node, dict) and node.get('type') == old:
        node['type'] = new
        found = True
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list | tuple):
            found |= _replace_type(value, old, new)
    return found


def resume_from(cfg: Config, checkpoint: str | None) -> None:
    """Set a config to resume from ``checkpoint``, or with ``'auto'`` from the newest in the work dir.

    Raises:
        MissingFileError: if there is none; the run would otherwise silently start anew.
    """
    if checkpoint is None:
        return
    if checkpoint == 'auto':
        checkpoint = find_last_checkpoint(cfg.work_dir)
        if checkpoint is None:
            raise MissingFileError(
                f'--resume: there is no checkpoint in {cfg.work_dir}. Name one (--resume PATH), name the work dir of '
                'the run to continue (--work-dir), or leave --resume out to start anew.'
            )
    elif '://' not in checkpoint and not osp.isfile(checkpoint):
        raise MissingFileError(f'--resume: there is no checkpoint {checkpoint}.')
    cfg.resume = True
    cfg.load_from = checkpoint


def find_last_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that ``last_checkpoint`` in ``work_dir`` names, or None."""
    pointer = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(pointer):
        return None
    with open(pointer, encoding='utf-8') as file:
        path = file.read().strip()
    if osp.isfile(path):
        return path
    moved = osp.join(work_dir, osp.basename(path))  # the work dir was renamed or copied
    return moved if osp.isfile(moved) else None

