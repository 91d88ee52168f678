"""Choose the evaluator for what a model returns."""

from collections.abc import Sequence
from typing import Any

from mona_mm.report.classification import ClassificationEvaluator
from mona_mm.report.detection import DetectionEvaluator
from mona_mm.report.evaluator import Evaluation, Evaluator
from mona_mm.report.segmentation import SegmentationEvaluator

__all__ = ['Evaluation', 'Evaluator', 'evaluator_for']

_KINDS = (
    ('pred_instances', DetectionEvaluator),
    ('pred_sem_seg', SegmentationEvaluator),
    ('pred_score', ClassificationEvaluator),
)
"""The evaluator by what a sample has when the model has predicted."""


def evaluator_for(sample: Any, classes: Sequence[str], dataset: Any, images: int, most: int = 5000) -> Evaluator | None:
    """The evaluator for a sample that a model has returned; None if it holds no boxes, label map or class scores.

    Args:
        sample: the first sample of the evaluation.
        classes: the names of the classes.
        dataset: the data set.
        images: the number of images that will come.
        most: the largest number of images to look at.
    """
    for name, kind in _KINDS:
        if name in sample and (classes or kind is not SegmentationEvaluator):
            return kind(classes, dataset, images, most)
    return None
