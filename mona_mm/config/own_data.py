"""Set a config to the data in a folder: its classes, its splits, and all that depends on them."""

import dataclasses
import hashlib
import json
import os
import os.path as osp
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.config.nodes import dicts_of, set_num_classes
from mona_mm.errors import ConfigError
from mona_mm.own_data import TASKS, OwnData, as_maps, complete_splits, palette, read_folder, write_data
from mona_mm.own_data.images import walk
from mona_mm.reliability.lock_work_dir import refuse_if_used
from mona_mm.type_names import enter_scope, look_up, type_name

_TASK_OF_LIBRARY = dict(mmdet='boxes', mmseg='maps', mmpretrain='labels')
_DATASET = dict(boxes='mmdet.CocoDataset', maps='mmseg.BaseSegDataset', labels='mmpretrain.CustomDataset')
_SCORE = dict(boxes='coco/bbox_mAP', maps='mIoU', labels='accuracy/top1')
_DEFAULTS = dict(layout=None, seed=0, val=0.2, test=0.0, skip=False)
_SPLITS = dict(train=('train',), sensitivity=('train',), val=('val', 'test'), test=('test', 'val'))
"""The splits of a folder that a split of a config takes its images from: the first that is there."""


def use_data(cfg: Config, data: dict[str, Any], work_dir: str, classes: Any = None, write: bool = True) -> None:
    """Set a config to the data in a folder, in place.

    The layout is recognised, what the folder lacks of training, validation and test split is drawn by a seed, and the
    annotations are written to ``<work_dir>/data`` in the form that the library's own data set reads. Images stay where
    they are. The config then has these data sets, their classes in every place, evaluators that fit, and the same
    model, pipelines and schedule. What was found is in ``cfg.own_data``.

    Args:
        cfg: the config, of a detector, a segmentor or a classifier.
        data: ``folder`` and the options ``layout``, ``seed``, ``val``, ``test`` and ``skip``, see
            :func:`mona_mm.own_data.read_folder` and :func:`mona_mm.own_data.complete_splits`.
        work_dir: the work dir of the run.
        classes: the names of the classes to use, some or all of those found, in any order; by default all.
        write: whether the annotations are written.

    Raises:
        UserError: if the data cannot be read, or do not fit the config, or a run that uses the work dir has others.
    """
    options = _options(data)
    task = _task(cfg)
    place = Path(work_dir, 'data').resolve()
    names = (
        None
        if classes is None
        else [str(name) for name in (classes if isinstance(classes, list | tuple) else [classes])]
    )
    request = dict(options, folder=osp.abspath(osp.expanduser(str(options['folder']))), task=task, classes=names)
    request['masks'] = task == 'boxes' and _uses_masks(cfg)
    found = _read(request, place, write)
    _set_datasets(cfg, task, found)
    _set_model(cfg, task, found)
    _set_evaluators(cfg, task, found)
    for key in ('data_root', 'task', 'tasks', 'dataset_type', 'train_pipeline', 'test_pipeline', 'classes', 'metainfo'):
        cfg._cfg_dict.pop(key, None)  # they would say what no longer holds
    kept = ('folder', 'layout', 'task', 'images', 'notes', 'warnings', 'seed', 'val', 'test')
    cfg.own_data = {key: found[key] for key in kept}


def _options(data: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in data if key not in ('folder', *_DEFAULTS)]
    if unknown:
        raise ConfigError(f'--data-options {unknown[0]}: the options are {", ".join(_DEFAULTS)}.')
    options = {**_DEFAULTS, **data}
    for key in ('val', 'test'):
        if not (isinstance(options[key], int | float) and 0 <= options[key] < 1):
            raise ConfigError(f'--data-options {key}={options[key]}: it is a share of the images, from 0 to below 1.')
    for key, kind, accepted in (('seed', int, 'a whole number'), ('skip', bool, 'True or False')):
        if type(options[key]) is not kind:
            raise ConfigError(f'--data-options {key}={options[key]}: it is {accepted}.')
    if options['val'] + options['test'] >= 1:
        raise ConfigError('--data-options: val and test together leave no image to train on.')
    return options


