"""Read a config for the command lines: apply options and data paths, and adapt it to a machine without accelerator."""

import os.path as osp
from logging import WARNING
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from mona_mm.checkpoint.base import is_gone
from mona_mm.checkpoint.delta_file import SUFFIX, read_delta
from mona_mm.config.nodes import SPLITS, datasets, map_children, set_num_classes
from mona_mm.config.own_data import use_data
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.type_names import is_type


def load_config(
    file: str,
    options: dict[str, Any] | None = None,
    data: str | dict[str, Any] | None = None,
    work_dir: str | None = None,
    write_data: bool = True,
) -> Config:
    """Read a config file, set it to the data in a folder if one is named, and merge ``--cfg-options`` into it.

    mmengine merges options after the file has been evaluated, so values that were computed from them do not change. For
    three options they do here: ``data_root``, from which all data paths are made; ``classes``, the names of the data
    set's classes, which also sets every ``num_classes`` of the model; and ``task``, in a config with ``tasks``, which
    applies the settings of that task (``num_classes`` to the model, all others to the data sets) and its folder in
    ``data_root``.

    Args:
        file: the config file.
        options: values by the paths of their keys.
        data: the folder that :func:`mona_mm.config.own_data.use_data` sets the config to, or its options with the
            folder as ``folder``; by default the ``data`` of the config, if it has one.
        work_dir: the work dir, below which the annotations of ``data`` are written; by default the config's own.
        write_data: whether they are written; without them the config says what its classes are, but has no data.

    Raises:
        MissingFileError: if there is no such file.
        ConfigError: if ``data_root`` or ``task`` is given to a config that has none, or the task is unknown.
    """
    if not osp.isfile(file):
        raise MissingFileError(f'There is no config file {file}.')
    cfg = Config.fromfile(file)
    options = dict(options or {})
    data = _data_options(cfg, data, options)
    if data:
        place = work_dir or options.get('work_dir') or default_work_dir(cfg, file)
        use_data(cfg, data, place, options.pop('classes', None), write_data)
    task, data_root, classes = (options.pop(key, None) for key in ('task', 'data_root', 'classes'))
    if task is not None:
        _set_task(cfg, str(task))
    if data_root is not None:
        _set_data_root(cfg, osp.join(str(data_root), ''))
    if classes is not None:
        names = classes if isinstance(classes, list | tuple) else (classes,)
        _set_classes(cfg, tuple(map(str, names)))  # a digit is read as a number, but is a name here
    cfg.merge_from_dict(options)
    return cfg


