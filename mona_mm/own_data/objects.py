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
        self._sample: Sample | None = None
        self._known: dict[tuple, Instance] = {}

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
            mask: polygons as lists of coordinates, flat or in pairs, or COCO's run-length code.
            ignored: whether it is neither right nor wrong to find the object.
            area: the number of its pixels where that is known.
        """
        self.seen += 1
        where = f'{sample.image.name}, {_text(box)}'
        had_mask, mask = mask is not None, self._mask(sample, mask, box, where)
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
        instance = Instance(label, (left, top, right - left, bottom - top), mask, _positive(area), ignored)
        if self._is_known(sample, instance):
            self.findings.warn('objects occur twice in an image, with the same class and box', where, 'kept once')
        else:
            sample.instances.append(instance)

    def _is_known(self, sample: Sample, instance: Instance) -> bool:
        if sample is not self._sample:
            self._sample, self._known = sample, {}
        key = (instance.label, *(round(value, 3) for value in instance.box))
        return self._known.setdefault(key, instance) is not instance and self._known[key].mask == instance.mask

    def finish(self) -> None:
        """Judge the objects together: if many leave their images, something is wrong with all."""
        if self.seen and self.leave > 0.3 * self.seen:
            self.findings.error(
                f'of {self.seen} boxes reach beyond their images',
                self.example,
                'are they x1, y1, x2, y2 in place of x, y, width, height, or of images of another size?',
                count=self.leave,
            )

    def _mask(self, sample: Sample, mask: Any, box: Sequence[float] | None, where: str) -> Any:
        if not mask:
            return None
        if isinstance(mask, dict):
            return self._run_lengths(sample, mask)
        polygons = _flat(mask)
        if polygons is None:
            self.findings.error('masks are neither polygons nor run-length codes', where)
            return None
        good = [polygon for polygon in polygons if _is_polygon(polygon)]
        if len(good) < len(polygons):
            fix = 'dropped' if good or box is None else 'the object is kept without mask'
            text = 'polygons have fewer than three points or no area'
            self.findings.warn(text, where, fix, len(polygons) - len(good))
        return good or None

    def _run_lengths(self, sample: Sample, mask: dict) -> dict | None:
        size = mask.get('size')
        if not isinstance(size, list) or size != [sample.height, sample.width] or 'counts' not in mask:
            self.findings.error(
                'masks (run-length codes) have another size than their image',
                f'{sample.image.name}: {size} for height {sample.height}, width {sample.width}',
            )
            return None
        runs = _runs(mask['counts'])
        if runs is None or (runs < 0).any() or runs.sum() != sample.height * sample.width:
            text = 'masks are no run-length codes of as many pixels as their image has'
            self.findings.error(text, f'{sample.image.name}: {str(mask["counts"])[:40]}')
            return None
        return mask


def _flat(mask: Any) -> list[list[float]] | None:
    """Polygons as flat lists of numbers; None if they are none.

    COCO has flat lists in a list; a single polygon without that list, and points as pairs, are read, too.
    """
    polygons = [mask] if isinstance(mask, list) and all(isinstance(value, int | float) for value in mask) else mask
    try:
        arrays = [np.asarray(polygon, float) for polygon in polygons]
    except (TypeError, ValueError):
        return None
    if not all(array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 2) for array in arrays):
        return None
    return [array.ravel().tolist() for array in arrays]


def _runs(counts: Any) -> np.ndarray | None:
    """The lengths of the runs of a code, which COCO also has as text; None if it is none.

    In the text, a number has five bits a character, the lowest first, with a sixth bit in all characters but its last,
    and from the fourth number on it is the difference to the last but one (pycocotools, ``rleFrString``).
    """
    if isinstance(counts, list):
        whole = all(isinstance(value, int) for value in counts)
        return np.array(counts, np.int64) if counts and whole and max(map(abs, counts)) < 1 << 31 else None
    if not isinstance(counts, str) or not counts.isascii() or not counts:
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _positive(area: Any) -> float | None:
    """An area that is a number above zero; otherwise None, and it is computed."""
    return area if isinstance(area, int | float) and math.isfinite(area) and area > 0 else None


def _text(box: Sequence[float] | None) -> str:
    return 'no box' if box is None else f'box {[round(float(value), 1) for value in box]}'


def _is_polygon(polygon: Sequence[float]) -> bool:
    if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
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