def _task(cfg: Config) -> str:
    enter_scope(cfg)
    with MODELS.switch_scope_and_registry(None) as registry:
        model = look_up(registry, dict.get(cfg.model, 'type'))
    libraries = [cls.__module__.partition('.')[0] for cls in getattr(model, '__mro__', ())]
    task = next((_TASK_OF_LIBRARY[library] for library in libraries if library in _TASK_OF_LIBRARY), None)
    task = task or _TASK_OF_LIBRARY.get(cfg.get('default_scope'))
    if task is None:
        known = ', '.join(
            f'{kind} of {library}' for library, kind in zip(_TASK_OF_LIBRARY, TASKS.values(), strict=True)
        )
        raise ConfigError(
            f'--data: {type_name(dict.get(cfg.model, "type"))} is none of {known}, so set its data in a config.'
        )
    for part in dicts_of(cfg.model):
        if type_name(dict.get(part, 'type')) in ('MultiLabelClsHead', 'MultiLabelLinearClsHead', 'CSRAClsHead'):
            raise ConfigError('--data: this config gives an image several labels, a folder per class gives it one.')
        if task == 'boxes' and part.get('num_stuff_classes'):
            raise ConfigError('--data: this config is panoptic, and no layout here has things and stuff.')
    return task


# Reading, once for a folder ----------------------------------------------------------------------------------------


def _fingerprint(folder: str) -> str:
    digest = hashlib.sha256()
    for path in walk(Path(folder)):
        stat = path.stat() if path.exists() else path.lstat()  # a link to nothing is named when it is read
        digest.update(os.fsencode(path) + f'\0{stat.st_size}\0{stat.st_mtime_ns}\n'.encode())
    return digest.hexdigest()


def _read(request: dict[str, Any], place: Path, write: bool) -> dict[str, Any]:
    """Read and write the data, or take what an earlier run with the same work dir has written of the same files."""
    file = place / 'record.json'
    key = dict(request, files=_fingerprint(request['folder']), version=3)
    if file.is_file():
        record = json.loads(file.read_text(encoding='utf-8'))
        if record['key'] == key and all(osp.isfile(d['ann_file']) for s in record['datasets'].values() for d in s):
            return {**record['found'], 'datasets': record['datasets']}
    if write:
        refuse_if_used(place.parent)  # whose label maps another run is reading
        data = _prepared(request, place / 'images')
    else:
        with tempfile.TemporaryDirectory() as folder:  # for images inside annotation files, whose size is needed
            data = _prepared(request, Path(folder))
    found = dict(request, layout=data.layout, classes=list(data.classes), palette=[list(c) for c in palette(data)])
    found |= dict(has_masks=data.has_masks, keep_orientation=data.keep_orientation, notes=data.notes)
    found['images'] = {split: len(samples) for split, samples in data.splits.items()}
    found['warnings'] = [finding.line() for finding in data.findings.warnings.values()]
    empty = {split: [{}] for split in data.splits}
    datasets = write_data(data, request['task'], place) if write else empty
    if write:
        AtomicLocalBackend().put_text(json.dumps(dict(key=key, found=found, datasets=datasets), indent=1), file)
    return {**found, 'datasets': datasets}


def _prepared(request: dict[str, Any], extracted: Path) -> OwnData:
    """Read the data that a request asks for, with their classes chosen and their splits completed.

    Raises:
        UserError: if they have faults that forbid training.
    """
    arguments = {name: request[name] for name in ('task', 'layout', 'skip')}
    data = read_folder(request['folder'], extracted=extracted, **arguments)
    drawn = request['task'] == 'maps' and all(s.label_map is None for each in data.splits.values() for s in each)
    if request['classes'] is not None:
        added = ('background',) if drawn and 'background' not in data.classes else ()
        _select(data, [name for name in request['classes'] if name not in added])
    if drawn:
        as_maps(data)
    if request['masks'] and data.has_masks:
        _ignore_without_mask(data)
    complete_splits(data, request['seed'], request['val'], request['test'])
    data.findings.raise_errors()
    return data


