"""The tasks of the published tables, a row each: whatever else here depends on a task reads it from its row.

A task of one's own is a :class:`Task` handed to :func:`register_task`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from re import search
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.type_names import type_name

Entry = list | tuple | None
"""A published number and its grade; None where it was not found."""


@dataclass(frozen=True)
class Metric:
    """One of the scores of a task.

    Args:
        label: its name in the tables.
        mmengine: its names in logs of mmengine, each with the factor that makes percent of it.
        mmcv: the same for logs of mmcv 1.x.
        measures: the name of what it measures in the model index, such as ``'Object Detection'``.
        index_label: its own name in the model index; the label by default.
    """

    label: str
    mmengine: dict[str, int]
    mmcv: dict[str, int] = field(default_factory=dict)
    measures: str = ''
    index_label: str = ''


@dataclass(frozen=True)
class Heading:
    """A table of one task or of several: its name on the command line, its title, and notes below it.

    In the notes ``{...}`` stands for an entry of ``published.json``, as in :meth:`str.format`.
    """

    name: str
    title: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark: which configs are its own, how its runs are recognised, what was published of it.

    Args:
        name: the last part of its configs' names, before that of an ablation.
        config: the name of Mona's config; the other methods' configs have the method's name and ``_`` before it.
        model: the type of the model.
        trains_on: tells from the model's config and that of a training data set whether it is this task.
        metrics: by name; the first decides which checkpoint is best.
        training_data: the name of what it trains on, as the model index has it.
        test_data: the name of what its scores were measured on; the same by default.
        table: where its rows stand; None for a task without published numbers, whose runs are listed apart.
        published: what was published, by method: a key of ``published.json``, or the content itself. Of a method it
            has an :data:`Entry` for the only metric, or a dict of entries by metric or by task.
        parameters: the key of its numbers of trained parameters under ``trainable_params_backbone_other_tasks`` of
            ``published.json``; None where ``trainable_params_backbone`` holds for it.
        configs: the folder with a folder of configs for each method; None for the shipped one.
    """

    name: str
    config: str
    model: str
    trains_on: Callable[[dict[str, Any], dict[str, Any]], bool]
    metrics: dict[str, Metric]
    training_data: str
    test_data: str = ''
    table: Heading | None = None
    published: str | dict[str, Any] | None = None
    parameters: str | None = None
    configs: Path | None = None

    @property
    def size(self) -> str | None:
        """The Swin of its main configs, such as ``'swin_l'``; None for another backbone."""
        found = search(r'swin_[tbl](?=_|$)', self.config)
        return found and found[0]


TASKS: dict[str, Task] = {}
"""Every task, by name."""

MMENGINE_SCORES: dict[str, tuple[str, int]] = {}
"""By name in logs of mmengine, every task's: the name of the score and the factor that makes percent of it."""

MMCV_SCORES: dict[str, tuple[str, int]] = {}
"""The same for logs of mmcv 1.x."""


def register_task(task: Task) -> None:
    """Let the tables, and what reads runs for them, know a task.

    Raises:
        ConfigError: if there is another of that name, or one of its scores means something else to another task.
    """
    if task.name in TASKS:
        raise ConfigError(f'There is a task {task.name} already; the tasks are {", ".join(TASKS)}. Name it otherwise.')
    for score, metric in task.metrics.items():
        for known, given in ((MMENGINE_SCORES, metric.mmengine), (MMCV_SCORES, metric.mmcv)):
            for name, factor in given.items():
                if known.get(name, (score, factor)) != (score, factor):
                    raise ConfigError(
                        f'The score {name} of the task {task.name} is {known[name][0]} times {known[name][1]} to '
                        f'another task, not {score} times {factor}. Give it the same name and factor.'
                    )
    for score, metric in task.metrics.items():
        MMENGINE_SCORES.update({name: (score, factor) for name, factor in metric.mmengine.items()})
        MMCV_SCORES.update({name: (score, factor) for name, factor in metric.mmcv.items()})
    TASKS[task.name] = task


def task_of_config_name(name: str) -> Task | None:
    """The task of a config by its name, in which that of the task is a part; of two such names the longer one's."""
    names = sorted(TASKS, key=len, reverse=True)
    return next((TASKS[task] for task in names if search(rf'(^|_){task}(_|$)', name)), None)


def on_type(part: str) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A ``trains_on`` that looks for ``part`` in the type of the data set, in lower case."""
    return lambda model, dataset: part in type_name(dataset.get('type')).lower()


def _on_voc2007(multilabel: bool) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A ``trains_on`` for VOC's data set, and for lists with one label an image."""

    def trains_on(model: dict[str, Any], dataset: dict[str, Any]) -> bool:
        head = model.get('head') or {}
        if ('multilabel' in type_name(head.get('type')).lower()) != multilabel:
            return False
        lists = f'{dataset.get("data_root")} {dataset.get("ann_file")} {dataset.get("data_prefix")}'.lower()
        by_lists = not multilabel and 'voc2007' in lists and head.get('num_classes') == _VOC_CLASSES
        return by_lists or on_type('voc')(model, dataset)

    return trains_on


