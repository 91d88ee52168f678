"""Write what was read from a folder in the forms that the libraries' own data sets read."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError
from mona_mm.own_data.masks import IGNORED, MOST_CLASSES, read_map, to_classes
from mona_mm.own_data.objects import area_of
from mona_mm.own_data.samples import OwnData, Sample

_COLOURS = [
    '#4477aa',
    '#ee6677',
    '#228833',
    '#ccbb44',
    '#66ccee',
    '#aa3377',
    '#ee7733',
    '#009988',
    '#cc3311',
    '#0077bb',
    '#882255',
    '#999933',
    '#332288',
    '#44aa99',
    '#ddcc77',
    '#cc6677',
    '#88ccee',
    '#117733',
    '#aa4499',
    '#77aadd',
]
NO_OBJECT = 'no object'
"""The class of what is no object, where the data have another one with the name background."""


def palette(data: OwnData) -> list[tuple[int, int, int]]:
    """A colour for each class: the data's own, else colours that differ; the class background is black."""
    if data.palette:
        return list(data.palette)
    colours = []
    for i, name in enumerate(data.classes):
        number = int(_COLOURS[i % len(_COLOURS)][1:], 16)
        shade = 1.0 - 0.25 * (i // len(_COLOURS) % 3)
        colour = tuple(int(shade * (number >> shift & 255)) for shift in (16, 8, 0))
        colours.append((0, 0, 0) if name in ('background', NO_OBJECT) else colour)
    return colours


def write_data(data: OwnData, task: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Write the annotations of all splits below a folder; images stay where they are.

    Returns:
        By split, the options of the library's data sets that read them: of one, or of several where images differ in
        their suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write = dict(boxes=_write_boxes, maps=_write_maps, labels=_write_labels)[task]
    return {split: write(data, split, samples, folder) for split, samples in data.splits.items() if samples}


def _write_boxes(data: OwnData, split: str, samples: list[Sample], folder: Path) -> list[dict[str, Any]]:
    images, annotations = [], []
    for number, sample in enumerate(samples, start=1):
        images.append(dict(id=number, file_name=str(sample.image), width=sample.width, height=sample.height))
        for instance in sample.instances:
            annotation = dict(
                id=len(annotations) + 1,
                image_id=number,
                category_id=instance.label + 1,
                bbox=[round(value, 3) for value in instance.box],
                area=round(area_of(instance), 3),
                iscrowd=int(instance.ignored),
            )
            if instance.mask is not None:
                annotation['segmentation'] = instance.mask
            annotations.append(annotation)
    categories = [dict(id=i, name=name) for i, name in enumerate(data.classes, start=1)]
    content = dict(info={}, licenses=[], images=images, annotations=annotations, categories=categories)
    file = folder / f'{split}.json'
    AtomicLocalBackend().put_text(json.dumps(content), file)
    return [dict(ann_file=str(file))]


def _write_labels(data: OwnData, split: str, samples: list[Sample], folder: Path) -> list[dict[str, Any]]:
    file = folder / f'{split}.txt'
    AtomicLocalBackend().put_text(''.join(f'{sample.image} {sample.label}\n' for sample in samples), file)
    return [dict(ann_file=str(file))]


def _write_maps(data: OwnData, split: str, samples: list[Sample], folder: Path) -> list[dict[str, Any]]:
    base = Path(os.path.commonpath([sample.image.parent for all_ in data.splits.values() for sample in all_]))
    kinds = {sample.image.suffix for all_ in data.splits.values() for sample in all_}
    by_suffix = defaultdict(list)
    for sample in samples:
        name = sample.image.relative_to(base).with_suffix('')
        if str(name) != str(name).strip():
            raise ConfigError(f'{sample.image}: mmseg reads no names with spaces at their ends. Rename the file.')
        content = (
            _drawn(sample) if sample.label_map is None else to_classes(read_map(sample.label_map, data.coloured), data)
        )
        file = _labels_of(folder, sample.image.suffix, kinds) / name.with_name(f'{name.name}.png')
        AtomicLocalBackend().put(cv2.imencode('.png', content)[1].tobytes(), file)
        by_suffix[sample.image.suffix].append(name.as_posix())
    written = []
    for number, (suffix, names) in enumerate(by_suffix.items()):
        file = folder / (f'{split}_{number}.txt' if number else f'{split}.txt')
        AtomicLocalBackend().put_text(''.join(f'{name}\n' for name in names), file)
        prefix = dict(img_path=str(base), seg_map_path=str(_labels_of(folder, suffix, kinds)))
        written.append(dict(ann_file=str(file), data_prefix=prefix, img_suffix=suffix))
    return written


def _labels_of(folder: Path, suffix: str, kinds: set[str]) -> Path:
    """The folder of the label maps of images with a suffix: one for each, as a.jpg and a.png may differ."""
    return folder / ('labels' if len(kinds) == 1 else f'labels_{suffix[1:]}')


def _drawn(sample: Sample) -> np.ndarray:
    """The label map of objects: 0 is background, a class its number and one; the smaller object lies above."""
    content = np.zeros((sample.height, sample.width), np.uint8)
    for instance in sorted(sample.instances, key=area_of, reverse=True):
        value = IGNORED if instance.ignored or instance.mask is None else instance.label + 1
        if isinstance(instance.mask, dict):
            code = instance.mask
            code = coco_mask.frPyObjects(code, *code['size']) if isinstance(code['counts'], list) else code
            content[coco_mask.decode(code) > 0] = value
        elif instance.mask is None:
            x, y, w, h = (round(value) for value in instance.box)
            content[y : y + h, x : x + w] = value
        else:
            points = [
                np.round(np.asarray(polygon, float).reshape(-1, 2) - 0.5).astype(np.int32) for polygon in instance.mask
            ]
            cv2.fillPoly(content, points, value)
    return content


def as_maps(data: OwnData) -> None:
    """Make objects with masks the data of a segmentor, in place: what is no object becomes the first class."""
    background = 'background' if 'background' not in data.classes else NO_OBJECT
    data.classes = (background, *data.classes)
    if len(data.classes) > MOST_CLASSES:
        text = (
            f'label maps can have {MOST_CLASSES} classes at most, and there are {len(data.classes)} with the background'
        )
        data.findings.error(text, '', 'choose some with --cfg-options classes="[...]"', 0)
    for sample in (sample for samples in data.splits.values() for sample in samples):
        sample.present = tuple(sorted({0, *(instance.label + 1 for instance in sample.instances)}))
    data.notes.append('label maps are drawn from the masks of objects; what is no object is the class ' + background)