def _select(data: OwnData, classes: list[str]) -> None:
    """Keep some classes, in a given order, in place."""
    unknown = [name for name in classes if name not in data.classes]
    if unknown:
        raise ConfigError(
            f'classes: the data have no {", ".join(unknown)}. Their classes are {", ".join(data.classes)}.'
        )
    samples = [sample for samples in data.splits.values() for sample in samples]
    if any(sample.label_map or sample.label is not None for sample in samples):
        if sorted(classes) != sorted(data.classes):
            raise ConfigError('classes: only objects can be left out; name all classes of label maps and of folders.')
        order = {i: classes.index(name) for i, name in enumerate(data.classes)}
        data.values = {v: order.get(c, c) for v, c in (data.values or {i: i for i in order}).items()}
        data.palette = data.palette and [data.palette[data.classes.index(name)] for name in classes]
    order = {i: classes.index(name) for i, name in enumerate(data.classes) if name in classes}
    dropped = 0
    for sample in samples:
        kept = [instance for instance in sample.instances if instance.label in order]
        dropped += len(sample.instances) - len(kept)
        sample.instances = [dataclasses.replace(instance, label=order[instance.label]) for instance in kept]
        sample.label = order.get(sample.label)
    if dropped:
        data.findings.warn('objects are of classes that are not chosen', '', 'dropped', dropped)
    data.classes = tuple(classes)


def _ignore_without_mask(data: OwnData) -> None:
    """Make objects without a mask, among others that have one, neither right nor wrong; in place."""
    for sample in (sample for samples in data.splits.values() for sample in samples):
        for instance in sample.instances:
            if instance.mask is None:
                x, y, w, h = instance.box
                instance.mask, instance.ignored = [[x, y, x + w, y, x + w, y + h, x, y + h]], True
                text = 'objects have no mask, as others do'
                data.findings.warn(text, sample.image.name, 'their boxes are ignored: neither object nor background')


# Setting the config ------------------------------------------------------------------------------------------------


def _set_datasets(cfg: Config, task: str, found: dict[str, Any]) -> None:
    for split, sources in _SPLITS.items():
        loader = cfg.get(f'{split}_dataloader')
        source = next((source for source in sources if found['datasets'].get(source)), None)
        if not loader or not loader.get('dataset'):
            continue
        if source is None:
            raise ConfigError(
                f'--data {found["folder"]}: there is no image for the {split} data; set --data-options val=0.2.'
            )
        loader['dataset'] = _with_data(loader['dataset'], task, found, found['datasets'][source])
    if 'test' not in found['datasets']:
        found['notes'] = [
            *found['notes'],
            'the folder has no test split: tools/test.py evaluates on the validation images',
        ]


def _with_data(node: dict, task: str, found: dict[str, Any], files: list[dict[str, Any]]) -> dict:
    """A data set as it stands in a config, within the same wrappers, with other data; several become one."""
    if node.get('datasets'):
        return _with_data(node['datasets'][0], task, found, files)
    if node.get('dataset'):
        node['dataset'] = _with_data(node['dataset'], task, found, files)
        return node
    pipeline = _pipeline(node.get('pipeline') or [], task, found)
    metainfo = dict(classes=tuple(found['classes']), palette=[tuple(colour) for colour in found['palette']])
    made = []
    for file in files:
        own = dict(type=_DATASET[task], metainfo=metainfo, pipeline=pipeline, **file)
        if task == 'boxes':
            empty = (node.get('filter_cfg') or {}).get('filter_empty_gt', True)
            own |= dict(data_prefix=dict(img=''), filter_cfg=dict(filter_empty_gt=empty, min_size=1))
        for key in ('test_mode', 'indices', 'serialize_data', 'max_refetch'):
            if key in node:
                own[key] = node[key]
        made.append(ConfigDict(own))
    return made[0] if len(made) == 1 else ConfigDict(type='ConcatDataset', datasets=made)


def _pipeline(pipeline: list, task: str, found: dict[str, Any]) -> list:
    for step in dicts_of(pipeline):
        name = type_name(dict.get(step, 'type'))
        if name == 'LoadImageFromFile' and found['keep_orientation']:
            step['color_type'] = 'color_ignore_orientation'
        if name == 'LoadAnnotations' and task == 'maps':
            step['reduce_zero_label'] = False
        if name == 'LoadAnnotations' and task == 'boxes' and not found['has_masks'] and step.get('with_mask'):
            step['with_mask'] = False
        if name == 'LoadPanopticAnnotations':
            raise ConfigError('--data: this config is panoptic, and no layout here has things and stuff.')
    return pipeline


