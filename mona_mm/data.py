"""Check the data that a config names, before anything is built."""

import json
import mmap
import os.path as osp
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mona_mm.errors import ConfigError, MissingFileError


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the data which ``splits`` (``'train'``, ...) name are there and hold the classes of the config.

    Raises:
        MissingFileError: if a data set's root, annotation file or image folder is missing; it says what to set.
        ConfigError: if a COCO-format annotation file has other classes, or in another order.
    """
    for split in splits:
        for dataset in datasets(cfg, split):
            root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix')
            parts = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
            for path in [root, *(osp.join(root, part) for part in parts if part)]:
                _require(path, root or path, split)
            if dataset.get('ann_file'):
                _check_classes(cfg, dataset, osp.join(root, dataset['ann_file']))
        evaluator = cfg.get(f'{split}_evaluator') or []
        for metric in [evaluator] if isinstance(evaluator, dict) else evaluator:
            _require(metric.get('ann_file'), metric.get('ann_file'), split)


def _require(path: str | None, root: str | None, split: str) -> None:
    if path and '://' not in path and not osp.exists(path):
        raise MissingFileError(
            f'The {split} data of this config are not there: no {path}. Put the data set at {root} or say where it is '
            'with --cfg-options data_root=/path/to/it'
        )


def datasets(cfg: Config, split: str) -> Iterator[dict]:
    """The data sets of a split, within wrappers (RepeatDataset, ConcatDataset, ...)."""
    pending = [(cfg.get(f'{split}_dataloader') or {}).get('dataset')]
    while pending:
        dataset = pending.pop(0)
        inner = dataset and (dataset.get('dataset') or dataset.get('datasets'))
        if inner:
            pending += inner if isinstance(inner, list | tuple) else [inner]
        elif dataset:
            yield dataset


def _check_classes(cfg: Config, dataset: dict, ann_file: str) -> None:
    """mmdet drops annotations of other classes in silence, and misnames classes whose order is not the file's."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with DATASETS.switch_scope_and_registry(None) as registry:
        dataset_class = registry.get(dataset['type'])
    if not hasattr(dataset_class, 'COCOAPI') or not osp.isfile(ann_file):
        return
    classes = (dataset.get('metainfo') or {}).get('classes') or dataset_class.METAINFO.get('classes')
    if not isinstance(classes, list | tuple):
        return  # a file of names, which mmengine reads itself
    in_file = [category['name'] for category in _categories(ann_file)]
    expected = [name for name in in_file if name in set(classes)]
    if list(classes) != expected:
        missing = [name for name in classes if name not in in_file]
        what = f'it has no {", ".join(missing)}' if missing else 'their order is not its'
        raise ConfigError(
            f'The classes of the config, {_short(classes)}, do not fit {ann_file}: {what}. Its classes are '
            f'{_short(in_file)}; train on all or some of them, in this order, with --cfg-options '
            f'classes="[{_short(in_file, ",")}]"'
        )


def _short(names: list[str] | tuple[str, ...], separator: str = ', ') -> str:
    return separator.join(names[:10]) + (f'{separator}...' if len(names) > 10 else '')


def _categories(ann_file: str) -> list[dict]:
    """The ``categories`` of a COCO file, without parsing the hundreds of megabytes around them.

    Raises:
        ConfigError: if there are none.
    """
    with open(ann_file, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        key = b'"categories"'
        start = text.rfind(key)
        while start >= 0:
            after = (
                text[start + len(key) : start + len(key) + (1 << 20)]
                .decode('utf-8', errors='replace')
                .lstrip(' \n\r\t:')
            )
            try:
                categories, _ = json.JSONDecoder().raw_decode(after)
                if isinstance(categories, list) and all('name' in category for category in categories):
                    return categories
            except (json.JSONDecodeError, TypeError):
                pass
            start = text.rfind(key, 0, start)
    raise ConfigError(f'{ann_file} is not in COCO format: it has no "categories" with names.')
