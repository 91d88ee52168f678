"""Tables whose every cell is run here: tasks, methods, learning rates, seeds, and the config of each cell."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mona_mm.commands.config import load_config
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.reproduce.carve import carve_coco
from mona_mm.reproduce.cells import configs_folder

DEVICES = ('cpu', 'cuda')


@dataclass(frozen=True)
class ComparedTask:
    """A task of a comparison: its data, its model without a method, its score.

    Args:
        name: on the command line and in the file names.
        config: a config file below ``configs/`` with a stock backbone, or the path of one.
        folder: the folder of its data within that of all data sets.
        metric: the name of the score among those of the evaluator; more is better.
        label: the name of the score for people.
        percent: the factor that makes percent of the score.
        carve: sets training and validation apart where the data have no validation split: given the config and a
            folder to write into, it changes the config. None where there is one.
    """

    name: str
    config: str
    folder: str
    metric: str
    label: str
    percent: float = 1.0
    carve: Callable[[Config, Path], None] | None = None


@dataclass(frozen=True)
class Cell:
    """A training run (``split='val'``: trained, then scored on the validation images) or a test of what it trained."""

    task: str
    method: str
    lr: float
    seed: int
    split: str = 'val'

    @property
    def name(self) -> str:
        """The name of its file of results, without ``.json``."""
        return f'{self.folder}-{self.split}'

    @property
    def folder(self) -> str:
        """The name of its work dir, which a training run and its test share."""
        return f'{self.task}-{self.method}-lr{self.lr:g}-seed{self.seed}'


@dataclass(frozen=True)
class Comparison:
    """A table of methods by tasks. The protocol: every learning rate with the first seed on the validation split, the
    best one with every seed, and these tested once, at the end.

    Args:
        name: on the command line.
        title: for people.
        tasks: in the order in which they are run.
        methods: by name the settings of ``PeftBackbone`` beside ``base``.
        learning_rates: the same for every method, the one that is tried first in the middle.
        seeds: the first is the one of the search.
        seconds: how long a training run is taken to last before one of its task was measured.
    """

    name: str
    title: str
    tasks: tuple[ComparedTask, ...]
    methods: Mapping[str, Mapping[str, Any]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    seconds: float = 360.0

    def task(self, name: str) -> ComparedTask:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)

    def choose(self, tasks: list[str] | None, methods: list[str] | None) -> tuple[list[str], list[str]]:
        """The names of the tasks and methods to run, all by default, in the order of the table.

        Raises:
            ConfigError: if there is none of such a name; it lists what is.
        """
        known = [task.name for task in self.tasks], list(self.methods)
        for option, given, names in zip(('--tasks', '--methods'), (tasks, methods), known, strict=True):
            for name in given or ():
                if name not in names:
                    raise ConfigError(f'{option} {name}: the table {self.name} has {", ".join(names)}.')
        chosen = [
            [name for name in names if not given or name in given]
            for given, names in zip((tasks, methods), known, strict=True)
        ]
        return chosen[0], chosen[1]

    def search_order(self) -> list[float]:
        """The learning rates, the middle one first."""
        middle = self.learning_rates[len(self.learning_rates) // 2]
        return [middle, *(lr for lr in self.learning_rates if lr != middle)]


def _module(kind: str, **options: Any) -> dict[str, Any]:
    return dict(peft=dict(type=kind, **options))


def _spt(budget: int, kind: str, **options: Any) -> dict[str, Any]:
    return dict(peft=dict(type='SPT', budget=budget, structured=dict(type=kind, **options)))


MINI = Comparison(
    name='mini',
    title='DINOv2-S on small sets of real images',
    tasks=(
        ComparedTask('camvid', '_base_/mini_camvid.py', 'camvid', 'mIoU', 'mIoU'),
        ComparedTask('aquarium', '_base_/mini_aquarium.py', 'aquarium', 'coco/bbox_mAP', 'box AP', 100.0, carve_coco),
    ),
    methods={
        **{name: dict(trainable=name) for name in ('full', 'fixed', 'bitfit', 'norm_tuning', 'partial_1')},
        'adapter': _module('Adapter', bottleneck=64),
        'adaptformer': _module('AdaptFormer', bottleneck=64),
        'lora': _module('LoRA', rank=16, alpha=16),
        'lorand': _module('LoRand', inner=16),
        'mona': _module('Mona', bottleneck=64),
        # Each with the budget that its module has everywhere else: what the row above it trains in the backbone.
        'spt_lora': _spt(294_912, 'LoRA', rank=16, alpha=16),
        'spt_adapter': _spt(1_190_400, 'Adapter', bottleneck=64),
        'spt_mona': _spt(1_459_200, 'Mona', bottleneck=64),
    },
    learning_rates=(1e-4, 5e-4, 2.5e-3),
    seeds=(0, 1, 2),
)

COMPARISONS = {MINI.name: MINI}
"""Every table that ``tools/reproduce.py run`` knows, by name."""


def find_comparison(name: str) -> Comparison:
    """The table of that name.

    Raises:
        ConfigError: if there is none; it lists what is.
    """
    if name not in COMPARISONS:
        raise ConfigError(f'{name}: there is no such table to run. There is {", ".join(COMPARISONS)}.')
    return COMPARISONS[name]


class Composer:
    """Makes the configs of a table's cells.

    Args:
        table: the cells' table.
        data: the folder with a folder of each data set.
        weights: the file of the pretrained backbone.
        device: one of :data:`DEVICES`; ``'cuda'`` trains in bfloat16.
        work_dir: where the cells have their work dirs, and carved splits their lists.
    """

    def __init__(self, table: Comparison, data: Path, weights: Path, device: str, work_dir: Path) -> None:
        self.table = table
        self.data, self.weights, self.work_dir = data.absolute(), weights.absolute(), work_dir.absolute()
        self.device = device
        self._bases: dict[str, Config] = {}
        self._fingerprints: dict[Cell, str] = {}

    def compose(self, cell: Cell) -> Config:
        """The config of a cell, one that ``tools/train.py`` takes as well.

        Raises:
            MissingFileError: if the task's config is not there.
        """
        cfg = copy.deepcopy(self._base(cell.task))
        cfg.model.backbone = dict(
            type='mona_mm.PeftBackbone', base=cfg.model.backbone, **copy.deepcopy(dict(self.table.methods[cell.method]))
        )
        cfg.optim_wrapper.optimizer.lr = cell.lr
        cfg.randomness = dict(seed=cell.seed)
        if self.device == 'cuda':
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
        return cfg

    def fingerprint(self, cell: Cell) -> str:
        """A digest of a cell's config, whatever the folders in which data and weights are."""
        cell = Cell(cell.task, cell.method, cell.lr, cell.seed)
        if cell not in self._fingerprints:
            text = json.dumps(self.compose(cell).to_dict(), sort_keys=True, default=str)
            for path, name in ((self.weights, 'WEIGHTS'), (self.data, 'DATA'), (self.work_dir, 'WORK')):
                text = text.replace(json.dumps(str(path))[1:-1], name)
            self._fingerprints[cell] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprints[cell]

    def _base(self, name: str) -> Config:
        if name not in self._bases:
            task = self.table.task(name)
            cfg = load_config(str(configs_folder() / task.config), dict(data_root=str(self.data / task.folder)))
            cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(self.weights))
            if task.carve is not None:
                task.carve(cfg, self.work_dir / 'splits' / name)
            self._bases[name] = cfg
        return self._bases[name]


def check_material(composer: Composer, tasks: list[str]) -> None:
    """Check that data and weights are there, before anything is planned.

    Raises:
        MissingFileError: if not; it says with which option to name them.
    """
    if not composer.weights.is_file():
        raise MissingFileError(f'There are no weights {composer.weights}. Name the file with --weights FILE.')
    for name in tasks:
        folder = composer.data / composer.table.task(name).folder
        if not folder.is_dir():
            raise MissingFileError(f'There are no data {folder}. Name the folder that holds it with --data DIR.')