_VOC_CLASSES = 20
_RERUN = 'An independent rerun of mona got {independent_mona_rerun[%s]} %s ({independent_mona_rerun[source]}).'
_LOGGED = (
    'The training log of the published %s has {ade20k_log_last_and_best[%s][last]} last and '
    '{ade20k_log_last_and_best[%s][best]} best, at iteration {ade20k_log_last_and_best[%s][best_iter]}.'
)
_BOX_AP = dict(mmengine={'coco/bbox_mAP': 100}, mmcv={'bbox_mAP': 100}, measures='Object Detection')
_TOP1 = {'top1': Metric('top-1', {'accuracy/top1': 1}, {'accuracy_top-1': 1}, 'Image Classification', 'Top 1 Accuracy')}
_CLASSIFICATION = Heading(
    'classification',
    'Classification: Swin-L',
    (
        'The lists of the published voc2007 (one label an image) and flowers102 were never released: compare methods '
        'with each other there, not with the published numbers.',
    ),
)
_CLASSIFIER = dict(model='ImageClassifier', parameters='classification')
_TOP1_TASK = dict(**_CLASSIFIER, metrics=_TOP1, table=_CLASSIFICATION, published='classification_swin_l_top1')

for _task in (
    Task(
        name='coco',
        config='cascade_swin_b_coco',
        model='CascadeRCNN',
        trains_on=on_type('coco'),
        metrics={
            'box_ap': Metric('box AP', **_BOX_AP),
            'mask_ap': Metric('mask AP', {'coco/segm_mAP': 100}, {'segm_mAP': 100}, 'Instance Segmentation'),
        },
        training_data='COCO',
        table=Heading(
            'coco',
            'COCO instance segmentation: Cascade Mask R-CNN, Swin-B',
            (
                'The published 53.4 / 46.0 of mona are of COCO test-dev, as its README says; runs evaluate val2017.',
                _RERUN % ('coco_box_ap', 'box AP'),
            ),
        ),
        published='coco_cascade_mask_rcnn_swin_b',
    ),
    Task(
        name='voc',
        config='retinanet_swin_l_voc',
        model='RetinaNet',
        trains_on=on_type('voc'),
        metrics={
            'ap50': Metric(
                'AP50', {'pascal_voc/AP50': 100, 'pascal_voc/mAP': 100}, {'AP50': 100, 'mAP': 100}, 'Object Detection'
            ),
            'box_ap': Metric('COCO-style AP', **_BOX_AP),
        },
        training_data='PASCAL VOC 2007 and 2012',
        test_data='PASCAL VOC 2007',
        table=Heading(
            'voc',
            'VOC07+12 detection: RetinaNet, Swin-L',
            ('AP50 is the 11-point VOC mAP.', _RERUN % ('voc_ap50', 'AP50')),
        ),
        published='voc_retinanet_swin_l_ap50',
        parameters='voc',
    ),
    Task(
        name='ade20k',
        config='upernet_swin_l_ade20k',
        model='EncoderDecoder',
        trains_on=on_type('ade20k'),
        metrics={'miou': Metric('mIoU', {'mIoU': 1}, {'mIoU': 100}, 'Semantic Segmentation')},
        training_data='ADE20K',
        table=Heading(
            'ade20k',
            'ADE20K semantic segmentation: UperNet, Swin-L',
            tuple(_LOGGED % ((method,) * 4) for method in ('full', 'mona')),
        ),
        published='ade20k_upernet_swin_l_miou',
    ),
    Task(
        name='flowers102',
        config='swin_l_flowers102',
        trains_on=on_type('flower'),
        training_data='Oxford 102 Flowers',
        **_TOP1_TASK,
    ),
    Task(
        name='oxfordpets',
        config='swin_l_oxfordpets',
        trains_on=on_type('pet'),
        training_data='Oxford-IIIT Pets',
        **_TOP1_TASK,
    ),
    Task(
        name='voc2007',
        config='swin_l_voc2007',
        trains_on=_on_voc2007(multilabel=False),
        training_data='PASCAL VOC 2007',
        **_TOP1_TASK,
    ),
    Task(
        name='voc2007_multilabel',
        config='swin_l_voc2007_multilabel',
        trains_on=_on_voc2007(multilabel=True),
        metrics={'multilabel_map': Metric('mAP', {'multi-label/mAP': 1})},
        training_data='PASCAL VOC 2007',
        **_CLASSIFIER,
    ),
):
    register_task(_task)
