"""Runs of tools/train.py in processes of their own, which are forked from the test's and take a second: a model of two
layers that trains on small pictures, and whose loss is not finite for a black one."""

import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  imported here, so that the processes need not do it
import mmcv
import mmcv.ops
import numpy as np
import torch
from helpers import run_tool
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import nn

import mona_mm.config.check
import mona_mm.datasets
import mona_mm.hooks
import mona_mm.models  # noqa: F401  imported here, so that the processes need not do it
from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.config.load import find_last_checkpoint


@DATASETS.register_module()
class Pictures(BaseDataset):
    """The pictures that a text file lists."""

    METAINFO = dict(classes=('thing',))

    def load_data_list(self):
        names = Path(self.ann_file).read_text().split()
        return [dict(img_path=str(Path(self.data_root, name)), number=i) for i, name in enumerate(names)]


@TRANSFORMS.register_module()
class PackPicture(BaseTransform):
    """The mean colour of a picture, and its name."""

    def transform(self, results):
        sample = BaseDataElement(metainfo=dict(img_path=results['img_path']))
        colour = torch.from_numpy(results['img'].astype(np.float32).mean((0, 1)) / 255)
        return dict(inputs=colour, data_samples=sample, number=results['number'])


@MODELS.register_module()
class SmallLayers(nn.Sequential):
    def __init__(self, dropout=0.0):
        super().__init__(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 8))

    def init_weights(self):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for layer in (self[0], self[2]):
                layer.reset_parameters()


@MODELS.register_module()
class SmallRegressor(BaseModel):
    """Its loss is infinite where a picture is black. It writes down which pictures it has seen.

    Args:
        layers: the config of the layers.
        delay: seconds that an iteration takes at least.
        seen: a file for the numbers of the pictures.
    """

    def __init__(self, layers, delay=0.0, seen=None):
        super().__init__()
        self.backbone = MODELS.build(layers)
        self.delay, self.seen = delay, seen

    def forward(self, inputs, data_samples=None, number=None, mode='tensor'):
        if mode == 'predict':
            return [BaseDataElement(metainfo=sample.metainfo) for sample in data_samples]
        inputs = torch.stack(inputs)
        if self.seen and mode == 'loss':
            with open(self.seen, 'a') as file:
                file.write(' '.join(str(int(n)) for n in number) + '\n')
        time.sleep(self.delay)
        out = self.backbone(inputs)
        return dict(loss_fit=out.square().mean(), loss_dark=1e-3 * -inputs.mean(1).log().mean())


@METRICS.register_module()
class NoScore(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(score=len(results))


def make_pictures(folder: Path, count: int = 8, black: tuple[int, ...] = ()) -> Path:
    """Small JPEGs of one colour and noise, and their list."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((24, 24, 3), np.uint8)
        if i not in black:
            picture = np.clip(rng.normal(rng.integers(40, 200, 3), 20, (24, 24, 3)), 1, 255).astype(np.uint8)
        mmcv.imwrite(picture, str(folder / f'{i}.jpg'))
    (folder / 'images.txt').write_text('\n'.join(f'{i}.jpg' for i in range(count)))
    return folder


def config(data: Path, work_dir: Path, **changes) -> dict:
    """A run of two epochs of four iterations of two pictures; keys of ``changes`` are paths, with __ for a dot."""
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=dict(
            type='Pictures',
            data_root=str(data),
            ann_file='images.txt',
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackPicture')],
        ),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    made = dict(
        default_scope='mmengine',
        custom_imports=dict(imports=['mona_mm'], allow_failed_imports=False),
        model=dict(
            type='SmallRegressor',
            layers=dict(type='mona_mm.FrozenModel', base=dict(type='SmallLayers'), trainable=['2']),
            seen=f'{work_dir}.seen',
        ),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1)),
        param_scheduler=[dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.5)],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1, max_keep_ckpts=2),
        ),
        custom_hooks=[
            dict(type=f'mona_mm.{name}')
            for name in ('ParamFreezeHook', 'LoadCheckHook', 'DeltaCheckpointHook', 'IterationSeedHook')
        ],
        randomness=dict(seed=0),
        env_cfg=dict(mp_cfg=dict(mp_start_method='fork')),
    )
    for path, value in changes.items():
        *parents, last = path.split('__')
        node = made
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    return made


def by_iterations(count: int, every: int = 1) -> dict:
    """Changes of :func:`config` for a run that counts iterations."""
    return dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=count, val_interval=10 * count),
        train_dataloader__sampler=dict(type='InfiniteSampler', shuffle=True),
        param_scheduler=[dict(type='MultiStepLR', by_epoch=False, milestones=[2], gamma=0.5)],
        default_hooks__checkpoint=dict(
            type='mona_mm.SafeCheckpointHook', by_epoch=False, interval=every, max_keep_ckpts=2
        ),
    )


VALIDATION = dict(val_cfg={}, val_evaluator=dict(type='NoScore'))


def with_validation(made: dict, **loader) -> dict:
    """A config whose run validates on the training pictures."""
    sampler = dict(type='DefaultSampler', shuffle=False)
    made['val_dataloader'] = {**made['train_dataloader'], 'sampler': sampler, **loader}
    return made | VALIDATION


@dataclass
class Run:
    """A run of tools/train.py in processes of its own, in a process group of its own."""

    processes: list
    files: list[Path]
    status: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        return ''.join(file.read_text() for file in self.files if file.exists())

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def wait(self, seconds: float = 300) -> int:
        """The exit status of the first process, when all have ended."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, f'it hangs:\n{self.text[-3000:]}'
        self.status = [process.exitcode for process in self.processes]
        return self.status[0]

    def wait_for(self, condition, seconds: float = 300) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.processes[0].is_alive(), self.text[-3000:]
            time.sleep(0.005)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]


