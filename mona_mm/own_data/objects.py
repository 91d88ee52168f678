"""Objects of images: boxes and masks, checked and brought into one form."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mona_mm.own_data.findings import Findings
from mona_mm.own_data.samples import Instance, Sample

_SLACK = 2.0  # pixels by which a box may leave its image without a word


class Objects:
    """Checks the objects of a folder one by one, and counts what is wrong with them."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.seen, self.leave = 0, 0
        self.example = ''

    def add(
        self,
        sample: Sample,
        label: int,
        box: Sequence[float] | None,
        mask: Any = None,
        ignored: bool = False,
        area: float | None = None,
    ) -> None:
        """Add an object to a sample, unless nothing is left of it. The box may be None where there is a mask.

        Args:
            sample: the image, whose size is known.
            label: the number of the class.
            box: x, y, width, height.
            mask: polygons as flat lists of coordinates, or COCO's run-length code.
            ignored: whether it is neither right nor wrong to find the object.
            area: the number of its pixels where that is known.
        """
        self.seen += 1
        where = f'{sample.image.name}, {_text(box)}'
        had_mask, mask = mask is not None, self._mask(sample, mask, where)
        if box is None:
            if mask is None:
                if not had_mask:
                    self.findings.error('objects have neither a box nor a mask', sample.image.name)
                return
            box = box_of(mask)
        box = [float(value) for value in box]
        if not all(map(math.isfinite, box)):
            self.findings.error('boxes have values that are no numbers', where)
            return
        x, y, w, h = box
        if w <= 0 or h <= 0:
            self.findings.warn('boxes have no width or height (zero or negative)', where, 'dropped')
            return
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, sample.width), min(y + h, sample.height)
        outside = max(left - x, top - y, x + w - right, y + h - bottom)
        if outside > _SLACK:
            self.leave += 1
            self.example = self.example or f'{where} in {sample.width} x {sample.height}'
        if right <= left or bottom <= top:
            self.findings.warn('boxes lie outside their image', where, 'dropped')
            return
        if right - left < 1 or bottom - top < 1:
            self.findings.warn('boxes are smaller than a pixel', where, 'dropped')
            return
        if outside > _SLACK:
            self.findings.warn('boxes reach beyond their image', where, 'clipped to it')
        sample.instances.append(Instance(label, (left, top, right - left, bottom - top), mask, area, ignored))

    def finish(self) -> None:
        """Judge the objects together: if many leave their images, something is wrong with all."""
        if self.seen and self.leave > 0.3 * self.seen:
            self.findings.error(
                f'of {self.seen} boxes reach beyond their images',
                self.example,
                'are they x1, y1, x2, y2 in place of x, y, width, height, or of images of another size?',
                count=self.leave,
            )

    def _mask(self, sample: Sample, mask: Any, where: str) -> Any:
        if not mask:
            return None
        if isinstance(mask, dict):
            size = mask.get('size')
            if list(size or ()) != [sample.height, sample.width] or 'counts' not in mask:
                self.findings.error(
                    'masks (run-length codes) have another size than their image',
                    f'{sample.image.name}: {size} for height {sample.height}, width {sample.width}',
                )
                return None
            return mask
        if not isinstance(mask, list) or not all(isinstance(polygon, list | tuple) for polygon in mask):
            self.findings.error('masks are neither polygons nor run-length codes', where)
            return None
        polygons = [list(map(float, polygon)) for polygon in mask if _is_polygon(polygon)]
        if len(polygons) < len(mask):
            fix = 'dropped' if polygons else 'the object is kept without mask'
            self.findings.warn(
                'polygons have fewer than three points or no area', where, fix, len(mask) - len(polygons)
            )
        return polygons or None


def _text(box: Sequence[float] | None) -> str:
    return 'no box' if box is None else f'box {[round(float(value), 1) for value in box]}'


def _is_polygon(polygon: Sequence[float]) -> bool:
    if len(polygon) < 6 or len(polygon) % 2 or not all(math.isfinite(float(value)) for value in polygon):
        return False
    return polygon_area(polygon) > 0


def polygon_area(polygon: Sequence[float]) -> float:
    """The area of a polygon, given as x1, y1, x2, y2, ..."""
    points = np.asarray(polygon, float).reshape(-1, 2)
    x, y = (points - points[0]).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def box_of(mask: Any) -> tuple[float, float, float, float]:
    """The box around a mask: x, y, width, height."""
    if isinstance(mask, dict):
        return tuple(float(value) for value in coco_mask.toBbox(_compressed(mask)))
    points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in mask])
    low, high = points.min(axis=0), points.max(axis=0)
    return (*map(float, low), *map(float, high - low))


def area_of(instance: Instance) -> float:
    """The number of pixels of an object: of its mask, else of its box."""
    if instance.area:
        return float(instance.area)
    if isinstance(instance.mask, dict):
        return float(coco_mask.area(_compressed(instance.mask)))
    if instance.mask:
        return sum(map(polygon_area, instance.mask))
    return instance.box[2] * instance.box[3]


def _compressed(mask: dict) -> dict:
    if isinstance(mask['counts'], list):
        return coco_mask.frPyObjects(mask, *mask['size'])
    return mask
