"""The scores of each class, from the metrics of the three libraries."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.evaluator import BaseMetric

_NAMES = ('coco/{}_precision', '{}_IoU')
"""The names of a class's score among the values of CocoMetric, as a fraction, and of :func:`measure_classes`."""


def measure_classes(metrics: Sequence[BaseMetric], predictions: Path) -> None:
    """Make metrics compute the scores of each class as well, and detection metrics keep their predictions, in place.

    Args:
        metrics: metrics of an evaluator. Those of mmdet's CocoMetric and mmseg's IoUMetric are changed.
        predictions: the start of the paths of the JSON files of predictions, ``PREDICTIONS.bbox.json`` and, with masks,
            ``PREDICTIONS.segm.json``, in the format of COCO's results.
    """
    for metric in metrics:
        if hasattr(metric, 'classwise') and hasattr(metric, 'outfile_prefix'):
            metric.classwise, metric.outfile_prefix = True, str(predictions)
        elif hasattr(metric, 'intersect_and_union'):
            metric.compute_metrics = partial(_compute_with_ious, metric)


def _compute_with_ious(metric: BaseMetric, results: list) -> dict[str, Any]:
    """Compute the metrics of mmseg's IoUMetric, and the IoU of every class in percent."""
    intersect, union = (sum(areas) for areas in list(zip(*results, strict=True))[:2])
    ious = (100 * intersect / union).tolist()
    classes = metric.dataset_meta['classes']
    return type(metric).compute_metrics(metric, results) | {
        _NAMES[1].format(name): iou for name, iou in zip(classes, ious, strict=True)
    }


def split_classes(scores: Mapping[str, Any], classes: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Split the values of an evaluator into those of the whole test set and those of each class, in percent.

    A class has the AP of its boxes or masks, its IoU or its recall; a class without objects has none.
    """
    whole = {name: value for name, value in scores.items() if not isinstance(value, Sequence)}
    by_class: dict[str, float] = {}
    for index, cls in enumerate(classes):
        for name in _NAMES:
            if name.format(cls) in whole:
                by_class[cls] = whole.pop(name.format(cls)) * (100 if name == _NAMES[0] else 1)
        if 'single-label/recall_classwise' in scores:
            by_class[cls] = scores['single-label/recall_classwise'][index]
    at_one_size_or_iou = tuple(f'coco/{cls}_' for cls in classes)  # other values of CocoMetric
    whole = {name: value for name, value in whole.items() if not name.startswith(at_one_size_or_iou)}
    return whole, {cls: round(value, 2) for cls, value in by_class.items() if value == value}
