"""All tables that can be run: ``mini``, and the published ones, whose cells are the shipped configs as they are."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mona_mm.catalogue.methods import CATALOGUE
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError
from mona_mm.reproduce.cells import config_name, configs_folder
from mona_mm.reproduce.comparison import MINI, ComparedTask, Comparison
from mona_mm.reproduce.tasks import TASKS, Task

_TITLES = {task.table.name: task.table.title for task in TASKS.values() if task.table is not None} | dict(
    ablation='Ablations on VOC: RetinaNet',
    vtab='VTAB-1k: 19 tasks, several backbones',
    fgvc='FGVC: 5 tasks, several backbones',
)

TABLES = (MINI.name, *_TITLES)
"""The names of all tables that ``tools/reproduce.py run`` knows."""


def find_comparison(name: str) -> Comparison:
    """Look up, or build, the table named ``name``.

    Raises:
        ConfigError: if there is no such table; the error lists those that exist.
    """
    if name not in TABLES:
        raise ConfigError(f'{name}: there is no such table to run. There is {", ".join(TABLES)}.')
    return MINI if name == MINI.name else full_size_table(name)


def full_size_table(name: str) -> Comparison:
    """Build the comparison of a published table.

    Its configs have their own learning rates, schedules and data, which stay; one seed is run, and scored on the images
    of the published scores at the end of training. The cells of the ablations and of VTAB-1k and FGVC are named for the
    whole of their configs' names, backbones included.
    """
    if name in ('vtab', 'fgvc'):
        tasks = tuple(_benchmark_tasks(name))
    elif name == 'ablation':
        tasks = (_task(TASKS['voc'], dict(_ablations())),)
    else:
        members = [task for task in TASKS.values() if task.table is not None and task.table.name == name]
        tasks = tuple(_task(task, dict(_methods(task))) for task in members)
    methods = dict.fromkeys(method for task in tasks for method in task.configs)
    return Comparison(
        name=name,
        title=f'{_TITLES[name]} (the published settings)',
        tasks=tasks,
        methods={method: {} for method in methods},
        learning_rates=(),
        seeds=(0,),
        seconds=86_400.0,
        has_tests=False,
    )


def _task(task: Task, configs: Mapping[str, str]) -> ComparedTask:
    metric = next(iter(task.metrics.values()))
    key, percent = next(iter(metric.mmengine.items()))
    return ComparedTask(name=task.name, metric=key, label=metric.label, percent=float(percent), configs=configs)


def _methods(task: Task) -> Iterator[tuple[str, str]]:
    """The methods of a task that have a config, and its path relative to ``configs/``."""
    for method in CATALOGUE:
        path = f'{method}/{config_name(method, task.name)}.py'
        if (configs_folder() / path).is_file():
            yield method, path


def _ablations() -> Iterator[tuple[str, str]]:
    """The configs of the ablations on VOC: all of Mona, and full fine-tuning of the three sizes."""
    root = configs_folder()
    for path in sorted([*root.glob('full/*retinanet_swin_*_voc*.py'), *root.glob('mona/retinanet_swin_*_voc*.py')]):
        yield path.stem, path.relative_to(root).as_posix()


def _benchmark_tasks(name: str) -> Iterator[ComparedTask]:
    """The tasks of VTAB-1k or FGVC, each with the configs of all methods and backbones."""
    root = configs_folder()
    base = dict(vtab='_base_/vtab1k.py', fgvc='_base_/fgvc.py')[name]
    files = sorted(path for path in root.glob(f'*/*_{name}.py') if path.parent.name != '_base_')
    configs = {re.sub(f'_{name}$', '', path.stem): path.relative_to(root).as_posix() for path in files}
    for task in _task_names(root / base):
        options: dict[str, Any] = dict(task=task)
        yield ComparedTask(task, metric='accuracy/top1', label='top-1', configs=configs, options=options)


def _task_names(file: Path) -> tuple[str, ...]:
    return tuple(load_config(str(file)).tasks)
