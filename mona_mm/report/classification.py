"""What a page shows of classified images: precision and recall, confusion, confidence, and images with their labels."""

from typing import Any

import cv2
import numpy as np

from mona_mm.report.detection import average_precision, thinned
from mona_mm.report.evaluator import Chart, Confusion, Curve, Evaluation, Evaluator, Picture, array, chosen, share
from mona_mm.report.pictures import read_image, titled

_WIDTH = 220  # of a picture, in pixels
_LINES = 10  # classes in a chart, those with the most images


class ClassificationEvaluator(Evaluator):
    """Collect the scores of all classes and the labels of every image, which may have several."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._paths: list[str] = []
        self._drawn: list[bool] = []

    def take(self, sample: Any, position: int, draw: bool) -> None:
        truth = getattr(sample, 'gt_label', None)
        self._scores.append(array(sample.pred_score).astype(np.float32).reshape(-1))
        self._labels.append(np.zeros(0, np.int64) if truth is None else array(truth).astype(np.int64).reshape(-1))
        self._paths.append(sample.metainfo.get('img_path') or '')
        self._drawn.append(draw)

    def summary(self) -> Evaluation:
        result = Evaluation(len(self._scores), 'F1', remarks=self.remarks)
        if not any(map(len, self._labels)):
            result.remarks.append('These images have no labels.')
            return result
        scores = np.stack(self._scores)
        truth = np.zeros(scores.shape, bool)
        for row, labels in zip(truth, self._labels, strict=True):
            row[labels] = True
        single = all(len(labels) == 1 for labels in self._labels)
        if single:
            predicted = np.zeros(scores.shape, bool)
            predicted[np.arange(len(scores)), scores.argmax(1)] = True
        else:
            predicted = scores >= 0.5
            result.remarks.append('An image may have several classes; those of a score of at least 0.5 are predicted.')
        self._by_class(result, scores, truth, predicted)
        if single:
            self._by_confidence(result, scores)
            names = [self.class_name(i) for i in range(scores.shape[1])]
            counts = np.zeros((len(names), len(names)), np.int64)
            np.add.at(counts, (truth.argmax(1), scores.argmax(1)), 1)
            result.confusion = Confusion(counts, names, names, 'Images by their true class (row) and predicted class.')
        self._draw(result, scores, truth, predicted)
        return result

    def _by_class(self, result: Evaluation, scores: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Add the table of the classes and the chart of precision and recall."""
        result.columns = [
            ('class', ''),
            ('F1', 'of precision and recall'),
            ('precision', ''),
            ('recall', ''),
            ('AP', 'average precision of this class against all others, from 101 levels of recall'),
            ('images', ''),
            ('predicted', ''),
        ]
        curves: dict[str, Curve] = {}
        for index in np.argsort(-truth.sum(0), kind='stable'):
            order = np.argsort(-scores[:, index], kind='stable')
            hits = np.cumsum(truth[order, index])
            if hits[-1]:
                precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
                envelope = np.maximum.accumulate(precision[::-1])[::-1]
                curves[self.class_name(index)] = recall, envelope
        for index in range(scores.shape[1]):
            name, own, found = self.class_name(index), truth[:, index], predicted[:, index]
            both = int((own & found).sum())
            f1 = 2 * both / (own.sum() + found.sum()) if own.any() else float('nan')
            result.by_class[name] = float(f1)
            result.rows.append(
                [
                    name,
                    share(f1),
                    share(both / found.sum() if found.any() else float('nan')),
                    share(both / own.sum() if own.any() else float('nan')),
                    share(average_precision(*curves[name]) if name in curves else float('nan')),
                    f'{own.sum():,}',
                    f'{found.sum():,}',
                ]
            )
        result.charts.append(
            Chart(
                'precision and recall',
                'recall',
                {name: thinned(*curve) for name, curve in list(curves.items())[:_LINES]},
                caption=f'The {_LINES} classes with the most images.' if len(curves) > _LINES else '',
            )
        )

    def _by_confidence(self, result: Evaluation, scores: np.ndarray) -> None:
        """Add the chart of how many images are at least so sure, and how many of those are right."""
        top = scores.max(1)
        order = np.argsort(-top, kind='stable')
        labels = np.concatenate(self._labels)
        right = np.cumsum((scores.argmax(1) == labels)[order])
        kept = np.arange(1, len(order) + 1)
        f1 = 2 * right / (kept + len(kept))
        best = float(top[order][np.argmax(f1)])
        lines = {'right, of those kept': right / kept, 'right, of all': right / len(kept), 'F1 of the two': f1}
        caption = (
            f'Of all images, those whose best class has at least this score. The best F1, {f1.max():.3f}, is at '
            f'{best:.2f}.'
        )
        result.charts.append(
            Chart(
                'score against confidence',
                'least score of the best class',
                {name: thinned(top[order], line) for name, line in lines.items()},
                best,
                caption,
            )
        )

    def _draw(self, result: Evaluation, scores: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Draw the images that were right and surest, wrong and surest, and others."""
        right = (truth == predicted).all(1)
        signed = np.where(right, scores.max(1), -scores.max(1))
        able = {i: float(signed[i]) for i, path in enumerate(self._paths) if path and self._drawn[i]}
        for kind, number in chosen(able):
            try:
                image, _ = read_image(self._paths[number], _WIDTH, self.stored)
            except (OSError, ValueError, cv2.error):
                continue  # the file has gone, or is not of the local disk
            labels = np.flatnonzero(predicted[number])
            found = ', '.join(f'{self.class_name(i)} {scores[number, i]:.2f}' for i in labels)
            true = ', '.join(self.class_name(i) for i in np.flatnonzero(truth[number]))
            colour = (60, 140, 20) if right[number] else (40, 40, 200)
            panel = titled(titled(image, f'predicted: {found or "nothing"}', colour), f'truth: {true or "nothing"}')
            result.pictures.append(
                Picture(kind, f'{"right" if right[number] else "wrong"}. {self._paths[number]}', panel)
            )
