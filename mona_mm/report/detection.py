"""What a page shows of detections: precision and recall, confusion, the best threshold, and boxes beside the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

try:
    from pycocotools import mask as coco_mask
except ImportError:  # it comes with mmdet, which classifiers and segmentors do without
    coco_mask = None

from mona_mm.report.evaluator import Chart, Confusion, Curve, Evaluation, Evaluator, Picture, array, chosen, share
from mona_mm.report.pictures import class_colour, draw_box, draw_outlines, outlines_of, read_image, titled

IOU = 0.5
"""The intersection over union from which a detection counts as a hit."""

_WIDTH = 420  # of a picture, in pixels
_LINES = 10  # classes in a chart, those with the most objects
_OUTLINED = 40  # the detections of an image whose masks may be drawn
_NO_OBJECT = 'no object'
_MISSED = 'missed'
_WRITTEN = 25  # the boxes of an image up to which their classes are written

Outlines = list[np.ndarray]


@dataclass
class _Image:
    """The boxes ``(N, 4)`` of one image, the detections by falling score, and its annotations."""

    path: str
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    truth: np.ndarray
    truth_labels: np.ndarray
    ignored: np.ndarray
    overlaps: np.ndarray
    """The intersection over union of each detection with each annotation."""
    draw: bool
    outlines: list[Outlines] = field(default_factory=list)
    truth_outlines: list[Outlines] = field(default_factory=list)


class DetectionEvaluator(Evaluator):
    """Collect detections and the annotations of their images."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._images: list[_Image] = []
        self._indices: dict[Any, int] | None = None

    def take(self, sample: Any, position: int, draw: bool) -> None:
        found = sample.pred_instances
        scores = array(found.scores).astype(np.float32)
        order = np.argsort(-scores, kind='stable')
        boxes = array(getattr(found.bboxes, 'tensor', found.bboxes)).astype(np.float32).reshape(-1, 4)[order]
        truth, labels, ignored, outlines = self._truth(sample, position, draw)
        image = _Image(
            path=sample.metainfo.get('img_path') or '',
            boxes=boxes,
            scores=scores[order],
            labels=array(found.labels).astype(np.int64)[order],
            truth=truth,
            truth_labels=labels,
            ignored=ignored,
            overlaps=overlaps(boxes, truth, ignored).astype(np.float32),
            draw=draw,
            truth_outlines=outlines,
        )
        if draw and 'masks' in found:
            masks = found.masks
            image.outlines = [outlines_of(array(masks[int(i)]) > 0.5) for i in order[:_OUTLINED]]
        self._images.append(image)

    def _truth(
        self, sample: Any, position: int, draw: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Outlines]]:
        """Boxes, labels, whether they are to be ignored, and outlines of an image's annotations, in the coordinates of
        the image file: those of the data set, or, if it has none of this image, those in the sample."""
        instances = self._instances(sample.metainfo, position)
        if instances is not None:
            boxes = np.array([i['bbox'] for i in instances], np.float32).reshape(-1, 4)
            labels = np.array([i['bbox_label'] for i in instances], np.int64)
            ignored = np.array([bool(i.get('ignore_flag')) for i in instances], bool)
            outlines = [_polygons(i.get('mask')) for i in instances] if draw else []
            return boxes, labels, ignored, outlines
        truth = getattr(sample, 'gt_instances', None)
        if truth is None or 'bboxes' not in truth:
            return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), []
        boxes = array(getattr(truth.bboxes, 'tensor', truth.bboxes)).astype(np.float32).reshape(-1, 4)
        return boxes, array(truth.labels).astype(np.int64), np.zeros(len(boxes), bool), []

    def _instances(self, meta: Mapping[str, Any], position: int) -> Sequence[Mapping[str, Any]] | None:
        """The annotations of an image in the data set, which is usually in the order of the evaluation."""
        if not hasattr(self.dataset, 'get_data_info'):
            return None
        key = meta.get('img_id', meta.get('img_path'))
        if position < len(self.dataset):
            info = self.dataset.get_data_info(position)
            if _key(info) == key:
                return info.get('instances')
        if self._indices is None:
            self._indices = {_key(self.dataset.get_data_info(i)): i for i in range(len(self.dataset))}
        index = self._indices.get(key)
        return None if index is None else self.dataset.get_data_info(index).get('instances')

    def summary(self) -> Evaluation:
        truths = sum(int((~image.ignored).sum()) for image in self._images)
        result = Evaluation(len(self._images), f'AP at IoU {IOU}', remarks=self.remarks)
        if not truths:
            result.remarks.append('There are no annotated objects in these images.')
            return result
        hits = [match(image.overlaps, image.labels, image.truth_labels, image.ignored) for image in self._images]
        scores = np.concatenate([image.scores for image in self._images])
        labels = np.concatenate([image.labels for image in self._images])
        hit = np.concatenate([found >= 0 for found in hits])
        counts = np.concatenate([found != _LEFT_OUT for found in hits])
        scores, labels, hit = scores[counts], labels[counts], hit[counts]
        best = self._by_confidence(result, scores, hit, truths)
        self._by_class(result, scores, labels, hit, best)
        result.confusion = self._confusion(best)
        self._draw(result, best)
        return result

    def _by_confidence(self, result: Evaluation, scores: np.ndarray, hit: np.ndarray, truths: int) -> float:
        """Add the chart of precision, recall and F1 by the least score; return the score with the best F1."""
        order = np.argsort(-scores, kind='stable')
        true = np.cumsum(hit[order])
        number = np.arange(1, len(order) + 1)
        precision, recall = true / number, true / truths
        f1 = 2 * true / (number + truths)
        best = float(scores[order][np.argmax(f1)]) if len(f1) else 0.5
        threshold = scores[order]
        caption = f'All classes together. The best F1, {f1.max(initial=0):.3f}, is at a score of {best:.2f}.'
        lines = {'precision': precision, 'recall': recall, 'F1': f1}
        result.charts.append(
            Chart(
                'score against confidence',
                'least score of a detection',
                {name: thinned(threshold, line) for name, line in lines.items()},
                best,
                caption,
            )
        )
        return best

    def _by_class(
        self, result: Evaluation, scores: np.ndarray, labels: np.ndarray, hit: np.ndarray, best: float
    ) -> None:
        """Add the table of the classes and the chart of precision and recall."""
        result.columns = [
            ('class', ''),
            ('AP50', f'average precision at an IoU of {IOU}, of the boxes, from 101 levels of recall'),
            ('objects', 'annotated objects'),
            (
                f'detections ≥ {best:.2f}',
                'those of a score with which the F1 of all classes together is best',
            ),
            ('precision', 'at this threshold'),
            ('recall', 'at this threshold'),
            ('best threshold', 'the least score with which the F1 of this class is best'),
            ('its F1', ''),
        ]
        truth = np.concatenate([image.truth_labels[~image.ignored] for image in self._images])
        curves: dict[str, Curve] = {}
        objects: dict[str, int] = {}
        for index in range(max(len(self.classes), int(truth.max(initial=-1)) + 1)):
            own = labels == index
            order = np.argsort(-scores[own], kind='stable')
            own_hit, own_scores, total = hit[own][order], scores[own][order], int((truth == index).sum())
            true, number = np.cumsum(own_hit), np.arange(1, len(order) + 1)
            recall, precision = true / max(total, 1), true / number
            name, ap = self.class_name(index), average_precision(recall, precision) if total else float('nan')
            f1 = 2 * true / (number + total)
            sure = own_scores >= best
            top = int(np.argmax(f1)) if len(f1) and total else None
            result.by_class[name] = ap
            result.rows.append(
                [
                    name,
                    share(ap),
                    f'{total:,}',
                    f'{sure.sum():,}',
                    share(own_hit[sure].mean() if sure.any() else float('nan')),
                    share(own_hit[sure].sum() / total if total else float('nan')),
                    '-' if top is None else f'{own_scores[top]:.2f}',
                    '-' if top is None else f'{f1[top]:.3f}',
                ]
            )
            if total:
                objects[name] = total
                curves[name] = thinned(recall, np.maximum.accumulate(precision[::-1])[::-1])
        most = sorted(curves, key=lambda name: -objects[name])
        result.charts.insert(
            0,
            Chart(
                f'precision and recall, IoU {IOU}',
                'recall',
                {name: curves[name] for name in most[:_LINES]},
                caption=f'The {_LINES} classes with the most objects.' if len(most) > _LINES else '',
            ),
        )

    def _confusion(self, best: float) -> Confusion:
        """Match the detections of a score of at least ``best`` with the annotations, whatever their classes."""
        size = max(
            len(self.classes), *(int(image.truth_labels.max(initial=-1)) + 1 for image in self._images),
            *(int(image.labels.max(initial=-1)) + 1 for image in self._images),
        )  # fmt: skip
        counts = np.zeros((size + 1, size + 1), np.int64)
        for image in self._images:
            sure = image.scores >= best
            found = match(image.overlaps[sure], None, None, image.ignored)
            for label, truth in zip(image.labels[sure], found, strict=True):
                if truth != _LEFT_OUT:
                    counts[image.truth_labels[truth] if truth >= 0 else size, label] += 1
            missed = set(np.flatnonzero(~image.ignored).tolist()) - set(found[found >= 0].tolist())
            for truth in missed:
                counts[image.truth_labels[truth], size] += 1
        names = [self.class_name(i) for i in range(size)]
        caption = (
            f'Detections of a score of at least {best:.2f} by the annotation that they overlap with an IoU of at least '
            f'{IOU}, whatever its class.'
        )
        return Confusion(counts, [*names, _NO_OBJECT], [*names, _MISSED], caption)

    def _draw(self, result: Evaluation, best: float) -> None:
        scores, found = {}, {}
        for number, image in enumerate(self._images):
            if image.draw and image.path and (len(image.truth) or len(image.boxes)):
                sure = image.scores >= best
                hits = match(image.overlaps[sure], image.labels[sure], image.truth_labels, image.ignored)
                true, false, all_ = int((hits >= 0).sum()), int((hits == -1).sum()), int((~image.ignored).sum())
                scores[number] = 2 * true / max(2 * true + false + all_ - true, 1)
                found[number] = f'{true} of {all_} objects, {false} false'
        for kind, number in chosen(scores):
            image = self._images[number]
            try:
                picture = self._picture(image, best)
            except (OSError, ValueError, cv2.error):
                continue  # the file has gone, or is not of the local disk
            result.pictures.append(Picture(kind, f'F1 {scores[number]:.2f}: {found[number]}. {image.path}', picture))

    def _picture(self, image: _Image, best: float) -> np.ndarray:
        """The annotations on the left, the detections on the right."""
        blank, scale = read_image(image.path, _WIDTH, self.stored)
        truth, found = blank.copy(), blank.copy()
        for outlines, label in zip(image.truth_outlines, image.truth_labels, strict=False):
            draw_outlines(truth, [scale * outline for outline in outlines], class_colour(label))
        for box, label in zip(image.truth, image.truth_labels, strict=True):
            draw_box(
                truth, scale * box, class_colour(label), self.class_name(label) if len(image.truth) <= _WRITTEN else ''
            )
        sure = np.flatnonzero(image.scores >= best)
        for i in sure:
            label = image.labels[i]
            if i < len(image.outlines):
                draw_outlines(found, [scale * outline for outline in image.outlines[i]], class_colour(label))
            draw_box(
                found, scale * image.boxes[i], class_colour(label), f'{self.class_name(label)} {image.scores[i]:.2f}'
            )
        return np.hstack([titled(truth, 'truth'), titled(found, f'predictions, score >= {best:.2f}')])


