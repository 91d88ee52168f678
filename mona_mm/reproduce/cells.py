"""Recognise the cell of the published tables to which a run belongs, and compare its config with the shipped one."""

import inspect
import math
import os.path as osp
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mona_mm.catalogue.methods import CATALOGUE, method_name
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.frozen.rules import METHOD_RULES, published_name
from mona_mm.registry import METHODS as METHOD_CLASSES
from mona_mm.reproduce.logs import Log, planned
from mona_mm.reproduce.tasks import TASKS, Task, task_of_config_name
from mona_mm.type_names import look_up, type_name

METHODS = tuple(name for name, entry in CATALOGUE.items() if entry.published)
"""The methods that the published tables have."""

SIZES = {  # embed_dims, depths, num_heads
    'swin_t': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    'swin_b': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    'swin_l': (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_ARCHS = dict(tiny='swin_t', t='swin_t', base='swin_b', b='swin_b', large='swin_l', l='swin_l')


def config_name(method: str, task: str) -> str:
    """The basename of the shipped config of a cell, without ``.py``."""
    return TASKS[task].config if method == 'mona' else f'{method}_{TASKS[task].config}'


def configs_folder() -> Path:
    """The folder of the shipped configs: inside the package in a wheel, beside the package in a checkout.

    Raises:
        MissingFileError: if the configs are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / '.mim' / 'configs', package.parent / 'configs'):
        if (folder / 'mona').is_dir():
            return folder
    raise MissingFileError(f'The configs of mona_mm are neither in {package / ".mim"} nor in {package.parent}.')


def task_configs(task: Task) -> Path:
    """The folder that holds a subfolder with the task's configs for each method."""
    return task.configs or configs_folder()


def parse_cell(text: str) -> tuple[str, str]:
    """Parse the argument of ``--as METHOD/TASK`` into a method and a task.

    Raises:
        ConfigError: if there is no such cell; the error lists the methods and tasks.
    """
    method, _, task = text.partition('/')
    if method not in METHODS or task not in TASKS:
        raise ConfigError(f'--as {text}: METHOD/TASK is one of {", ".join(METHODS)} / one of {", ".join(TASKS)}.')
    return method, task


# Recognising ---------------------------------------------------------------------------------------------------------


def is_mmengine(config: dict[str, Any]) -> bool:
    """Whether a config is for mmengine, and not for mmcv 1.x."""
    return 'train_dataloader' in config or 'optim_wrapper' in config


def task_of(config: dict[str, Any]) -> str | None:
    """The task of a config, recognised by its model and training data; None if no table has the task.

    If several tasks match, the one that was registered last is returned.
    """
    model = model_config(config)
    candidates = [task for task in reversed(TASKS.values()) if task.model == _type(model)]
    for dataset in training_sets(config) if candidates else ():
        for task in candidates:
            if task.trains_on(model, dataset):
                return task.name
    return None


def method_of(config: dict[str, Any], log: Log, published: dict[str, int]) -> str | None:
    """The method of a run; None if neither its config nor its log shows it.

    Args:
        config: the config of the run.
        log: the log of the run. Its module names and number of parameters identify the method if the class names of
            an old config do not.
        published: the number of parameters of this backbone that each method trains.
    """
    backbone = _dict(model_config(config).get('backbone'))
    name = _type(backbone)
    if name == 'PeftBackbone':
        if backbone.get('peft'):
            peft = backbone['peft']
            if isinstance(peft, list | tuple):  # several together are none of the published methods
                return None
            method = method_name(_type(peft))
            if method == 'spt':
                method = f'spt_{_type(_dict(peft).get("structured") or {}).lower()}'
            rule = CATALOGUE[method].rule if method in CATALOGUE else ''
            return method if backbone.get('trainable') in (None, 'none', rule or None) else None
        rules = backbone.get('trainable') or 'all'
        rules = (rules,) if isinstance(rules, str) else tuple(rules)
        name = published_name(rules[0])
        return name if len(rules) == 1 and name in METHOD_RULES else None
    if is_mmengine(config):
        hooks = [_dict(hook) for hook in config.get('custom_hooks') or []]
        freezes = any(_type(hook) == 'ParamFreezeHook' and hook.get('trainable') for hook in hooks)
        return 'full' if name == 'SwinTransformer' and not freezes else None
    evidence = set()
    match = re.fullmatch(r'SwinTransformer_([a-z_]+?(?:_?1)?)(?:_\d+)?', name)
    if match:
        evidence.add({'partial1': 'partial_1', 'ln': 'norm_tuning'}.get(match[1], match[1]))
    evidence &= set(METHODS)
    if not evidence and log.trainable is not None:
        evidence = {method for method, number in published.items() if number == log.trainable}
    if not evidence:
        modules = log.modules
        if 'adapter_conv' in modules:
            evidence = {'mona'}
        elif 'lora_A' in modules:
            evidence = {'lora'}
        elif modules:
            evidence = {'adapter' if 'my_module_2' in modules else 'adaptformer'}
    if not evidence and name == 'SwinTransformer':
        evidence = {'full'}
    return evidence.pop() if len(evidence) == 1 else None


def size_of(config: dict[str, Any]) -> str | None:
    """The size of a config's Swin: ``'swin_t'``, ``'swin_b'`` or ``'swin_l'``; None for any other backbone."""
    size = _swin(_base(config))
    return next((name for name, widths in SIZES.items() if widths == size), None)


def training_sets(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The training datasets inside their wrappers, for a config of mmengine or of mmcv 1.x."""
    pending = [_dict(config.get('train_dataloader')).get('dataset'), _dict(config.get('data')).get('train')]
    while pending:
        dataset = pending.pop(0)
        if isinstance(dataset, list | tuple):
            pending += dataset
        elif isinstance(dataset, dict):
            inner = dataset.get('dataset') or dataset.get('datasets')
            if inner:
                pending.append(inner)
            else:
                yield dataset


def shipped_config(config: dict[str, Any], log: Log, method: str, task: str) -> tuple[str, dict[str, Any] | None]:
    """The name and the content of the shipped config that is closest to a run of a method on a task.

    Ablations have files of their own. The content is None if no file exists, as for a method that a user has added.
    """
    files = sorted((task_configs(TASKS[task]) / method).glob('*.py'), key=lambda path: len(path.stem))
    # The configs named fair_* do not produce the published number. Their runs are compared with the main config.
    main = [file for file in files if not file.stem.startswith('fair_')]
    found = [
        (file.stem, load_config(str(file)).to_dict()) for file in main if task_of_config_name(file.stem) is TASKS[task]
    ]
    if not found:
        return config_name(method, task), None
    if not config:
        return found[0]

    def distance(shipped: dict[str, Any]) -> int:
        actual, expected = _method_and_size(config), _method_and_size(shipped)
        return sum(not _same(actual.get(key), value) for key, value in expected.items() if key in actual)

    return min(found, key=lambda item: distance(item[1]))  # the first of equals, which is the main config


# Comparing -----------------------------------------------------------------------------------------------------------


def differences(config: dict[str, Any], shipped: dict[str, Any], gpus: int | None) -> list[str]:
    """The settings in which a run's config differs from the shipped config of its cell, each with both values.

    Paths, workers, logging, checkpoints and settings that only save memory are not compared.
    """
    actual, expected = _settings(config, gpus), _settings(shipped, None)
    different = [
        f'{name}: {_show(value)} (published setting: {_show(expected.get(name))})'
        for name, value in actual.items()
        if not _same(value, expected.get(name))
    ]
    if not is_mmengine(config):
        return different
    actual, expected = dict(_other_settings(config)), dict(_other_settings(shipped))
    for path in sorted(actual.keys() | expected.keys()):
        a, b = actual.get(path), expected.get(path)
        if not _same(a, b):
            different.append(f'{path}: {_show(a)} (published setting: {_show(b)})')
    return different


def _method_and_size(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that distinguish an ablation from the main config of its task."""
    settings = {'backbone': _swin(_base(config))}
    if is_mmengine(config):
        settings |= _peft(config)
    return settings


def _settings(config: dict[str, Any], gpus: int | None) -> dict[str, Any]:
    """The most important settings, under the same names for mmengine and mmcv 1.x."""
    model, base = model_config(config), _base(config)
    new = is_mmengine(config)
    wrapper = _dict(config.get('optim_wrapper'))
    optimizer = _dict(wrapper.get('optimizer') if new else config.get('optimizer'))
    length, by_epoch = planned(config)
    width, depths, heads = _swin(base)
    head = model.get('decode_head') or model.get('bbox_head') or model.get('head') or model.get('roi_head')
    train, test = _pipelines(config)
    settings = {
        'model': _type(model),
        'head': _type(_dict(head)),
        'backbone width': width,
        'backbone depths': depths,
        'backbone heads': heads,
        'window size': base.get('window_size', 7),
        'drop path': base.get('drop_path_rate'),
        'frozen stages': _frozen_stages(base),
        'pretrained': _pretrained(config),
        'schedule': f'{length} {"epochs" if by_epoch else "iterations"}',
        'optimizer': _type(optimizer),
        'lr': _learning_rate(config, optimizer, gpus),
        'weight decay': optimizer.get('weight_decay'),
        'batch size': _batch_size(config, gpus),
        'precision': _precision(config),
        'classes': _num_classes(model),
        'training image sizes': sorted(_image_sizes(train)),
        'test image sizes': sorted(_image_sizes(test)),
        'training data repeated': _repeats(config),
    }
    if new:
        settings |= _peft(config)
    if settings['batch size'] is None:
        del settings['batch size']
    return settings


def _frozen_stages(base: dict[str, Any]) -> int:
    """The number of frozen stages as current libraries count them, where 0 freezes the patch embedding alone."""
    stages = base.get('frozen_stages', -1)
    if 'embed_dim' in base:  # Microsoft's Swin, used by the published code, where 1 still means the patch embedding
        return max(stages - 1, min(stages, 0))
    return stages


def _pretrained(config: dict[str, Any]) -> str | None:
    """The basename of the checkpoint from which the backbone starts; None if there is none."""
    model, base = model_config(config), _base(config)
    file = _dict(base.get('init_cfg')).get('checkpoint')
    if not is_mmengine(config):
        file = file or model.get('pretrained') or config.get('load_from')
    return osp.basename(file) if file else None


def _learning_rate(config: dict[str, Any], optimizer: dict[str, Any], gpus: int | None) -> float | None:
    """The learning rate that the run used; ``--auto-scale-lr`` does not change the value in the config itself."""
    rate, scaling = optimizer.get('lr'), _dict(config.get('auto_scale_lr'))
    per_gpu = _dict(config.get('train_dataloader')).get('batch_size')
    if not rate or not scaling.get('enable') or gpus is None or not per_gpu:
        return rate
    return rate * max(gpus, 1) * per_gpu / scaling['base_batch_size']


def _peft(config: dict[str, Any]) -> dict[str, Any]:
    """The options of the method, including the defaults."""
    backbone = _dict(model_config(config).get('backbone'))
    given = backbone.get('peft')
    if isinstance(given, list | tuple):
        return {'peft': [{**each, 'type': _type(each)} for each in map(_dict, given)]}
    peft = dict(_dict(given))
    if not peft:
        return {}
    method = look_up(METHOD_CLASSES, _type(peft))
    peft.pop('type', None)
    if isinstance(peft.get('structured'), dict):
        peft['structured'] = {**peft['structured'], 'type': _type(peft['structured'])}
    options = {}
    if inspect.isclass(method):
        options = {
            name: parameter.default
            for name, parameter in inspect.signature(method).parameters.items()
            if parameter.default is not parameter.empty
        }
        options['sites'] = method.sites
    return {f'peft.{name}': value for name, value in {**options, **peft}.items()}


def _batch_size(config: dict[str, Any], gpus: int | None) -> int | None:
    """The number of images in an optimizer step; for a shipped config, the published number."""
    if is_mmengine(config):
        if gpus is None:
            return _dict(config.get('auto_scale_lr')).get('base_batch_size')
        per_gpu = _dict(config.get('train_dataloader')).get('batch_size')
        return per_gpu and per_gpu * max(gpus, 1) * _dict(config.get('optim_wrapper')).get('accumulative_counts', 1)
    listed = len(config['gpu_ids']) if isinstance(config.get('gpu_ids'), list) else 0
    gpus = gpus or (listed if listed > 1 else None)  # mmseg 0.x writes 1 whatever the number is
    per_gpu = _dict(config.get('data')).get('samples_per_gpu')
    return per_gpu * gpus if per_gpu and gpus else None


def knows_batch_size(config: dict[str, Any], gpus: int | None) -> bool:
    """Whether the config and the log show how many images an optimizer step has."""
    return gpus is not None or (not is_mmengine(config) and _batch_size(config, gpus) is not None)


def _precision(config: dict[str, Any]) -> str:
    if is_mmengine(config):
        return 'mixed' if 'Amp' in _type(_dict(config.get('optim_wrapper'))) else 'fp32'
    mixed = config.get('fp16') is not None or _dict(config.get('optimizer_config')).get('use_fp16')
    return 'mixed' if mixed else 'fp32'


def _repeats(config: dict[str, Any]) -> int:
    times, dataset = 1, _dict(config.get('train_dataloader')).get('dataset') or _dict(config.get('data')).get('train')
    while isinstance(dataset, dict):
        times *= dataset.get('times', 1)
        dataset = dataset.get('dataset')
    return times


def _num_classes(node: Any) -> int | None:
    """The number of classes in the first head that states one."""
    if isinstance(node, dict):
        name = _type(node)
        if 'num_classes' in node and name and 'Preprocessor' not in name:
            return node['num_classes']
        node = list(node.values())
    for child in node if isinstance(node, list | tuple) else ():
        found = _num_classes(child)
        if found is not None:
            return found
    return None


def _pipelines(config: dict[str, Any]) -> tuple[list, list]:
    data = _dict(config.get('data'))
    train = [d.get('pipeline') for d in training_sets(config)] or [_dict(data.get('train')).get('pipeline')]
    if not any(train):
        train = [config.get('train_pipeline')]
    val = _dict(_dict(config.get('val_dataloader')).get('dataset')) or _dict(data.get('val'))
    return train, [val.get('pipeline') or config.get('test_pipeline')]


def _image_sizes(node: Any, inside: bool = False) -> set[int]:
    """All sizes in pixels in the resizing and cropping steps of a pipeline of mmengine or mmcv 1.x."""
    if isinstance(node, dict):
        if _type(node) == 'Pad':
            return set()
        sizes = ('scale', 'scales', 'img_scale', 'size', 'crop_size')
        return {n for key, value in node.items() for n in _image_sizes(value, key in sizes)}
    if isinstance(node, list | tuple):
        return {n for child in node for n in _image_sizes(child, inside)}
    return {node} if inside and isinstance(node, int) and not isinstance(node, bool) and node > 0 else set()


_NOT_COMPARED = {
    *('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'collate_fn', 'batch_size'),
    *('data_root', 'data_prefix', 'with_cp', 'fast', 'backend_args', 'file_client_args', '_scope_', 'format_only'),
    *('val_interval', 'val_begin', 'max_epochs', 'max_iters', 'num_classes', 'accumulative_counts', 'loss_scale'),
    *('dtype', 'outfile_prefix'),
}
_FILES = {'ann_file', 'checkpoint'}
_COMPARED_BY_NAME = {
    *('model.type', 'optim_wrapper.type', 'optim_wrapper.optimizer.type', 'optim_wrapper.optimizer.lr'),
    'optim_wrapper.optimizer.weight_decay',
    *(f'model.backbone.{key}' for key in ('embed_dims', 'depths', 'num_heads', 'window_size', 'drop_path_rate')),
    *('model.backbone.arch', 'model.backbone.type', 'model.backbone.frozen_stages'),
    *('model.backbone.init_cfg.type', 'model.backbone.init_cfg.checkpoint'),
}
_SIZE_STEPS = re.compile(r'\.pipeline\..*\.(scale|scales|img_scale|size|crop_size)(\.\d+)*$')


def _other_settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The path and value of every other setting that affects what a run computes."""
    model = {**model_config(config), 'backbone': _base(config)}
    sections = {'model': model}
    for name in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader'):
        sections[name] = config.get(name)
    evaluators = config.get('val_evaluator')
    sections['val_evaluator'] = evaluators if isinstance(evaluators, list | tuple) else [evaluators]
    neutral = ('ParamFreezeHook', 'LoadCheckHook', 'IterationSeedHook')  # these do not affect what is computed
    sections['custom_hooks'] = [hook for hook in config.get('custom_hooks') or [] if _type(_dict(hook)) not in neutral]
    if not config.get('resume'):
        sections['load_from'] = config.get('load_from')
    for path, value in _leaves(sections):
        if path not in _COMPARED_BY_NAME and not _SIZE_STEPS.search(path):
            yield path, value


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in _NOT_COMPARED:
                if key in _FILES and isinstance(value, str):
                    value = osp.basename(value)
                yield from _leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, list | tuple) and any(isinstance(item, dict | list | tuple) for item in node):
        for i, value in enumerate(node):
            yield from _leaves(value, f'{path}.{i}')
    elif node is not None:
        yield path, type_name(node) if path.endswith(('.type', '.constructor')) else node


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _show(value: Any) -> str:
    text = f'{value:g}' if isinstance(value, float) else 'none' if value is None else str(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the model, without the ``LinkedModel`` around it."""
    model = _dict(config.get('model'))
    return _dict(model.get('base')) if _type(model) == 'LinkedModel' else model


def _base(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the stock backbone, without the ``PeftBackbone`` around it."""
    backbone = _dict(model_config(config).get('backbone'))
    return _dict(backbone.get('base')) if _type(backbone) == 'PeftBackbone' else backbone


def _swin(base: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The width, depths and heads of a Swin in the config of any of the libraries."""
    arch = base.get('arch')
    if isinstance(arch, str):
        return SIZES.get(_ARCHS.get(arch.lower(), ''), (arch, None, None))
    source = {**_dict(arch), **base}
    width = source.get('embed_dims', source.get('embed_dim'))
    values = (source.get(key) for key in ('depths', 'num_heads'))
    return width, *(tuple(value) if isinstance(value, list | tuple) else None for value in values)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _type(node: dict[str, Any]) -> str:
    return type_name(_dict(node).get('type'))