def start(made: dict, *arguments: str, count: int = 1, before=None, beside: Path | None = None) -> Run:
    """Start tools/train.py with a config, in ``count`` processes as a launcher does.

    Args:
        made: the config.
        arguments: options of the command.
        count: the number of processes.
        before: a function that each process calls first.
        beside: the folder for the config's file and the output; the one of the work dir by default.
    """
    work_dir = Path(made['work_dir'])
    file = (beside or work_dir.parent) / f'{work_dir.name}_{os.urandom(3).hex()}.py'
    file.write_text('\n'.join(f'{key} = {value!r}' for key, value in made.items()))
    command, variables = ['train.py', str(file), *arguments], dict(OMP_NUM_THREADS='1')
    if count > 1:
        store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        variables |= dict(WORLD_SIZE=count, MASTER_ADDR='127.0.0.1', MASTER_PORT=store.port)
        variables |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
        command += ['--launcher', 'pytorch']
    run = Run([], [file.with_suffix(f'.{rank}.log') for rank in range(count)])
    if count > 1:
        run.store = store
    for rank in range(count):
        ranked = variables | (dict(RANK=rank, LOCAL_RANK=rank) if count > 1 else {})
        process = multiprocessing.get_context('fork').Process(
            target=_run, args=(command, ranked, str(run.files[rank]), before)
        )
        process.start()
        run.processes.append(process)
    return run


def finished(made: dict, *arguments: str, **options) -> Run:
    """A run that has ended."""
    run = start(made, *arguments, **options)
    run.wait()
    return run


def _run(command: list[str], variables: dict, log: str, before) -> None:
    os.setpgid(0, 0)
    with open(log, 'w') as out:
        for descriptor in (1, 2):
            os.dup2(out.fileno(), descriptor)
    sys.stdout = os.fdopen(1, 'w', buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)
    os.environ.update({name: str(value) for name, value in variables.items()})
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    gc.freeze()  # mmengine collects what a data set leaves behind, and would look at all of the test's libraries
    if before:
        before()
    try:
        run_tool(*command)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise


def iterations(work_dir: Path) -> int:
    """The iterations that the last checkpoint of a work dir has."""
    return read_checkpoint(find_last_checkpoint(str(work_dir)))['meta']['iter']


def trained(work_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a work dir."""
    return read_checkpoint(find_last_checkpoint(str(work_dir)))['state_dict']


def logged(work_dir: Path, key: str = 'loss') -> list[float]:
    """The values of all logged iterations, of all runs in a work dir in their order."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record[key] for record in records if key in record]


def errors(text: str) -> list[str]:
    """The error lines of an output, which must have no traceback."""
    assert 'Traceback' not in text, text[-3000:]
    return [line for line in text.splitlines() if line.startswith('error: ')]