_LEFT_OUT = -2  # a detection that neither counts as a hit nor as a miss, since it lies in an ignored region


def overlaps(boxes: np.ndarray, truth: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The intersection over union of boxes ``(N, 4)`` and annotations ``(M, 4)``, as ``(N, M)``.

    For annotations that are ignored (crowds) it is the share of the box that lies within, as in COCO's evaluation.
    """
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    own, theirs = (np.clip(b[:, 2:] - b[:, :2], 0, None).prod(1) for b in (boxes, truth))
    whole = np.where(ignored[None], own[:, None], own[:, None] + theirs[None] - both)
    return np.divide(both, whole, out=np.zeros_like(both), where=whole > 0)


def match(
    overlaps: np.ndarray, labels: np.ndarray | None, truth_labels: np.ndarray | None, ignored: np.ndarray
) -> np.ndarray:
    """Match detections, by falling score, with the free annotation of their class that they overlap most.

    Args:
        overlaps: ``(N, M)``, see :func:`overlaps`.
        labels: the classes of the detections; None to match whatever the class.
        truth_labels: the classes of the annotations.
        ignored: which annotations are to be ignored.

    Returns:
        The index of the annotation of each detection; -1 for none, -2 for a detection in an ignored one.
    """
    found = np.full(len(overlaps), -1)
    free = ~ignored
    for i, row in enumerate(overlaps):
        fits = row >= IOU
        if labels is not None:
            fits &= truth_labels == labels[i]
        candidates = np.flatnonzero(fits & free)
        if len(candidates):
            found[i] = candidates[np.argmax(row[candidates])]
            free[found[i]] = False
        elif (fits & ignored).any():
            found[i] = _LEFT_OUT
    return found


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean of the best precision at no less than each of 101 levels of recall, as in COCO's evaluation."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side='left')
    return float(np.append(envelope, 0.0)[places].mean())


def thinned(x: np.ndarray, y: np.ndarray, most: int = 200) -> Curve:
    """At most ``most`` points of a line, with its ends."""
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).astype(int)) if len(x) else []
    return x[places], y[places]


def _key(info: Mapping[str, Any]) -> Any:
    return info.get('img_id', info.get('img_path'))


def _polygons(mask: Any) -> Outlines:
    """The outlines of an annotation's mask: polygons, or run-length codes."""
    if isinstance(mask, list):
        return [np.asarray(polygon, np.float32).reshape(-1, 2) for polygon in mask]
    if not isinstance(mask, dict) or coco_mask is None:
        return []
    codes = coco_mask.frPyObjects(mask, *mask['size']) if isinstance(mask['counts'], list) else mask
    return outlines_of(coco_mask.decode(codes))
