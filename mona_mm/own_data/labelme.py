"""LabelMe's json: a file beside each image, with polygons, rectangles, circles and masks."""

import base64
import binascii
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError
from mona_mm.own_data.layout import Folder, Layout, class_names, classes_file, natural, pixels
from mona_mm.own_data.objects import Objects, box_of
from mona_mm.own_data.samples import OwnData, Sample
from mona_mm.own_data.text import lines_of, read_json, says


class LabelMe(Layout):
    """Annotations in LabelMe's format."""

    name, title, tasks = 'labelme', 'LabelMe json', ('boxes', 'maps')

    def recognise(self, folder: Folder) -> bool:
        return any(_looks_like_labelme(path) for path in folder.with_suffix('.json')[:50])

    def read(self, folder: Folder) -> OwnData:
        contents = _read_files(folder)
        names = {_label(shape) for raw in contents.values() for shape in raw['shapes']}
        listed = classes_file(folder)
        order = sorted(names, key=natural)
        if listed:
            order = [line for line in lines_of(listed) if line and line not in ('__ignore__', '_background_')]
            unknown = sorted(names.difference(order))
            if unknown:
                folder.findings.error(f'labels are not in {listed.name}', unknown[0], '', len(unknown))
        classes = class_names(order, folder.findings, 'the json files')
        data = OwnData(self.title, classes, defaultdict(list), folder.findings)
        objects, used = Objects(folder.findings), set()
        for path, raw in contents.items():
            split = folder.split_of(path)
            sample = _sample(folder, path, raw, split)
            if sample is None:
                continue
            used.add(sample.image)
            for label, shapes in _grouped(raw['shapes']):
                if label in classes:
                    _add(folder, objects, sample, classes.index(label), shapes)
            data.splits[split or folder.split_of(sample.image)].append(sample)
        objects.finish()
        folder.settle_rotation(data)
        rest = [path for path in folder.images.paths if path not in used]
        if rest:
            folder.findings.warn('images have no json file', folder.show(rest[0]), 'not used', len(rest))
        return data


def _looks_like_labelme(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 1 << 26 and says(path.read_bytes(), '"shapes"')


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
        wrong = [shape for shape in raw['shapes'] if not isinstance(shape, dict)]
        if wrong:
            folder.findings.error('shapes are no objects of JSON', f'{folder.show(path)}: {str(wrong[0])[:40]}')
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
        folder.missing(name or path.stem, path, 'the image of {}')
        return None
    sample = folder.sample(image)
    if sample is None:
        return None
    said = (pixels(raw.get('imageWidth')), pixels(raw.get('imageHeight')))
    if None in said:
        folder.findings.error('json files have a size that is no number', folder.show(path))
        return None
    return sample if 0 in said or folder.fits(sample, said, folder.show(path), 'json') else None


def _extract(folder: Folder, path: Path, data: str) -> Path | None:
    """Write the image that a LabelMe file contains; None if it is none, or there is no place to write to."""
    if folder.extracted is None:
        return None
    try:
        content = base64.b64decode(data)
        suffix = (Image.open(io.BytesIO(content)).format or 'png').lower()
    except (binascii.Error, OSError, SyntaxError, TypeError, ValueError):  # whatever Pillow raises for a damaged file
        return None
    file = folder.extracted / path.relative_to(folder.root).with_suffix(f'.{suffix}')
    AtomicLocalBackend().put(content, file)
    return file


def _label(shape: dict) -> str:
    return str(shape.get('label') or '').strip()


def _grouped(shapes: list[dict]) -> list[tuple[str, list[dict]]]:
    """The shapes of each object: those of one label and one group are one object."""
    groups = defaultdict(list)
    for number, shape in enumerate(shapes):
        group = shape.get('group_id')
        groups[(_label(shape), ('group', str(group)) if group is not None else ('alone', number))].append(shape)
    return [(label, group) for (label, _), group in groups.items()]


def _add(folder: Folder, objects: Objects, sample: Sample, label: int, shapes: list[dict]) -> None:
    """Add the object that some shapes are: its mask is made of its polygons and masks, its box is around all."""
    polygons, masks, corners = [], [], []
    for shape in shapes:
        points, kind = shape.get('points') or [], shape.get('shape_type') or 'polygon'
        where = f'{shape.get("label")} in {sample.image.name}'
        try:
            points = [(float(x), float(y)) for x, y in points]
        except (TypeError, ValueError):
            folder.findings.error('shapes have points that are not two numbers', where)
            continue
        if kind in ('polygon', 'rotation'):
            polygons.append([value for point in points for value in point])
        elif kind == 'rectangle' and len(points) >= 2:  # two opposite corners, or with newer tools all four
            corners += points
        elif kind == 'circle' and len(points) == 2:
            polygons.append(_circle(*points))
        elif kind == 'mask' and len(points) == 2:
            mask = _mask(sample, points[0], shape.get('mask'))
            if mask is None:
                folder.findings.error('masks are no pictures that can be read', where)
            else:
                masks.append(mask)
        else:
            folder.findings.warn(f'shapes are of the kind {kind!r}', where, 'not used')
    mask = _joined(sample, masks, polygons) if masks else polygons or None
    box = None
    if corners:
        known = mask if masks else [polygon for polygon in polygons if polygon]
        if known:
            x, y, width, height = box_of(known)
            corners += [(x, y), (x + width, y + height)]
        (left, top), (right, bottom) = (tuple(map(limit, zip(*corners, strict=True))) for limit in (min, max))
        box = (left, top, right - left, bottom - top)
    if box or mask:
        objects.add(sample, label, box, mask)


def _joined(sample: Sample, masks: list[dict], polygons: list[list[float]]) -> dict:
    """One run-length code of several masks and polygons."""
    drawn = [polygon for polygon in polygons if len(polygon) >= 6 and all(map(math.isfinite, polygon))]
    codes = [*masks, *(coco_mask.frPyObjects(drawn, sample.height, sample.width) if drawn else [])]
    code = coco_mask.merge(codes)
    return {**code, 'counts': code['counts'].decode()}


def _circle(centre: tuple[float, float], edge: tuple[float, float], corners: int = 32) -> list[float]:
    radius = math.dist(centre, edge)
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [v for a in angles for v in (centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a))]


def _mask(sample: Sample, corner: tuple[float, float], text: Any) -> dict | None:
    """The run-length code of a mask that LabelMe keeps as a small picture of the box."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            part = np.asarray(image.convert('L')) > 0
    except (binascii.Error, OSError, SyntaxError, TypeError, ValueError):
        return None
    full = np.zeros((sample.height, sample.width), np.uint8)
    x, y = (max(0, int(value)) for value in corner)
    target = full[y : y + part.shape[0], x : x + part.shape[1]]
    target[...] = part[: target.shape[0], : target.shape[1]]
    code = coco_mask.encode(np.asfortranarray(full))
    return {**code, 'counts': code['counts'].decode()}