def _uses_masks(cfg: Config) -> bool:
    return any(
        dict.get(part, 'mask_head') or type_name(dict.get(part, 'type')) == 'LoadAnnotations' and part.get('with_mask')
        for part in dicts_of([cfg.model, cfg.get('train_dataloader') or {}])
    )


def _set_model(cfg: Config, task: str, found: dict[str, Any]) -> None:
    count = len(found['classes'])
    set_num_classes(cfg.model, count)
    if task == 'labels':
        for part in dicts_of(cfg.model):
            if 'topk' in part:
                part['topk'] = _top(part['topk'], count)
    if task == 'boxes' and found['masks'] and not found['has_masks']:
        _leave_out_masks(cfg)
        found['notes'] = [*found['notes'], 'the data have boxes without masks: the mask head of the model is left out']


def _top(topk: Any, count: int) -> tuple[int, ...]:
    ranks = topk if isinstance(topk, list | tuple) else (topk,)
    return tuple(rank for rank in ranks if rank < count or rank == 1) or (1,)


def _leave_out_masks(cfg: Config) -> None:
    roi_head = cfg.model.get('roi_head')
    if not isinstance(roi_head, dict) or not roi_head.get('bbox_head'):
        name = type_name(dict.get(cfg.model, 'type'))
        raise ConfigError(
            f'--data: the data have boxes without masks, and {name} finds objects by masks. Take a model of boxes.'
        )
    for key in ('mask_head', 'mask_roi_extractor', 'mask_iou_head', 'semantic_head', 'semantic_roi_extractor'):
        if roi_head.get(key) is not None:
            roi_head[key] = None


def _set_evaluators(cfg: Config, task: str, found: dict[str, Any]) -> None:
    for split in ('val', 'test'):
        if not cfg.get(f'{split}_evaluator'):
            continue
        given = cfg[f'{split}_evaluator']
        metrics = given if isinstance(given, list | tuple) else [given]
        made = dict(boxes=_box_metrics, maps=_map_metrics, labels=_label_metrics)[task](metrics, found, split)
        cfg[f'{split}_evaluator'] = made[0] if len(made) == 1 else made
    scores = ('coco/bbox_mAP', 'coco/segm_mAP') if found['has_masks'] else ('coco/bbox_mAP',)

    def with_score(key: str, part: dict) -> None:
        score = dict.get(part, key)
        if isinstance(score, str) and score != 'auto' and not (task == 'boxes' and score in scores):
            part[key] = _SCORE[task]

    with_score('save_best', (cfg.get('default_hooks') or {}).get('checkpoint') or {})
    for hook in dicts_of(cfg.get('custom_hooks') or []):
        if type_name(dict.get(hook, 'type')) == 'EarlyStoppingHook':
            with_score('monitor', hook)


def _box_metrics(metrics: list, found: dict[str, Any], split: str) -> list[dict]:
    old = next((dict(metric) for metric in metrics if type_name(metric.get('type')) == 'CocoMetric'), {})
    kept = {key: old[key] for key in ('classwise', 'proposal_nums', 'iou_thrs', 'metric_items') if key in old}
    wanted = ['bbox', 'segm'] if found['masks'] and found['has_masks'] else 'bbox'
    source = next(source for source in _SPLITS[split] if found['datasets'].get(source))
    ann_file = found['datasets'][source][0].get('ann_file')
    return [dict(type='mmdet.CocoMetric', ann_file=ann_file, metric=wanted, format_only=False, **kept)]


def _map_metrics(metrics: list, found: dict[str, Any], split: str) -> list[dict]:
    kept = [metric for metric in metrics if type_name(metric.get('type')) == 'IoUMetric']
    return kept or [dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])]


def _label_metrics(metrics: list, found: dict[str, Any], split: str) -> list[dict]:
    count = len(found['classes'])
    for metric in metrics:
        if 'topk' in metric:
            metric['topk'] = _top(metric['topk'], count)
        if 'num_classes' in metric:
            metric['num_classes'] = count
    return metrics
