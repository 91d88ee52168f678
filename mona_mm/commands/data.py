"""Check the data of a config before anything is built."""

import json
import mmap
import os.path as osp
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from mona_mm.commands.config_nodes import datasets
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.type_names import enter_scope, look_up, type_name


def sensitivity_split(cfg: Config) -> str:
    """The split on whose data SPT's sensitivity is measured."""
    return 'sensitivity' if cfg.get('sensitivity_dataloader') else 'train'


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the data of ``splits`` (``'train'``, ...) exist and have the classes of the config.

    Raises:
        MissingFileError: if a data set's root, annotation file or image folder is missing; it names the option to set.
        ConfigError: if annotations (COCO, VOC, label maps, lists of labels) have other classes, or in another order.
    """
    hint = f'/path/to/it, the folder that holds {cfg.task}/' if cfg.get('tasks') else '/path/to/it'
    for split in splits:
        for dataset in datasets(cfg, split):
            root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix')
            parts = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
            for path in [root, *(osp.join(root, part) for part in parts if part)]:
                _require(path, root or path, split, hint)
            _check_classes(cfg, dataset)
        evaluator = cfg.get(f'{split}_evaluator') or []
        for metric in [evaluator] if isinstance(evaluator, dict) else evaluator:
            _require(metric.get('ann_file'), metric.get('ann_file'), split, hint)


def _require(path: str | None, root: str | None, split: str, hint: str) -> None:
    if path and '://' not in path and not osp.exists(path):
        raise MissingFileError(
            f'The {split} data of this config are missing: there is no {path}. Put the data set at {root}, or set its '
            f'place with --cfg-options data_root={hint}'
        )


def _check_classes(cfg: Config, dataset: dict) -> None:
    """Check the classes of a data set.

    The libraries silently drop annotations of other classes, misname classes in another order than the file's, or stop
    in the middle of training with an index error.
    """
    enter_scope(cfg)
    with DATASETS.switch_scope_and_registry(None) as registry:
        dataset_class = look_up(registry, dataset.get('type'))
    for cls in getattr(dataset_class, '__mro__', ()):
        if cls.__name__ in _CHECKS:
            classes = (dataset.get('metainfo') or {}).get('classes') or dataset_class.METAINFO.get('classes')
            if classes is None:  # a classifier may have only numbers of classes
                head = cfg.model.get('head')
                count = head.get('num_classes') if isinstance(head, dict) else None
                classes = None if count is None else [str(i) for i in range(count)]
            if classes is None or isinstance(classes, list | tuple):  # mmengine itself reads a file of names
                _CHECKS[cls.__name__](dataset, classes)
            return


def _annotation_file(dataset: dict) -> str | None:
    path = osp.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    return path if osp.isfile(path) else None


def _check_coco(dataset: dict, classes: Sequence[str] | None) -> None:
    ann_file = _annotation_file(dataset)
    if classes is None or ann_file is None:
        return
    in_file = [category['name'] for category in _categories(ann_file)]
    expected = [name for name in in_file if name in set(classes)]
    if list(classes) != expected:
        missing = [name for name in classes if name not in in_file]
        problem = f'it has no {", ".join(missing)}' if missing else 'their order differs'
        raise ConfigError(
            f'The classes of the config, {_short(classes)}, do not fit {ann_file}: {problem}. Its classes are '
            f'{_short(in_file)}; train on all or some of them, in this order, with --cfg-options '
            f'classes="[{_short(in_file, ",")}]"'
        )


def _check_voc(dataset: dict, classes: Sequence[str] | None) -> None:
    """Refuse classes that both lack objects in the annotations and leave others out.

    Either alone may be right: a class may not occur in a small split, and leaving classes out is a choice.
    """
    ann_file = _annotation_file(dataset)
    if classes is None or ann_file is None:
        return
    folder = Path(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('sub_data_root') or '')
    folder = folder / (dataset.get('ann_subdir') or 'Annotations')
    found = set()
    for image in Path(ann_file).read_text().split():
        file = folder / f'{image}.xml'
        if not file.is_file():
            raise MissingFileError(f'{ann_file} lists {image}, but there is no {file}.')
        found.update(thing.findtext('name') for thing in ET.parse(file).iterfind('object'))
    missing, unknown = [name for name in classes if name not in found], sorted(found.difference(classes))
    if missing and unknown:
        raise ConfigError(
            f'The classes of the config do not fit the annotations that {ann_file} lists: they have no object of '
            f'{_short(missing)}, and {_short(unknown)} would silently be dropped. Name the classes to train on with '
            f'--cfg-options classes="[{_short(sorted(found), ",")}]"'
        )


def _check_segmentation(dataset: dict, classes: Sequence[str] | None) -> None:
    """Check the class numbers in some of the label maps, since reading all would take minutes."""
    with DATASETS.switch_scope_and_registry(None) as registry:
        known = (look_up(registry, dataset['type']).METAINFO or {}).get('classes')
        foreign = [name for name in classes or () if known and name not in known]
        if foreign:
            raise ConfigError(
                f'{type_name(dataset["type"])} has no class {_short(foreign)}. Its classes are {_short(known)}; for '
                "classes of your own set the data set's type to 'BaseSegDataset', whose label maps hold 0, 1, 2, ..."
            )
        built = registry.build(dict(dataset))
    step = max(1, len(built) // 20)
    for info in (built.get_data_info(i) for i in range(0, len(built), step)):
        path = info.get('seg_map_path')
        if path is None or not osp.isfile(path):
            continue
        label_map = mmcv.imread(path, flag='unchanged', backend='pillow')
        if label_map.ndim != 2:
            raise ConfigError(f'{path} is a colour image, not a map of class numbers (one channel, 8 bits).')
        ids = set(np.unique(label_map).tolist()) - {255}
        if info.get('reduce_zero_label'):
            ids = {i - 1 for i in ids - {0}}
        known_ids = info.get('label_map') or range(len(built.metainfo.get('classes') or ids))
        wrong = sorted(i for i in ids if i not in known_ids)
        if wrong:
            raise ConfigError(
                f'{path} has the class number {wrong[-1] + bool(info.get("reduce_zero_label"))}, but this config has '
                f'{len(known_ids)} classes. Name yours with --cfg-options classes="[...]", one for every number'
                f'{" from 1 on (0 is ignored: reduce_zero_label)" if info.get("reduce_zero_label") else ""}; '
                '255 is ignored.'
            )


def _check_labels(dataset: dict, classes: Sequence[str] | None) -> None:
    ann_file = _annotation_file(dataset)
    if classes is None or ann_file is None:
        return
    lines = Path(ann_file).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        path, _, label = line.strip().rpartition(' ')
        if not (path and label.isdecimal() and int(label) < len(classes)):
            raise ConfigError(
                f'{ann_file}, line {number}: {line!r} must be a path and a label from 0 to {len(classes) - 1}, since '
                f'the config has {len(classes)} classes. Name yours with --cfg-options classes="[...]"'
            )
    if lines:
        _require_image(dataset, lines[0].strip().rpartition(' ')[0], ann_file)


def _check_fgvc(dataset: dict, classes: Sequence[str] | None) -> None:
    ann_file = _annotation_file(dataset)
    if classes is None or ann_file is None:
        return
    with DATASETS.switch_scope_and_registry(None) as registry:
        built = registry.build({**dataset, 'pipeline': []})  # reads the lists, and raises errors about them
    highest = max((built.get_data_info(i)['gt_label'] for i in range(len(built))), default=0)
    if highest >= len(classes):
        raise ConfigError(
            f'{ann_file} has images of at least {highest + 1} classes, but the config has {len(classes)}. If it is the '
            'list of another task, set --cfg-options task=...; name your own classes with --cfg-options classes="[...]"'
        )
    if len(built):
        _require_image({}, built.get_data_info(0)['img_path'], ann_file)


def _require_image(dataset: dict, path: str, ann_file: str) -> None:
    """Check that the first image of a list exists, which finds a wrong folder."""
    prefix = dataset.get('data_prefix') or ''
    folder = prefix.get('img_path') or '' if isinstance(prefix, dict) else prefix
    path = osp.join(dataset.get('data_root') or '', folder, path)
    if '://' not in path and not osp.isfile(path):
        raise MissingFileError(f'The first image of {ann_file} does not exist: {path}. Put the images beside the list.')


_CHECKS = dict(
    CocoDataset=_check_coco,
    XMLDataset=_check_voc,
    BaseSegDataset=_check_segmentation,
    CustomDataset=_check_labels,
    FGVCJson=_check_fgvc,
)
"""The checks by name of a library's data set class; the first one among a class and its bases is used."""


def _short(names: Sequence[str], separator: str = ', ') -> str:
    return separator.join(names[:10]) + (f'{separator}...' if len(names) > 10 else '')


def _categories(ann_file: str) -> list[dict]:
    """Read the ``categories`` of a COCO file, without parsing the hundreds of megabytes around them.

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
