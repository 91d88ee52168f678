"""Whole runs of the small detector: resuming bit for bit, two processes, and errors before training."""

import json
import os
import pickle
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import command, scores
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS

from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.commands.cli import build_runner
from mona_mm.compat.safe_globals import register_safe_globals
from mona_mm.config.load import adapt_to_device, find_last_checkpoint, resume_from
from mona_mm.hooks import iteration_seed

STOP = 2
"""The iteration after which runs are stopped, and an epoch's number of images; whole runs have twice as many."""


def iteration_based(cfg, iterations: int):
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=100)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=STOP)


def epoch_based(cfg, iterations: int):
    cfg.train_dataloader.dataset.indices = STOP
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=iterations // STOP, val_interval=100)


@TRANSFORMS.register_module()
class Noise:
    """A transform whose every number is random."""

    def __call__(self, results):
        results['img'] = results['img'] + np.random.uniform(0, 20, results['img'].shape).astype(np.float32)
        return results


def with_noise(cfg):
    """DropPath, dropout, random flips and random pixels, so that equality shows the random state is right."""
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='Noise'))
    cfg.model.backbone.base.drop_path_rate = 0.3
    cfg.model.backbone.peft.dropout = 0.1
    cfg.param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[1, 3], gamma=0.5)]


class Stopped(Exception):
    pass


class StopHook(Hook):
    """Stops a run at the beginning of an iteration, as a signal would."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == STOP:
            raise Stopped


def train(cfg, work_dir, resume=None, stop=False):
    cfg = cfg.copy()
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{work_dir.name}-{resume}-{os.urandom(4).hex()}'
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    resume_from(cfg, resume)
    adapt_to_device(cfg)
    runner = build_runner(cfg)
    losses = []
    train_step = runner.model.train_step

    def recorded(*args, **kwargs):
        out = train_step(*args, **kwargs)
        losses.append(float(out['loss']))
        return out

    runner.model.train_step = recorded
    if stop:
        runner.register_hook(StopHook())
    with pytest.raises(Stopped) if stop else nullcontext():
        runner.train()
    return losses, read_checkpoint(find_last_checkpoint(cfg.work_dir))


def flat(node, path=''):
    """(path, tensor or number) pairs of nested dicts and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, f'{path}/{key}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from flat(value, f'{path}/{i}')
    elif isinstance(node, torch.Tensor | int | float):
        yield path, node


def with_frozen_bfloat16(cfg, iterations):
    cfg.model.backbone.frozen_dtype = 'bfloat16'
    epoch_based(cfg, iterations)


def with_a_term_in_the_loss(cfg, iterations):
    cfg.model.backbone.peft = dict(type='CoLin', bottleneck=12, rank=4)
    epoch_based(cfg, iterations)


