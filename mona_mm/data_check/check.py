"""Check the data of a config before anything is built: the libraries read them, and what was read is looked at."""

import contextlib
import gc
import os
import os.path as osp
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS

from mona_mm.config.nodes import datasets, dicts_of
from mona_mm.data_check.reading import Reading, read_dataset
from mona_mm.data_check.report import DataReport, SplitReport
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.own_data import Findings, note_duplicates, short
from mona_mm.own_data.images import is_image, read_header
from mona_mm.type_names import enter_scope, look_up, type_name

_MOST_HEADERS, _MOST_MAPS = 1000, 40
"""How many image headers and label maps of a data set are read; they are spread over all."""


def sensitivity_split(cfg: Config) -> str:
    """The split on whose data SPT's sensitivity is measured."""
    return 'sensitivity' if cfg.get('sensitivity_dataloader') else 'train'


def check_data(cfg: Config, splits: tuple[str, ...], skip_unreadable: bool = False) -> DataReport:
    """Check that the data of ``splits`` (``'train'``, ...) are there, can be read and fit the config.

    Args:
        cfg: the config.
        splits: the names of the splits.
        skip_unreadable: whether training images that are missing or cannot be read are no fault, since training leaves
            them out.

    Returns:
        What was found; its warnings are no reason not to train.

    Raises:
        MissingFileError: if a data set's root, annotation file, image folder or image is missing; it names the option
            to set.
        ConfigError: if the data cannot be read, or have other classes than the config, or in another order, or nothing
            could be learnt from them; one line for each kind of fault.
    """
    with _without_collection():
        return _check_data(cfg, splits, skip_unreadable)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Suspend the search for circular references, a seventh of the time of reading a hundred thousand objects."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_data(cfg: Config, splits: tuple[str, ...], skip_unreadable: bool) -> DataReport:
    hint = f'/path/to/it, the folder that holds {cfg.task}/' if cfg.get('tasks') else '/path/to/it'
    enter_scope(cfg)
    own = cfg.get('own_data') or {}
    report = DataReport(notes=list(own.get('notes') or []), earlier=list(own.get('warnings') or []))
    known: dict[str, Reading] = {}
    for split in splits:
        entry = SplitReport(split)
        for dataset in datasets(cfg, split):
            _require_paths(dataset, split, hint)
            _check_known_classes(dataset)
            key = repr({name: value for name, value in dict.items(dataset) if name != 'pipeline'})
            reading = known.get(key) or read_dataset(dataset)  # VOC's years are read once, though they are repeated
            known[key] = reading
            if reading.dataset is not None:
                _check_dataset(cfg, split, reading, report, entry)
                _check_images(reading, report.findings, split, skip_unreadable and split == 'train')
        evaluator = cfg.get(f'{split}_evaluator') or []
        for metric in [evaluator] if isinstance(evaluator, dict) else evaluator:
            _require(metric.get('ann_file'), metric.get('ann_file'), split, hint)
        report.add(entry)
    if len(splits) > 1:
        note_duplicates(report.splits_of_images(), report.findings)
    report.findings.raise_errors()
    report.judge()
    return report


def _require_paths(dataset: dict, split: str, hint: str) -> None:
    if any((part.get('backend_args') or {}).get('backend', 'local') != 'local' for part in dicts_of(dataset)):
        return  # the paths are not those of files here
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix')
    parts = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    for path in [root, *(osp.join(root, part) for part in parts if part)]:
        _require(path, root or path, split, hint)


def _require(path: str | None, root: str | None, split: str, hint: str) -> None:
    if path and '://' not in path and not osp.exists(path):
        raise MissingFileError(
            f'The {split} data of this config are missing: there is no {path}. Put the data set at {root}, or set its '
            f'place with --cfg-options data_root={hint}, or name a folder of your own with --data'
        )


