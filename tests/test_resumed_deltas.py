"""No delta is left behind by a checkpoint that the run has deleted, however often it was resumed, and none that is
somebody's own is deleted."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn

import mona_mm
from mona_mm.commands.cli import build_runner

SUFFIX = '.delta.safetensors'


@MODELS.register_module()
class TwoLayers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 3))


@MODELS.register_module()
class ResumedModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = mona_mm.FrozenModel(base=dict(type='TwoLayers'), trainable='1')

    def forward(self, inputs, mode='tensor'):
        out = self.layers(torch.stack(inputs))
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


@DATASETS.register_module()
class Vectors(torch.utils.data.Dataset):
    METAINFO = metainfo = {}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return dict(inputs=torch.full((3,), float(i)))


@METRICS.register_module()
class Scores(BaseMetric):
    """Says what it was told to, one score an evaluation."""

    def __init__(self, scores):
        super().__init__(prefix='x')
        self.scores = list(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=self.scores.pop(0))


class Stops(Exception):
    pass


class StopsAfter(Hook):
    """Ends the process, as it were, after an epoch's checkpoint has been written, before its delta."""

    priority = 'VERY_LOW'  # registered after the checkpoint hook: behind it, before the delta's

    def __init__(self, epoch):
        self.epoch = epoch

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.epoch:
            raise Stops


def train(work_dir, epochs, resume=None, scores=(), stop=None, hook='mona_mm.SafeCheckpointHook', **checkpoint):
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='Vectors'), sampler=dict(type='DefaultSampler'))
    evaluation = dict(val_dataloader=loader, val_cfg={}, val_evaluator=dict(type='Scores', scores=scores))
    runner = build_runner(
        Config(
            dict(
                model=dict(type='ResumedModel'),
                work_dir=str(work_dir),
                train_dataloader=loader,
                train_cfg=dict(by_epoch=True, max_epochs=epochs),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                default_hooks=dict(checkpoint=dict(type=hook, interval=1, **checkpoint)),
                custom_hooks=[dict(type='mona_mm.DeltaCheckpointHook')],
                experiment_name=f'{work_dir}-{epochs}',
                log_level='ERROR',
                randomness=dict(seed=0),
                load_from=resume and str(resume),
                resume=resume is not None,
                **(evaluation if scores else {}),
            )
        )
    )
    if stop:
        runner.register_hook(StopsAfter(stop))
        with pytest.raises(Stops):
            runner.train()
    else:
        runner.train()


def deltas(folder: Path) -> set[str]:
    return {file.name.removesuffix(SUFFIX) for file in folder.glob(f'*{SUFFIX}')}


def wholes(folder: Path) -> set[str]:
    return {file.name.removesuffix('.pth') for file in folder.glob('*.pth')}


@pytest.mark.parametrize('hook', ['mona_mm.SafeCheckpointHook', 'CheckpointHook'])
@pytest.mark.parametrize('keep', [1, 2])
def test_no_orphan(hook, keep, tmp_path):
    """Of the checkpoints that the resumed run deletes, those from before it included, the deltas go, too."""
    train(tmp_path, 2, hook=hook, max_keep_ckpts=keep)
    assert deltas(tmp_path) == wholes(tmp_path) == {f'epoch_{i}' for i in range(3 - keep, 3)}
    train(tmp_path, 3, tmp_path / 'epoch_2.pth', hook=hook, max_keep_ckpts=keep)
    train(tmp_path, 5, tmp_path / 'epoch_3.pth', hook=hook, max_keep_ckpts=keep)
    assert deltas(tmp_path) == wholes(tmp_path) == {f'epoch_{i}' for i in range(6 - keep, 6)}


def test_fewer_are_kept_after_resuming(tmp_path):
    """The checkpoint hook deletes what is too much before training goes on."""
    train(tmp_path, 3, max_keep_ckpts=3)
    train(tmp_path, 4, tmp_path / 'epoch_3.pth', max_keep_ckpts=1)
    assert deltas(tmp_path) == wholes(tmp_path) == {'epoch_4'}


def test_the_best(tmp_path):
    """The best checkpoint of before the resumption is replaced with its delta."""
    best = dict(save_best='x/score', rule='greater', max_keep_ckpts=1)
    train(tmp_path, 2, scores=(2, 1), **best)
    assert deltas(tmp_path) == wholes(tmp_path) == {'epoch_2', 'best_x_score_epoch_1'}
    train(tmp_path, 3, tmp_path / 'epoch_2.pth', scores=(3,), **best)
    assert deltas(tmp_path) == wholes(tmp_path) == {'epoch_3', 'best_x_score_epoch_3'}


def test_after_a_kill(tmp_path):
    """A process that stopped between a checkpoint and its delta had deleted the checkpoint before: that one's delta
    goes when the run goes on."""
    train(tmp_path, 3, stop=2, max_keep_ckpts=1)
    assert wholes(tmp_path) == {'epoch_2'} and deltas(tmp_path) == {'epoch_1'}, 'the test would see nothing'
    train(tmp_path, 3, tmp_path / 'epoch_2.pth', max_keep_ckpts=1)
    assert deltas(tmp_path) == wholes(tmp_path) == {'epoch_3'}


def test_what_is_somebodys_own_stays(tmp_path):
    """A delta with a name of its own, with and without a checkpoint beside it; one whose checkpoint somebody deleted
    to have space; what an earlier run of another folder left there; all that a run without limit has written."""
    train(tmp_path / 'a', 2)
    for name in ('mine.pth', f'mine{SUFFIX}', f'alone{SUFFIX}', f'epoch_77{SUFFIX}', f'best_of_all{SUFFIX}'):
        (tmp_path / 'a' / name).write_bytes((tmp_path / 'a' / f'epoch_1{SUFFIX}').read_bytes())
    own = {'mine', 'alone', 'epoch_77', 'best_of_all'}
    (tmp_path / 'a' / 'epoch_1.pth').unlink()
    train(tmp_path / 'a', 3, tmp_path / 'a' / 'epoch_2.pth')
    (tmp_path / 'a' / 'mine.pth').unlink()
    train(tmp_path / 'a', 4, tmp_path / 'a' / 'epoch_3.pth')
    assert deltas(tmp_path / 'a') == own | {'epoch_1', 'epoch_2', 'epoch_3', 'epoch_4'}
    before = deltas(tmp_path / 'a')
    (tmp_path / 'a' / 'epoch_3.pth').unlink()
    train(tmp_path / 'b', 6, tmp_path / 'a' / 'epoch_4.pth', max_keep_ckpts=1)
    assert deltas(tmp_path / 'a') == before and deltas(tmp_path / 'b') == {'epoch_6'}
