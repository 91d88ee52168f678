"""What a page shows of label maps: the IoU of each class, confusion, confidence, and maps beside the truth."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mona_mm.report.evaluator import Chart, Confusion, Evaluation, Evaluator, Picture, array, chosen, share
from mona_mm.report.pictures import draw_labels, palette, read_image, titled

_WIDTH = 280  # of a picture, in pixels
_BINS = 100
_STEP = 4  # the confidence of every fourth pixel in each direction is looked at


@dataclass
class _Image:
    path: str
    score: float
    truth: np.ndarray
    predicted: np.ndarray


class SegmentationEvaluator(Evaluator):
    """Count pixels by their true and their predicted class, and keep small maps of some images."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        self._confidence = np.zeros((2, _BINS), np.int64)  # wrong and right pixels by the probability of their class
        self._images: list[_Image] = []
        self._taken = 0

    def take(self, sample: Any, position: int, draw: bool) -> None:
        predicted = array(sample.pred_sem_seg.data).astype(np.int64)[0]
        truth = getattr(sample, 'gt_sem_seg', None)
        self._taken += 1
        if truth is None:
            return
        truth = array(truth.data).astype(np.int64)[0]
        if truth.shape != predicted.shape:
            truth = _resized(truth, predicted.shape[1], predicted.shape[0])
        size = len(self.classes)
        known = (truth >= 0) & (truth < size) & (predicted < size)
        counts = np.bincount(size * truth[known] + predicted[known], minlength=size**2).reshape(size, size)
        self._counts += counts
        self._count_confidence(sample, truth, predicted, known)
        path = sample.metainfo.get('img_path')
        if draw and path:
            width = min(_WIDTH, truth.shape[1])
            height = max(1, round(width / truth.shape[1] * truth.shape[0]))
            maps = [_resized(m, width, height).astype(np.int16) for m in (truth, predicted)]
            self._images.append(
                _Image(path, float(np.nanmean([*_iou(counts), np.nan])) if counts.any() else 0.0, *maps)
            )

    def _count_confidence(self, sample: Any, truth: np.ndarray, predicted: np.ndarray, known: np.ndarray) -> None:
        logits = getattr(sample, 'seg_logits', None)
        if logits is None or tuple(logits.data.shape[-2:]) != truth.shape:
            return
        logits = logits.data[:, ::_STEP, ::_STEP].float()
        if len(logits) == 1:  # one channel for two classes
            probability = logits.sigmoid()
            probability = array(probability.maximum(1 - probability))[0]
        else:
            probability = array(logits.softmax(0).max(0).values)
        if len(logits) > 1 and (array(logits.argmax(0)) != predicted[::_STEP, ::_STEP]).any():
            return  # those of one of several views, where their predictions were merged
        known = known[::_STEP, ::_STEP]
        right = (truth == predicted)[::_STEP, ::_STEP][known].astype(np.int64)
        bins = np.minimum((_BINS * probability[known]).astype(np.int64), _BINS - 1)
        self._confidence += np.bincount(_BINS * right + bins, minlength=2 * _BINS).reshape(2, _BINS)

    def summary(self) -> Evaluation:
        result = Evaluation(self._taken, 'IoU', remarks=self.remarks)
        if not self._counts.any():
            result.remarks.append('There are no annotated pixels in these images.')
            return result
        counts = self._counts
        truth, predicted, both = counts.sum(1), counts.sum(0), counts.diagonal()
        result.columns = [
            ('class', ''),
            ('IoU', 'intersection over union of all pixels'),
            ('precision', 'share of the predicted pixels that are right'),
            ('recall', 'share of the true pixels that are found'),
            ('true pixels', ''),
            ('predicted pixels', ''),
        ]
        for index, iou in enumerate(_iou(counts)):
            name = self.class_name(index)
            result.by_class[name] = float(iou)
            result.rows.append(
                [
                    name,
                    share(iou),
                    share(both[index] / predicted[index] if predicted[index] else float('nan')),
                    share(both[index] / truth[index] if truth[index] else float('nan')),
                    f'{truth[index] / truth.sum():.2%}',
                    f'{predicted[index] / truth.sum():.2%}',
                ]
            )
        names = [self.class_name(i) for i in range(len(self.classes))]
        result.confusion = Confusion(counts, names, names, 'Pixels by their true class (row) and their predicted one.')
        self._by_confidence(result)
        self._draw(result)
        return result

    def _by_confidence(self, result: Evaluation) -> None:
        """Add the chart of how many pixels are at least so sure, and how many of those are right."""
        wrong, right = (np.cumsum(line[::-1])[::-1] for line in self._confidence)
        kept = wrong + right
        if not kept[0]:
            return
        threshold = np.arange(_BINS) / _BINS
        some = kept > 0
        f1 = 2 * right / (kept + kept[0])
        best = float(threshold[np.argmax(f1)])
        lines = {
            'right, of those kept': (threshold[some], (right[some] / kept[some])),
            'right, of all': (threshold, right / kept[0]),
            'F1 of the two': (threshold, f1),
        }
        caption = (
            f'Of all pixels, those whose class has at least this probability. The best F1, {f1.max():.3f}, is at '
            f'{best:.2f}.'
        )
        result.charts.append(Chart('score against confidence', 'least probability of a pixel', lines, best, caption))

    def _draw(self, result: Evaluation) -> None:
        colours = palette(len(self.classes))
        for kind, number in chosen({i: image.score for i, image in enumerate(self._images)}):
            image = self._images[number]
            try:
                blank, _ = read_image(image.path, _WIDTH, self.stored)
            except (OSError, ValueError, cv2.error):
                continue  # the file has gone, or is not of the local disk
            panels = [titled(blank, 'image'), titled(draw_labels(blank, image.truth, colours), 'truth')]
            panels.append(titled(draw_labels(blank, image.predicted, colours), 'prediction'))
            result.pictures.append(Picture(kind, f'mIoU {image.score:.3f}. {image.path}', np.hstack(panels)))
        if result.pictures:
            seen = np.flatnonzero(self._counts.sum(1) + self._counts.sum(0))
            result.remarks.append(
                'Colours: '
                + ', '.join(f'{self.class_name(i)} #{"".join(f"{c:02x}" for c in colours[i][::-1])}' for i in seen[:30])
            )


def _iou(counts: np.ndarray) -> np.ndarray:
    """The intersection over union of each class; NaN for those that neither occur nor were predicted."""
    both = counts.diagonal().astype(float)
    whole = counts.sum(0) + counts.sum(1) - both
    return np.divide(both, whole, out=np.full(len(both), np.nan), where=whole > 0)


def _resized(labels: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(labels.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