def _check_dataset(cfg: Config, split: str, reading: Reading, report: DataReport, entry: SplitReport) -> None:
    findings = report.findings
    if reading.kind == 'CocoDataset':
        _check_coco(reading, findings, split)
    elif reading.kind == 'XMLDataset':
        _check_voc(reading)
    elif reading.kind == 'BaseSegDataset':
        _check_maps(reading, findings, entry)
    elif reading.kind in ('CustomDataset', 'FGVCJson'):
        _check_labels(cfg, reading, split)
    if split in ('train', 'val'):
        _check_heads(cfg, reading)
    entry.add(reading)
    report.classes = report.classes or reading.classes
    if reading.samples and not reading.kept:
        conditions = ', '.join(f'{k}={v}' for k, v in (reading.config.get('filter_cfg') or {}).items())
        raise ConfigError(
            f'The {split} data: none of {len(reading.samples)} images is left by filter_cfg ({conditions}): '
            'they have no '
            'object, or are smaller than min_size.'
        )
    if not reading.samples:
        raise ConfigError(f'The {split} data: {type_name(dict.get(reading.config, "type"))} has read no image.')


# Classes -----------------------------------------------------------------------------------------------------------


def _check_coco(reading: Reading, findings: Findings, split: str) -> None:
    """Check that labels mean the classes of the config, and count what the library drops."""
    if reading.raw is None or reading.classes is None:
        return
    names = {category['id']: category['name'] for category in reading.raw['categories']}
    ids = list(getattr(reading.dataset, 'cat_ids', ()))  # by label, as the library has read them
    classes, read = list(reading.classes), [names[id_] for id_ in ids if id_ in names]
    if classes != read:
        missing = [name for name in classes if name not in names.values()]
        problem = f'it has no {", ".join(missing)}' if missing else 'their order differs'
        sorts = type(reading.dataset).__name__ not in ('CocoDataset', 'LVISDataset') and ids == sorted(ids)
        order = [names[id_] for id_ in sorted(names)] if sorts and len(ids) > 1 else list(names.values())
        raise ConfigError(
            f'The classes of the config, {short(classes)}, do not fit {reading.ann_file}: {problem}. Its classes are '
            f'{short(order)}; train on all or some of them, in this order, with --cfg-options '
            f'classes="[{short(order, separator=",")}]"'
        )
    sizes = {image['id']: image for image in reading.raw['images']}
    counts: Counter = Counter()
    first: dict[str, str] = {}
    for annotation in reading.raw['annotations']:
        problem = _dropped(annotation, sizes.get(annotation['image_id']), set(ids))
        if problem is None and reading.with_mask:
            problem = _bad_mask(annotation)
        if problem:
            counts[problem] += 1
            first.setdefault(problem, _example(annotation, sizes.get(annotation['image_id'])))
    without = counts.pop('no mask', 0)
    if without:
        findings.error(
            f'of {len(reading.raw["annotations"])} objects in {reading.ann_file} have no mask '
            '("segmentation"), and the '
            'config trains masks',
            first['no mask'],
            'read them with --data FOLDER, which leaves the mask head out, or take a config of boxes',
            without,
        )
    for problem, count in counts.items():
        fix = 'ignored' if problem.startswith('polygons') else 'the library drops them, the evaluation does not'
        findings.warn(f'{problem} ({split})', first[problem], fix, count)


def _dropped(annotation: dict, image: dict | None, ids: set) -> str | None:
    """Why mmdet's CocoDataset drops an annotation; None if it does not."""
    if annotation.get('ignore'):
        return None
    if image is None:
        return 'objects are of images that the file does not list'
    x, y, w, h = annotation['bbox']
    if w <= 0 or h <= 0:
        return 'boxes have no width or height (zero or negative)'
    if min(x + w, image['width']) <= max(x, 0) or min(y + h, image['height']) <= max(y, 0):
        return 'boxes lie outside their image'
    if annotation['area'] <= 0:
        return 'objects have an area of zero or less'
    if w < 1 or h < 1:
        return 'boxes are smaller than a pixel'
    return None if annotation['category_id'] in ids else 'objects are of categories that the config does not name'