@pytest.mark.parametrize(
    'loop',
    [
        epoch_based,
        iteration_based,
        pytest.param(with_frozen_bfloat16, marks=pytest.mark.slow),
        pytest.param(with_a_term_in_the_loss, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_for_bit(detector_config, tmp_path, loop):
    """Two iterations, stop, two more after --resume: the losses of four straight ones, and every tensor of the model
    and the optimizer, bit for bit; data order, augmentation, DropPath and dropout included. Random pixels are drawn in
    the main process: each fetch, also one that resuming skips, and each step begin from the seed of their iteration."""
    with_noise(detector_config)
    loop(detector_config, 2 * STOP)
    straight, expected = train(detector_config, tmp_path / 'straight')
    first, _ = train(detector_config, tmp_path / 'stopped', stop=True)
    second, actual = train(detector_config, tmp_path / 'stopped', resume='auto')
    assert len(straight) == 2 * STOP and len(first) == len(second) == STOP
    assert first + second == straight
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        a, b = dict(flat(actual[part])), dict(flat(expected[part]))
        assert a.keys() == b.keys()
        wrong = [k for k in a if not torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))]
        assert not wrong, (part, wrong[:5])


def test_a_run_depends_on_its_seed(detector_config, tmp_path):
    """The test above could not pass if nothing were random: another seed gives other losses."""
    with_noise(detector_config)
    epoch_based(detector_config, STOP)
    first, _ = train(detector_config, tmp_path / 'a')
    detector_config.randomness = dict(seed=1)
    second, _ = train(detector_config, tmp_path / 'b')
    assert first != second


def test_seeds_differ_by_iteration_rank_and_purpose(monkeypatch):
    """Two processes, two iterations, a fetch and a step: all draw other numbers, and the same ones again."""

    def draw(rank, *arguments):
        monkeypatch.setattr('mona_mm.hooks.iteration_seed.get_rank', lambda: rank)
        iteration_seed.seed(*arguments)
        return torch.rand(1).item(), np.random.rand(), random.random()

    calls = [(rank, 7, iteration, purpose) for rank in (0, 1) for iteration in (3, 4) for purpose in (0, 1)]
    drawn = [draw(*call) for call in calls]
    assert len(set(drawn)) == len(calls)
    assert [draw(*call) for call in calls] == drawn


def test_a_malicious_history_is_refused(tmp_path):
    """Loading mmengine's log history allows no getattr beyond its own methods."""

    from mmengine.logging import HistoryBuffer

    class Attack:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')  # whose __globals__ hold everything

    torch.save({'x': Attack()}, tmp_path / 'attack.pth')
    register_safe_globals()  # the fork's loader takes away what it has in common with ours
    with pytest.raises(pickle.UnpicklingError, match='__init__.*not allowed'):
        torch.load(tmp_path / 'attack.pth', weights_only=True)


@pytest.mark.slow
def test_two_processes_train(detector_config, tmp_path, tool):
    """Two gloo processes on the CPU, started by torchrun (test_spt.py has two without it), train under DDP without
    `find_unused_parameters` (DDP would raise if a trainable parameter had no gradient); `tools/test.py` on the
    checkpoint repeats the scores and draws every image."""
    detector_config.train_cfg.max_epochs = 1
    detector_config.train_cfg.val_interval = 1
    detector_config.dump(tmp_path / 'config.py')
    result = command(
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'tools/train.py'),
        str(tmp_path / 'config.py'), '--launcher', 'pytorch', '--work-dir', str(tmp_path / 'ddp'),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    log = result.stdout + result.stderr
    assert 'gloo in place of nccl' in log and 'find_unused_parameters' not in log
    assert 'Epoch(train) [1][3/3]' in log and 'coco/bbox_mAP' in log
    assert 'frozen parameters are unchanged' in log
    checkpoint = find_last_checkpoint(tmp_path / 'ddp')
    assert read_checkpoint(checkpoint)['meta']['iter'] == 3

    status, out, err = tool(
        'test.py', str(tmp_path / 'config.py'), checkpoint, '--work-dir', str(tmp_path / 'test'),
        '--show-dir', str(tmp_path / 'pictures'), '--out', str(tmp_path / 'predictions.pkl'),
    )  # fmt: skip
    assert status == 0, err
    assert scores(out + err) == scores(log)
    assert len(list((tmp_path / 'pictures').iterdir())) == 2
    assert (tmp_path / 'predictions.pkl').stat().st_size > 0


COCO = 'configs/mona/cascade_swin_b_coco.py'
DEMO = 'configs/demo/demo_mona_shapes.py'


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('train.py', ['configs/nowhere.py'], 'There is no config file configs/nowhere.py'),
        ('train.py', [DEMO, '--cfg-options', 'data_root=/nowhere'], '--cfg-options data_root='),
        ('train.py', [DEMO, '--resume', '--cfg-options', 'data_root=DATA'], '--resume: '),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.peft.type=Monna'],
            "unknown method 'Monna'",
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.peft.bottelneck=64'],
            "Did you mean 'bottleneck'",
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.base.frozen_stages=1'],
            'frozen_stages=1',
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.trainable=stages.9'],
            "trainable='stages.9'",
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.base.type=SwinV3'],
            "there is no module 'SwinV3'",
        ),
        (
            'train.py',
            [DEMO, '--cfg-options', 'data_root=DATA', 'model.backbone.trainabel=norm'],
            "model.backbone has no 'trainabel'. Did you mean 'trainable'?",
        ),
        (
            'train.py',
            [DEMO, '--auto-scale-lr', '--cfg-options', 'data_root=DATA', 'auto_scale_lr=None'],
            '--auto-scale-lr',
        ),
        ('test.py', [DEMO, 'nowhere.pth', '--cfg-options', 'data_root=DATA'], 'There is no checkpoint nowhere.pth'),
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else None,
)
def test_bad_input_ends_in_one_line(tool, name, arguments, message, demo_data, tmp_path):
    """A user's mistake ends the command before training, with status 2 and one line that names it."""
    arguments = [a.replace('DATA', str(demo_data)) for a in arguments]
    status, _, err = tool(name, *arguments, '--work-dir', str(tmp_path))
    assert status == 2
    assert err.rstrip().splitlines()[-1].startswith('error: '), 'the error is one line, the last one'
    assert err.count('error: ') == 1 and message in err.rstrip().splitlines()[-1] and 'Traceback' not in err


def test_count_params_prints_the_contract(tool, tmp_path):
    """One object a config with exactly the keys of the contract, and Swin-B's published numbers."""
    configs = [COCO, 'configs/full/full_cascade_swin_b_coco.py', 'configs/fixed/fixed_cascade_swin_b_coco.py']
    rows = json.loads(tool('count_params.py', *configs, '--json')[1])
    assert [set(row) for row in rows] == 3 * [
        {'config', 'method', 'total', 'trainable', 'backbone_total', 'backbone_trainable'}
    ]
    assert [row['config'] for row in rows] == configs
    assert [row['method'] for row in rows] == ['Mona', 'full', 'fixed']
    assert [row['backbone_trainable'] for row in rows] == [3667456, 86745016, 0]
    assert [row['backbone_total'] for row in rows] == [86745016 + 3667456, 86745016, 86745016]
    stock = "_base_ = ['{0}']\ncustom_hooks = [dict(type='mona_mm.ParamFreezeHook', trainable=['roi_head'])]\n"
    (tmp_path / 'hook.py').write_text(stock.format(ROOT / 'configs/_base_/coco_cascade_mask_rcnn_swin_b.py'))
    (row,) = json.loads(tool('count_params.py', str(tmp_path / 'hook.py'), '--json')[1])
    assert row['backbone_trainable'] == 0 and row['trainable'] == 54785187
    table = tool('count_params.py', COCO)[1]
    assert '3,667,456 = 4.23% of the base, 4.06% of base and method' in table
