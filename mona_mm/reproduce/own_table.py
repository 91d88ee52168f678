"""The table ``own``: methods side by side on data of one's own."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.own_data import read_folder, task_of_folder
from mona_mm.reproduce.cells import configs_folder
from mona_mm.reproduce.comparison import MINI, ComparedTask, Comparison

OWN = 'own'
"""The name of the table on the command line."""

METHODS = tuple(name for name in MINI.methods if not name.startswith('spt_'))
"""The methods that can be compared. SPT's budgets are those of one backbone."""

_DEFAULT_METHODS = ('fixed', 'full', 'lora', 'mona')
_CONFIGS = dict(
    boxes='custom/quick_retinanet_dinov2_s.py',
    masks='custom/quick_mask_rcnn_dinov2_s.py',
    maps='custom/quick_fcn_dinov2_s.py',
    labels='custom/quick_classifier_dinov2_s.py',
)
SCORES = dict(
    boxes=('coco/bbox_mAP', 'box AP', 100.0),
    masks=('coco/segm_mAP', 'mask AP', 100.0),
    maps=('mIoU', 'mIoU', 1.0),
    labels=('accuracy/top1', 'top-1', 1.0),
)
"""The score of each kind of data, its name in tables, and what makes percent of it."""


@dataclass(frozen=True)
class OwnTable:
    """What a table of one's own compares; it is kept beside its results.

    Args:
        tasks: the data, by the name of the task: ``folder``, ``config``, ``kind`` and the options of ``--data``.
        methods: the names of the methods.
        learning_rates: the learning rates that every method is tried with.
        seeds: the number of seeds.
    """

    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    methods: Sequence[str] = _DEFAULT_METHODS
    learning_rates: Sequence[float] = MINI.learning_rates
    seeds: int = len(MINI.seeds)

    def comparison(self) -> Comparison:
        """The table as one that :class:`mona_mm.reproduce.queue.Queue` can run."""
        tasks = []
        for name, task in self.tasks.items():
            metric, label, percent = SCORES[task['kind']]
            options = dict(task['options'])
            tasks.append(ComparedTask(name, task['config'], task['folder'], metric, label, percent, own_data=options))
        return Comparison(
            name=OWN,
            title='Methods on data of your own',
            tasks=tuple(tasks),
            methods={name: MINI.methods[name] for name in METHODS if name in self.methods},
            learning_rates=tuple(self.learning_rates),
            seeds=tuple(range(self.seeds)),
        )


def read_own_table(work_dir: Path) -> OwnTable:
    """Read the table that is kept in a work dir.

    Raises:
        MissingFileError: if there is none.
    """
    file = _file(work_dir)
    if not file.is_file():
        raise MissingFileError(
            f'There is no table in {work_dir}. Make one with tools/reproduce.py run {OWN} --data DIR, or name its '
            'folder with --work-dir.'
        )
    return OwnTable(**json.loads(file.read_text(encoding='utf-8')))


def extend_own_table(
    work_dir: Path,
    folder: str | None,
    config: str | None = None,
    options: Mapping[str, Any] | None = None,
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    seeds: int | None = None,
) -> tuple[OwnTable, list[str]]:
    """Add a folder of data to the table in a work dir, or other methods, learning rates or seeds; write it.

    Args:
        work_dir: the work dir of the table.
        folder: the folder of the data; None for those that the table has.
        config: a config whose model is compared; by default the quick one for what the folder holds.
        options: the options of ``--data`` (``val``, ``test``, ``seed``, ``layout``, ``skip``). A fifth of the images
            is kept for the test where the folder has no test images.
        methods: the methods to compare, beside those that the table has; by default ``fixed``, ``full``, ``lora``,
            ``mona``.
        learning_rates: those to try.
        seeds: the number of seeds.

    Returns:
        The table, and the names of the tasks to run.

    Raises:
        ConfigError: if an argument has an unusable value.
        MissingFileError: if the folder or the config does not exist, or there is neither a folder nor a table.
    """
    known = _file(work_dir).is_file()
    table = read_own_table(work_dir) if known or folder is None else OwnTable()
    if methods is not None:
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ConfigError(f'--methods {unknown[0]}: the table {OWN} has {", ".join(METHODS)}.')
        table = replace(table, methods=[*(table.methods if known else ()), *methods])
    if learning_rates is not None:
        if not all(0 < rate < 1 for rate in learning_rates):
            raise ConfigError('--learning-rates are numbers between 0 and 1.')
        table = replace(table, learning_rates=sorted(set(learning_rates)))
    if seeds is not None:
        if seeds < 1:
            raise ConfigError(f'--seeds {seeds}: at least one.')
        table = replace(table, seeds=seeds)
    chosen = list(table.tasks)
    if folder is not None:
        path = Path(folder).expanduser().absolute()
        options = dict(dict(test=0.2), **(options or {}))
        file = quick_config(str(path), options.get('layout')) if config is None else str(Path(config).absolute())
        name = re.sub(r'[^\w.]+', '_', path.name) or 'data'  # no hyphen, which separates the parts of a cell's name
        task = dict(folder=str(path), config=file, kind=_kind(file, path, options, work_dir), options=options)
        if name in table.tasks and table.tasks[name]['folder'] != str(path):
            raise ConfigError(
                f'--data {folder}: the table in {work_dir} has {table.tasks[name]["folder"]} by the name {name}. Name '
                'another --work-dir.'
            )
        table, chosen = replace(table, tasks={**table.tasks, name: task}), [name]
    table = replace(table, methods=list(dict.fromkeys(table.methods)))
    AtomicLocalBackend().put_text(json.dumps(asdict(table), indent=1) + '\n', _file(work_dir))
    return table, chosen


def quick_config(folder: str, layout: str | None = None) -> str:
    """The quick config for what a folder holds, relative to ``configs/``."""
    task = task_of_folder(folder, layout)
    has_masks = task == 'boxes' and read_folder(folder, task, layout, skip=True).has_masks
    return _CONFIGS['masks' if has_masks else task]


def _kind(config: str, folder: Path, options: Mapping[str, Any], work_dir: Path) -> str:
    """What a config is compared by on data in a folder, a key of the scores."""
    file, data = str(configs_folder() / config), dict(options, folder=str(folder))
    cfg = load_config(file, {}, data, str(work_dir), write_data=False)
    return 'masks' if 'segm' in cfg.val_evaluator.get('metric', ()) else cfg.own_data.task


def _file(work_dir: Path) -> Path:
    return work_dir / 'table.json'
