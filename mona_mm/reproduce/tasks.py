"""The tasks of the published tables. Everything in this package that depends on a task reads it from its :class:`Task`.

Call :func:`register_task` with a :class:`Task` to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from re import search
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.type_names import type_name

Entry = list | tuple | None
"""A published number and its grade; None if the number was not found."""


@dataclass(frozen=True)
class Metric:
    """One of the scores of a task.

    Args:
        label: the name of the metric in the tables.
        mmengine: the names of the metric in logs of mmengine, each with the factor that converts it to percent.
        mmcv: the same names and factors for logs of mmcv 1.x.
        measures: the name of the measured task in the model index, such as ``'Object Detection'``.
        index_label: the name of the metric in the model index; the label by default.
    """

    label: str
    mmengine: dict[str, int]
    mmcv: dict[str, int] = field(default_factory=dict)
    measures: str = ''
    index_label: str = ''


@dataclass(frozen=True)
class Heading:
    """The heading of a table of one or more tasks: its name on the command line, its title, and the notes below it.

    In the notes, ``{...}`` stands for an entry of ``published.json``, as in :meth:`str.format`.
    """

    name: str
    title: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark, with its configs, the way to recognise its runs, and its published numbers.

    Args:
        name: the name of the task, with which the names of its configs end, except for the suffix of an ablation.
        config: the name of Mona's config; the configs of the other methods have this name with the method's name and
            ``_`` in front.
        model: the type of the model.
        trains_on: a function that gets the config of the model and of a training dataset, and returns whether they
            belong to this task.
        metrics: the metrics by name; the first decides which checkpoint is best.
        training_data: the name of the training dataset in the model index.
        test_data: the name of the dataset on which the scores are measured; by default the training dataset.
        table: the heading of the table that holds the task's rows; None for a task without published numbers, whose
            runs are listed separately.
        published: the published numbers by method, as a key of ``published.json`` or as the content itself. A method
            has an :data:`Entry` for the only metric, or a dict of entries by metric or by task.
        parameters: the key of the numbers of trained parameters under ``trainable_params_backbone_other_tasks`` in
            ``published.json``; None if those in ``trainable_params_backbone`` apply.
        configs: the folder that holds a subfolder of configs for each method; None for the shipped configs.
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
        """The size of the Swin in the main configs, such as ``'swin_l'``; None for another backbone."""
        found = search(r'swin_[tbl](?=_|$)', self.config)
        return found and found[0]


TASKS: dict[str, Task] = {}
"""All tasks by name."""

MMENGINE_SCORES: dict[str, tuple[str, int]] = {}
"""The names of all tasks' scores in logs of mmengine, each with its metric and the factor that makes it percent."""

MMCV_SCORES: dict[str, tuple[str, int]] = {}
"""The same names, metrics and factors for logs of mmcv 1.x."""


def register_task(task: Task) -> None:
    """Add a task to the tables and to the code that reads runs for them.

    Raises:
        ConfigError: if the name is taken, or another task gives one of the scores another meaning.
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
    """The task whose name is part of the name of a config; the longest if there are several, None if there is none."""
    names = sorted(TASKS, key=len, reverse=True)
    return next((TASKS[task] for task in names if search(rf'(^|_){task}(_|$)', name)), None)


def on_type(part: str) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A function for ``trains_on`` that looks for ``part`` in the lower-cased type of the dataset."""
    return lambda model, dataset: part in type_name(dataset.get('type')).lower()


def _on_voc2007(multilabel: bool) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A function for ``trains_on`` that accepts VOC's dataset class, and lists with one label for each image."""

    def trains_on(model: dict[str, Any], dataset: dict[str, Any]) -> bool:
        head = model.get('head') or {}
        if ('multilabel' in type_name(head.get('type')).lower()) != multilabel:
            return False
        lists = f'{dataset.get("data_root")} {dataset.get("ann_file")} {dataset.get("data_prefix")}'.lower()
        by_lists = not multilabel and 'voc2007' in lists and head.get('num_classes') == _VOC_CLASSES
        return by_lists or on_type('voc')(model, dataset)

    return trains_on


def _from_gta(arch: str) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """A function for ``trains_on`` that accepts GTA5 in the layout of Cityscapes, for a DINOv2 of one size."""

    def trains_on(model: dict[str, Any], dataset: dict[str, Any]) -> bool:
        backbone = model.get('backbone') or {}
        sizes = {backbone.get('arch'), (backbone.get('base') or {}).get('arch')}
        return arch in sizes and 'gta' in str(dataset.get('data_root')).lower() and on_type('city')(model, dataset)

    return trains_on


_VOC_CLASSES = 20
_RERUN = 'An independent rerun of mona got {independent_mona_rerun[%s]} %s ({independent_mona_rerun[source]}).'
_LOGGED = (
    'The training log of the published %s has {ade20k_log_last_and_best[%s][last]} last and '
    '{ade20k_log_last_and_best[%s][best]} best, at iteration {ade20k_log_last_and_best[%s][best_iter]}.'
)
_PARAX_COCO = (
    'parax was published with Mask R-CNN (1x), without a config here: box AP {parax_elsewhere[mask_rcnn_swin_b][0]} '
    'and mask AP {parax_elsewhere[mask_rcnn_swin_b][1]} with Swin-B, {parax_elsewhere[mask_rcnn_swin_l][0]} and '
    '{parax_elsewhere[mask_rcnn_swin_l][1]} with Swin-L (grade {parax_elsewhere[grade]}).'
)
_PARAX_ADE20K = (
    'parax was published with Swin-B, too: mIoU {parax_elsewhere[upernet_swin_b]} (grade {parax_elsewhere[grade]}).'
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
_MIOU = {'miou': Metric('mIoU', {'mIoU': 1}, {'mIoU': 100}, 'Semantic Segmentation')}
_CITYSCAPES = Heading(
    'cityscapes',
    'From GTA5 to Cityscapes: Mask2Former, DINOv2',
    ("Trained on images of GTA5 alone, scored on those of Cityscapes. Rein is linked to the decoder's queries.",),
)
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
                _PARAX_COCO,
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
        metrics=_MIOU,
        training_data='ADE20K',
        table=Heading(
            'ade20k',
            'ADE20K semantic segmentation: UperNet, Swin-L',
            (*(_LOGGED % ((method,) * 4) for method in ('full', 'mona')), _PARAX_ADE20K),
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
    *(
        Task(
            name=f'dinov2_{arch[0]}_cityscapes',
            config=f'mask2former_dinov2_{arch[0]}_cityscapes',
            model='EncoderDecoder',
            trains_on=_from_gta(arch),
            metrics=_MIOU,
            training_data='GTA5',
            test_data='Cityscapes',
            table=_CITYSCAPES,
            published='gta_cityscapes_mask2former_dinov2_miou',
        )
        for arch in ('large', 'base', 'small')
    ),
):
    register_task(_task)