def _bad_mask(annotation: dict) -> str | None:
    mask = annotation.get('segmentation')
    if not mask:
        return 'no mask'
    if isinstance(mask, list) and not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
        return 'polygons have fewer than three points'
    return None


def _example(annotation: dict, image: dict | None) -> str:
    return f'{(image or {}).get("file_name", "no image")}, box {annotation["bbox"]}'


def _check_voc(reading: Reading) -> None:
    """Refuse classes that both lack objects in the annotations and leave others out.

    Either alone may be right: a class may not occur in a small split, and leaving classes out is a choice.
    """
    classes = reading.classes or ()
    missing = [name for name in classes if name not in reading.names]
    unknown = sorted(set(reading.names).difference(classes))
    if missing and unknown:
        raise ConfigError(
            f'The classes of the config do not fit the annotations that {reading.ann_file} lists: they have no '
            'object of '
            f'{short(missing)}, and {short(unknown)} would silently be dropped. Name the classes to train on with '
            f'--cfg-options classes="[{short(sorted(reading.names), separator=",")}]"'
        )


def _check_labels(cfg: Config, reading: Reading, split: str) -> None:
    """Check that every label of a classifier's list is one of its classes, and that folders are the classes."""
    classes, ann_file = reading.classes, reading.ann_file
    folders = list(getattr(reading.dataset, 'folder_to_idx', None) or ())
    if folders and classes is not None and list(classes) != folders:
        raise ConfigError(
            f'The classes of the config, {short(classes)}, are not the folders of '
            f'{reading.dataset.img_prefix}, which count '
            f'in the order of their names: {short(folders)}. Leave the classes out, or name these, with --cfg-options '
            f'classes="[{short(folders, separator=",")}]"'
        )
    labels = [sample['gt_label'] for sample in reading.samples if isinstance(sample.get('gt_label'), int)]
    head = cfg.model.get('head')
    count = len(classes) if classes else head.get('num_classes') if isinstance(head, dict) else None
    if count is None or not labels:
        return
    if reading.kind == 'FGVCJson':
        if max(labels) >= count:
            raise ConfigError(
                f'{ann_file} has images of at least {max(labels) + 1} classes, but the config has {count}. If '
                'it is the '
                'list of another task, set --cfg-options task=...; name your own classes with --cfg-options '
                'classes="[...]"'
            )
        return
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < count), None)
    if wrong is not None:
        path = osp.relpath(reading.samples[wrong]['img_path'], reading.dataset.img_prefix or '.')
        raise ConfigError(
            f"{ann_file}, line {wrong + 1}: '{path} {labels[wrong]}' must be a path and a label from 0 to "
            f'{count - 1}, since '
            f'the config has {count} classes. Name yours with --cfg-options classes="[...]"'
        )
    if split == 'train' and classes is None and max(labels) + 1 < count and not cfg.get('tasks'):
        raise ConfigError(
            f'{ann_file} has labels from 0 to {max(labels)}, but the head has {count} outputs and no class has '
            'a name. Name '
            'yours with --cfg-options classes="[...]"'
        )


def _check_heads(cfg: Config, reading: Reading) -> None:
    """Refuse heads with another number of classes than the data set has."""
    if reading.kind == '' or reading.classes is None:
        return
    count = len(reading.classes)
    for place, head in _heads(cfg.model):
        number = dict.get(head, 'num_classes')
        if isinstance(number, int) and number != count and not head.get('class_agnostic'):
            raise ConfigError(
                f'{place}.num_classes is {number}, but {type_name(dict.get(reading.config, "type"))} has '
                f'{count} classes: '
                f'{short(reading.classes)}. Name the classes with --cfg-options classes="[...]", which sets both'
            )


