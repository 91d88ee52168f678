"""LabelMe's json: a file beside each image, with polygons, rectangles, circles and masks."""

import base64
import binascii
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError
from mona_mm.own_data.coco import read_json
from mona_mm.own_data.images import split_of_path
from mona_mm.own_data.layout import Folder, Layout, class_names, classes_file, natural
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import OwnData, Sample


class LabelMe(Layout):
    """Annotations in LabelMe's format."""

    name, title, tasks = 'labelme', 'LabelMe json', ('boxes', 'maps')

    def recognise(self, folder: Folder) -> bool:
        return any(_looks_like_labelme(path) for path in folder.with_suffix('.json')[:50])

    def read(self, folder: Folder) -> OwnData:
        contents = _read_files(folder)
        names = {str(shape.get('label', '')).strip() for raw in contents.values() for shape in raw['shapes']}
        listed = classes_file(folder)
        order = sorted(names, key=natural)
        if listed:
            lines = [line.strip() for line in listed.read_text(encoding='utf-8').splitlines()]
            order = [line for line in lines if line and line not in ('__ignore__', '_background_')]
            unknown = sorted(names.difference(order))
            if unknown:
                folder.findings.error(f'labels are not in {listed.name}', unknown[0], '', len(unknown))
        classes = class_names(order, folder.findings, 'the json files')
        data = OwnData(self.title, classes, defaultdict(list), folder.findings)
        objects, used = Objects(folder.findings), set()
        for path, raw in contents.items():
            split = split_of_path(path.parent, folder.root) if path.parent != folder.root else None
            sample = _sample(folder, path, raw, split or '')
            if sample is None:
                continue
            used.add(sample.image)
            for label, shapes in _grouped(raw['shapes']):
                if label in classes:
                    _add(folder, objects, sample, classes.index(label), shapes)
            data.splits[split or ''].append(sample)
        objects.finish()
        rest = [path for path in folder.images.paths if path not in used]
        if rest:
            folder.findings.warn('images have no json file', folder.show(rest[0]), 'not used', len(rest))
        return data


def _looks_like_labelme(path: Path) -> bool:
    with open(path, 'rb') as file:
        start = file.read(1 << 16)
        if b'"shapes"' in start:
            return True
        file.seek(0)
        return path.stat().st_size < 1 << 26 and b'"shapes"' in file.read()


def _read_files(folder: Folder) -> dict[Path, dict]:
    contents = {}
    for path in folder.with_suffix('.json'):
        try:
            raw = read_json(path)
        except ConfigError as error:
            folder.findings.error('json files do not parse', str(error).replace(str(path), folder.show(path)))
            continue
        if not isinstance(raw, dict) or not isinstance(raw.get('shapes'), list):
            folder.findings.warn('json files have no "shapes"', folder.show(path), 'not used')
            continue
        contents[path] = raw
    return contents


def _sample(folder: Folder, path: Path, raw: dict, split: str) -> Sample | None:
    name = str(raw.get('imagePath') or '')
    image = folder.images.find(path.stem, path.parent, split)
    image = image or (folder.images.find(name, path.parent, split) if name else None)
    if image is None and raw.get('imageData'):
        image = _extract(folder, path, raw['imageData'])
    if image is None:
        folder.unreadable(f'{name or path.stem}, the image of {folder.show(path)}')
        return None
    sample = folder.sample(image)
    said = (raw.get('imageWidth'), raw.get('imageHeight'))
    if sample is not None and None not in said and said != (sample.width, sample.height):
        example = (
            f'{folder.show(path)}: {said[0]} x {said[1]} in the json, {sample.width} x {sample.height} in the image'
        )
        folder.findings.error('images have another size than the json says', example, 'annotate the files as they are')
    return sample


def _extract(folder: Folder, path: Path, data: str) -> Path | None:
    """Write the image that a LabelMe file contains; None if it is none, or there is no place to write to."""
    if folder.extracted is None:
        return None
    try:
        content = base64.b64decode(data)
        suffix = (Image.open(io.BytesIO(content)).format or 'png').lower()
    except (binascii.Error, UnidentifiedImageError, ValueError):
        return None
    file = folder.extracted / path.relative_to(folder.root).with_suffix(f'.{suffix}')
    AtomicLocalBackend().put(content, file)
    return file


def _grouped(shapes: list[dict]) -> list[tuple[str, list[dict]]]:
    """The shapes of each object: those of one label and one group are one object."""
    groups = defaultdict(list)
    for number, shape in enumerate(shapes):
        label, group = str(shape.get('label', '')).strip(), shape.get('group_id')
        groups[(label, ('group', group) if group is not None else ('alone', number))].append(shape)
    return [(label, group) for (label, _), group in groups.items()]


def _add(folder: Folder, objects: Objects, sample: Sample, label: int, shapes: list[dict]) -> None:
    polygons, whole, boxes = [], None, []
    for shape in shapes:
        points, kind = shape.get('points') or [], shape.get('shape_type') or 'polygon'
        where = f'{shape.get("label")} in {sample.image.name}'
        try:
            points = [(float(x), float(y)) for x, y in points]
        except (TypeError, ValueError):
            folder.findings.error('shapes have points that are not two numbers', where)
            continue
        if kind == 'polygon':
            polygons.append([value for point in points for value in point])
        elif kind == 'rectangle' and len(points) >= 2:
            boxes.append((points[0], points[1]))
        elif kind == 'circle' and len(points) == 2:
            polygons.append(_circle(*points))
        elif kind == 'mask' and len(points) == 2 and shape.get('mask'):
            whole = _mask(sample, points[0], shape['mask'])
        else:
            folder.findings.warn(f'shapes are of the kind {kind!r}', where, 'not used')
    for (x1, y1), (x2, y2) in boxes:
        left, top, right, bottom = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        objects.add(sample, label, (left, top, right - left, bottom - top))
    if whole is not None:
        objects.add(sample, label, None, whole)
    elif polygons:
        objects.add(sample, label, None, polygons)


def _circle(centre: tuple[float, float], edge: tuple[float, float], corners: int = 32) -> list[float]:
    radius = math.dist(centre, edge)
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [v for a in angles for v in (centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a))]


def _mask(sample: Sample, corner: tuple[float, float], text: Any) -> dict | None:
    """The run-length code of a mask that LabelMe keeps as a small picture of the box."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            part = np.asarray(image.convert('L')) > 0
    except (binascii.Error, UnidentifiedImageError, ValueError, TypeError):
        return None
    full = np.zeros((sample.height, sample.width), np.uint8)
    x, y = (max(0, int(value)) for value in corner)
    target = full[y : y + part.shape[0], x : x + part.shape[1]]
    target[...] = part[: target.shape[0], : target.shape[1]]
    code = coco_mask.encode(np.asfortranarray(full))
    return {**code, 'counts': code['counts'].decode()}