def _data_options(cfg: Config, data: str | dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Merge what the config, the options of the command line and its ``--data`` say about the folder of data."""
    in_config = cfg.pop('data', None) if isinstance(cfg.get('data'), str | dict) else None
    said: dict[str, Any] = {}
    for each in (in_config, options.pop('data', None), data):
        said |= dict(folder=each) if isinstance(each, str) else dict(each or {})
    said |= {key[5:]: options.pop(key) for key in [key for key in options if key.startswith('data.')]}
    if said and not said.get('folder'):
        raise ConfigError('--data-options say how to read the folder of --data, so name that, too.')
    return said


def default_work_dir(cfg: Config, file: str) -> str:
    """The work dir of a config that was read from ``file``: its own, or the default of the tools."""
    if cfg.get('work_dir') is not None:
        return cfg.work_dir
    # A folder for each task of a config, so that every run has its own log, plan and checkpoints.
    name = osp.splitext(osp.basename(file))[0]
    return osp.join('work_dirs', name, *([cfg.task] if cfg.get('task') else []))


def _set_task(cfg: Config, task: str) -> None:
    tasks = cfg.get('tasks')
    if not tasks:
        raise ConfigError(f'task={task}: {cfg.filename} has only one task, so leave this option out.')
    if task not in tasks:
        raise ConfigError(f'task={task}: {cfg.filename} has no such task. Its tasks are {", ".join(tasks)}.')
    _replace_folder(cfg, osp.join(cfg.data_root, cfg.task, ''), osp.join(cfg.data_root, task, ''))
    settings = dict(tasks[task])
    set_num_classes(cfg.model, settings.pop('num_classes'))
    for split in SPLITS:
        for dataset in datasets(cfg, split):
            dataset.update(settings)
    cfg.task = task


def _set_data_root(cfg: Config, new: str) -> None:
    if not cfg.get('data_root'):
        raise ConfigError(f'data_root={new}: {cfg.filename} has no top-level data_root, so set the paths one by one.')
    old = osp.join(cfg.data_root, '')
    cfg.data_root = old  # with a slash, so that data/coco does not match data/coco_extra
    _replace_folder(cfg, old, new)


def _replace_folder(cfg: Config, old: str, new: str) -> None:
    """Replace a folder at the beginning of all paths in a config, in place. Both folders end with a slash."""

    def replace(node: Any) -> Any:
        if isinstance(node, str):
            return new + node[len(old) :] if osp.join(node, '').startswith(old) else node
        return map_children(node, replace)

    replace(cfg._cfg_dict)


def _set_classes(cfg: Config, classes: tuple[str, ...]) -> None:
    set_num_classes(cfg.model, len(classes))
    for split in SPLITS:
        for dataset in datasets(cfg, split):
            dataset['metainfo'] = {**(dataset.get('metainfo') or {}), 'classes': classes}


def has_accelerator() -> bool:
    """Whether this machine has a device for mixed precision and SyncBN (a Mac's has neither in mmengine)."""
    return get_device() not in ('cpu', 'mps')


def adapt_to_device(cfg: Config) -> None:
    """Without an accelerator, replace settings that need one (mixed precision, SyncBN, NCCL), and log them."""
    if has_accelerator():
        return
    replaced = []
    wrapper = cfg.get('optim_wrapper')
    if is_type(wrapper, 'AmpOptimWrapper'):
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        replaced.append('fp32 in place of mixed precision')
    distributed = cfg.get('launcher', 'none') != 'none'
    if _replace_sync_bn(cfg._cfg_dict, 'mona_mm.CPUSyncBatchNorm' if distributed else 'BN'):
        replaced.append(f'{"SyncBN over gloo" if distributed else "BN"} in place of SyncBN')
    if distributed:
        cfg.env_cfg = {**cfg.get('env_cfg', {}), 'dist_cfg': dict(backend='gloo')}
        # mmengine passes a device index by default, which DDP refuses for a model on the CPU.
        if not cfg.get('model_wrapper_cfg'):
            cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel')
        cfg.model_wrapper_cfg.device_ids = None
        replaced.append('gloo in place of nccl')
    if replaced:
        print_log(f'No accelerator here: running on the CPU with {", ".join(replaced)}.', logger='current')


def _replace_sync_bn(cfg: dict, type_: str) -> bool:
    found = False

    def replace(node: Any) -> Any:
        nonlocal found
        if isinstance(node, dict) and is_type(node, 'SyncBN'):
            node['type'] = type_
            found = True
        return map_children(node, replace)

    replace(cfg)
    return found


def resume_from(cfg: Config, checkpoint: str | None) -> None:
    """Set a config to resume from ``checkpoint``, or with ``'auto'`` from the last one in the work dir.

    Raises:
        MissingFileError: if there is no such checkpoint (mmengine would silently start anew), or, without
            ``checkpoint``, if the config's ``load_from`` does not exist.
    """
    if checkpoint is None:
        file = cfg.get('load_from')
        if is_gone(file):
            raise MissingFileError(f'load_from={file}: there is no such checkpoint.')
        return
    if checkpoint == 'auto':
        checkpoint = find_last_checkpoint(cfg.work_dir)
        if checkpoint is None:
            raise MissingFileError(
                f'--resume: {cfg.work_dir} has no last_checkpoint file that names an existing checkpoint. Name one '
                '(--resume PATH), name the work dir of the run to continue (--work-dir), or leave --resume out.'
            )
    elif '://' not in checkpoint and not osp.exists(checkpoint):
        raise MissingFileError(f'--resume: there is no checkpoint {checkpoint}.')
    if checkpoint.endswith(SUFFIX):
        _check_resumable(checkpoint)
    if not cfg.get('resume') and cfg.get('load_from'):
        cfg.base_checkpoint = cfg.load_from  # the base of this run's deltas, which stays the same
    cfg.resume = True
    cfg.load_from = checkpoint


def fine_tune_from(cfg: Config, checkpoint: str) -> None:
    """Set a config to start from a whole model that may have been trained for another number of classes.

    Raises:
        ConfigError: if it is a delta, which fits only its own classes.
    """
    if checkpoint.endswith(SUFFIX):
        raise ConfigError(
            f'--fine-tune {checkpoint}: a delta fits only the classes for which it was trained. Make a whole '
            'checkpoint of it first: python tools/delta.py merge CONFIG DELTA OUT.pth --self-contained'
        )
    cfg.load_from = checkpoint
    _hook_of(cfg, 'mona_mm.LoadCheckHook', other_classes=True)


def skip_nonfinite(cfg: Config) -> None:
    """Set a config to leave out iterations whose loss is not finite."""
    _hook_of(cfg, 'mona_mm.FiniteLossHook', skip=True)


def _hook_of(cfg: Config, name: str, **options: Any) -> None:
    """Set options of a hook of a config, which is added if the config has none of this type."""
    hooks = list(cfg.get('custom_hooks') or [])
    hook = next((hook for hook in hooks if is_type(hook, name)), None)
    if hook is None:
        hook = dict(type=name)
        hooks.append(hook)
    hook.update(options)
    cfg.custom_hooks = hooks  # last, since assigning to a Config copies the value


def _check_resumable(file: str) -> None:
    header = read_delta(file).header
    if header.parts is not None or 'iter' not in header.progress:
        raise ConfigError(
            f'--resume: {file} holds {"only " + ", ".join(header.parts) if header.parts else "no state of a run"}. '
            f'Start a new run from it with --cfg-options load_from={file}, or resume from a whole checkpoint.'
        )
    print_log(
        f'Resuming from {file}: a delta does not hold the moments of the optimizer, so they start at zero. For an '
        'exact continuation resume from the whole checkpoint beside it.',
        logger='current',
        level=WARNING,
    )


def find_last_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that the file ``last_checkpoint`` in ``work_dir`` names; None if there is none."""
    pointer = osp.join(work_dir, 'last_checkpoint')
    if not osp.isfile(pointer):
        return None
    with open(pointer, encoding='utf-8') as file:
        path = file.read().strip()
    if osp.exists(path):  # a sharded checkpoint is a folder
        return path
    moved = osp.join(work_dir, osp.basename(path))  # the work dir was renamed or copied
    return moved if osp.exists(moved) else None