def _heads(model: dict) -> Iterable[tuple[str, dict]]:
    """The heads of a model whose classes are those of the data set, with their places in the config."""
    pending = [('model', model)]
    while pending:
        place, node = pending.pop()
        for key in ('bbox_head', 'mask_head', 'roi_head', 'decode_head', 'auxiliary_head', 'head', 'detector'):
            child = dict.get(node, key)
            for number, each in enumerate(child if isinstance(child, list | tuple) else [child]):
                if isinstance(each, dict):
                    path = f'{place}.{key}.{number}' if isinstance(child, list | tuple) else f'{place}.{key}'
                    pending.append((path, each))
                    if key not in ('roi_head', 'detector'):
                        yield path, each


# Label maps ----------------------------------------------------------------------------------------------------------


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    return list(items[:: max(1, -(-len(items) // most))])


def _check_maps(reading: Reading, findings: Findings, entry: SplitReport) -> None:
    """Check the class numbers in some of the label maps, since reading all would take minutes."""
    config, classes = reading.config, reading.classes
    reduce_zero = bool(getattr(reading.dataset, 'reduce_zero_label', False))
    for step in dicts_of(config.get('pipeline') or []):
        asked = step.get('reduce_zero_label')
        if type_name(step.get('type')) == 'LoadAnnotations' and asked is not None and bool(asked) != reduce_zero:
            raise ConfigError(
                f'{type_name(config["type"])} has reduce_zero_label={reduce_zero}, but LoadAnnotations in its pipeline '
                f'{bool(asked)}: set both alike. True means that 0 in the label maps is no class, and 1 the first'
            )
    if not reading.is_local:
        return
    found: Counter = Counter()
    for info in _spread(reading.samples, _MOST_MAPS):
        path = info.get('seg_map_path')
        if path is None:
            continue
        if not osp.isfile(path):
            _missing_map(path, info['img_path'], reading)
        label_map = mmcv.imread(path, flag='unchanged', backend='pillow')
        if label_map.ndim != 2:
            raise ConfigError(
                f'{path} is a colour image, not a map of class numbers (one channel, 8 bits). --data FOLDER '
                'reads colours.'
            )
        header = read_header(info['img_path'])
        if not header.problem and label_map.shape[::-1] not in (header.stored, (header.width, header.height)):
            example = f'{path}: {label_map.shape[1]} x {label_map.shape[0]}, image: {header.width} x {header.height}'
            findings.error('label maps have another size than their image', example)
        ids = set(np.unique(label_map).tolist())
        found.update(ids)
        ids -= {255}
        if reduce_zero:
            ids = {i - 1 for i in ids - {0}}
        known = info.get('label_map') or range(len(classes or ids))
        wrong = sorted(i for i in ids if i not in known)
        if wrong:
            raise ConfigError(
                f'{path} has the class number {wrong[-1] + reduce_zero}, but this config has {len(known)} '
                'classes. Name '
                f'yours with --cfg-options classes="[...]", one for every number'
                f'{" from 1 on (0 is ignored: reduce_zero_label)" if reduce_zero else ""}; 255 is ignored.'
            )
        names = info.get('label_map') or {i: i for i in ids}
        entry.present.update(names[i] for i in ids if names[i] != 255)
        entry.looked_at += 1
    _check_meaning(reading, found, reduce_zero, entry)


def _check_known_classes(config: dict) -> None:
    """Refuse classes that the type of a data set of label maps does not know, before its library does."""
    given = (config.get('metainfo') or {}).get('classes') or ()
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = look_up(registry, dict.get(config, 'type'))
    if not any(base.__name__ == 'BaseSegDataset' for base in getattr(cls, '__mro__', ())):
        return
    known = (cls.METAINFO or {}).get('classes')
    given = given if isinstance(given, list | tuple) else ()
    foreign = [name for name in given if known and name not in known]
    if foreign:
        raise ConfigError(
            f'{type_name(config["type"])} has no class {short(foreign)}. Its classes are {short(known)}; for '
            'classes of your '
            "own name the folder with --data FOLDER, or set the data set's type to 'BaseSegDataset' and "
            'reduce_zero_label '
            'to False there and in LoadAnnotations; its label maps hold 0, 1, 2, ...'
        )


def _missing_map(path: str, image: str, reading: Reading) -> None:
    folder, stem = osp.dirname(path), osp.splitext(osp.basename(image))[0]
    others = sorted(name for name in _names_in(folder) if name.startswith(stem) and is_image(name))
    example = f'; there is {others[0]}, so set seg_map_suffix' if others else ''
    raise MissingFileError(
        f'There is no label map {path}{example}. {type_name(dict.get(reading.config, "type"))} takes the name '
        'of the image '
        f'with seg_map_suffix={reading.config.get("seg_map_suffix", ".png")!r}'
    )


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if osp.isdir(folder) else []


def _check_meaning(reading: Reading, found: Counter, reduce_zero: bool, entry: SplitReport) -> None:
    """Refuse label maps whose numbers mean something else than the config takes them for."""
    classes, name = reading.classes or (), type_name(dict.get(reading.config, 'type'))
    if set(found) == {0, 255} and len(classes) == 2 and not reduce_zero:
        raise ConfigError(
            f'The label maps of {name} hold only 0 and 255, and 255 is ignored: {classes[1]} would never be '
            'learnt. Write 1 '
            'in place of 255, or let --data FOLDER read them as binary masks'
        )
    remapped = getattr(reading.dataset, 'label_map', None)
    numbers = set(found) - {255}
    if remapped and numbers and max(numbers) <= len(classes) and entry.looked_at:
        lost = [number for number in numbers if remapped.get(number - reduce_zero, 255) == 255]
        if len(lost) > len(numbers) / 2:
            raise ConfigError(
                f'The label maps hold the numbers {short(sorted(numbers))}, but {name} takes {classes[0]} by '
                'its own number '
                f'{next(i for i, c in remapped.items() if c == 0) + reduce_zero}: nearly all pixels would be '
                'ignored. Label '
                'maps of your own: name the folder with --data FOLDER'
            )


# Images --------------------------------------------------------------------------------------------------------------


def _check_images(reading: Reading, findings: Findings, split: str, skip: bool) -> None:
    """Check that all images are there, and that some of them can be read and have the size of their annotations."""
    paths = [sample.get('img_path') for sample in reading.kept]
    if not reading.is_local or any(not isinstance(path, str) or '://' in path for path in paths):
        return
    missing = [path for path in paths if not osp.isfile(path)]
    note = findings.warn if skip else findings.error
    if missing and skip:
        findings.warn(f'images are missing and are left out ({split})', missing[0], count=len(missing))
    elif missing:
        where = reading.ann_file or type_name(dict.get(reading.config, 'type'))
        what = 'The first image' if missing[0] == paths[0] else f'An image ({len(missing)} of {len(paths)})'
        raise MissingFileError(f'{what} of {where} does not exist: {missing[0]}. Put the images beside the list.')
    stored = any(
        str(step.get('color_type')).endswith('ignore_orientation')
        for step in dicts_of(reading.config.get('pipeline') or [])
    )
    for sample in _spread(reading.kept, _MOST_HEADERS):
        header = read_header(sample['img_path'])
        if header.problem:
            if osp.isfile(sample['img_path']):
                fix = '' if skip else 'mend them, or leave them out with --skip-unreadable or --data-options skip=True'
                note(f'images cannot be read ({split})', f'{sample["img_path"]}: {header.problem}', fix)
            continue
        size = header.stored if stored else (header.width, header.height)
        said = (sample.get('width'), sample.get('height'))
        if None not in said and said != size and reading.kind in ('CocoDataset', 'XMLDataset'):
            example = (
                f'{sample["img_path"]}: {said[0]} x {said[1]} in the annotations, {size[0]} x {size[1]} in the file'
            )
            turned = header.stored != (header.width, header.height) and said == header.stored
            fix = 'use --data FOLDER, which ignores the rotation in their EXIF data' if turned else ''
            findings.error(
                'images have another size than their annotations say', example, fix or 'mend the annotations'
            )
