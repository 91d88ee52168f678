"""Options that any config takes: where a run can be watched, scores of classes, early stopping, and a dry run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from tiny_tasks import classifier
from torch import nn

from mona_mm.commands.dry_run import _recorded
from mona_mm.config.watching import BACKENDS, score_each_class, stop_early, watch
from mona_mm.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[1]


def test_backends_are_added_once(monkeypatch, tmp_path):
    """To those of the config, or beside mmengine's own file; wandb's run is named after the work dir."""
    monkeypatch.setattr('mona_mm.config.watching.importlib.import_module', lambda name: None)
    cfg = Config(dict(work_dir=str(tmp_path / 'mine')))
    watch(cfg, ['tensorboard', 'wandb'])
    watch(cfg, ['tensorboard'])
    assert cfg.visualizer.type == 'Visualizer'
    assert [backend.type for backend in cfg.visualizer.vis_backends] == [
        'LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend',
    ]  # fmt: skip
    assert cfg.visualizer.vis_backends[2].init_kwargs == dict(project='mona_mm', name='mine')
    own = Config(dict(work_dir='x', visualizer=dict(type='DetLocalVisualizer', vis_backends=[dict(type='A')])))
    watch(own, ['tensorboard'])
    assert own.visualizer.type == 'DetLocalVisualizer'
    assert [backend.type for backend in own.visualizer.vis_backends] == ['A', 'TensorboardVisBackend']


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(BACKENDS, 'wandb', ('WandbVisBackend', 'no_such_package'))
    with pytest.raises(UserError, match='--watch wandb needs a package: pip install wandb'):
        watch(Config(dict(work_dir='x')), ['wandb'])


def test_scores_of_classes():
    detector = Config(
        dict(
            val_evaluator=[dict(type='CocoMetric'), dict(type='VOCMetric')],
            test_evaluator=dict(type='mmdet.CocoMetric'),
        )
    )
    score_each_class(detector)
    assert detector.val_evaluator[0].classwise and 'classwise' not in detector.val_evaluator[1]
    assert detector.test_evaluator.classwise
    labels = Config(dict(val_evaluator=dict(type='Accuracy')))
    score_each_class(labels)
    score_each_class(labels)
    assert [metric.type for metric in labels.val_evaluator] == ['Accuracy', 'SingleLabelMetric']
    assert labels.val_evaluator[1].average is None


@pytest.mark.parametrize(
    ('evaluator', 'saved', 'monitor'),
    [
        (dict(type='CocoMetric', metric=['bbox', 'segm']), None, 'coco/segm_mAP'),
        (dict(type='mmdet.CocoMetric', metric='bbox'), 'auto', 'coco/bbox_mAP'),
        ([dict(type='IoUMetric')], None, 'mIoU'),
        (dict(type='Accuracy'), 'accuracy/top5', 'accuracy/top5'),
    ],
)
def test_early_stopping(evaluator, saved, monitor):
    cfg = Config(
        dict(val_evaluator=evaluator, default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best=saved)))
    )
    stop_early(cfg, 3)
    stop_early(cfg, 5)
    (hook,) = cfg.custom_hooks
    assert (hook.monitor, hook.rule, hook.patience) == (monitor, 'greater', 5)
    assert cfg.default_hooks.checkpoint.save_best == monitor


def test_early_stopping_of_an_unknown_metric():
    with pytest.raises(ConfigError, match='of MyMetric it is not known which value is the main one'):
        stop_early(Config(dict(val_evaluator=dict(type='MyMetric'))), 3)
    with pytest.raises(ConfigError, match='--early-stopping 0: must be at least 1'):
        stop_early(Config(dict(val_evaluator=dict(type='IoUMetric'))), 0)


class Two(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.backbone(x)).square().sum()


def test_what_the_backward_pass_needs_is_counted():
    """By hand: the input and the output of the ReLU, which the next layer shares, and the output of the head."""
    model, found = Two(), {}
    x = torch.randn(5, 6)
    with _recorded(model, found):
        model(x).backward()
    assert found == {'backbone': 4 * 5 * (6 + 8), 'the rest': 4 * 5 * 4}
    before = dict(found)
    model(x).backward()
    assert found == before, 'the hooks are gone'
    model.backbone.requires_grad_(False)
    found = {}
    with _recorded(model, found):
        model(x).backward()
    assert found == {'head': 4 * 5 * 8, 'the rest': 4 * 5 * 4}


def sizes_in(text: str) -> dict[str, float]:
    """The sizes in MiB that a dry run prints, by what they are of."""
    return {name: float(size.replace(',', '')) for size, name in re.findall(r'^ +([\d.,]+) MiB  (.*)$', text, re.M)}


def test_a_dry_run_writes_nothing(tool, tmp_path):
    """By the tool: what memory and time are needed, in numbers, and no work dir."""
    config = classifier(tmp_path)
    work = tmp_path / 'work'
    status, out, err = tool('train.py', str(config), '--work-dir', str(work), '--dry-run', '--early-stopping', '2')
    assert status == 0, err
    assert not work.exists() and 'What trains:' in out and 'a batch: 2 images of (3, 32, 32)' in out
    sizes = sizes_in(out)
    assert sizes.pop('of the process at most, with Python and its libraries') > 100
    largest = sizes.pop('in all, as measured in these steps')
    rest = sizes['what operators need for a moment, and the allocator keeps']
    assert sum(sizes.values()) == pytest.approx(largest, abs=0.3) if rest else sum(sizes.values()) >= largest - 0.3
    assert {'weights', 'gradients', 'moments of the optimizer'} <= set(sizes)
    assert sum('activations, backbone.layers.' in name for name in sizes) == 2
    assert re.search(r'time: [\d.e-]+ s a step, 6 steps', out)


@pytest.mark.slow
def test_memory_is_what_a_run_then_needs(tmp_path):
    """Within 15%: what a dry run says of the process, against the page of the run that follows, each by the tool."""
    config, work = classifier(tmp_path), tmp_path / 'work'
    config.write_text(config.read_text().replace("dict(type='Resize', scale=32)", "dict(type='Resize', scale=448)"))

    def run(*options: str) -> str:
        command = [sys.executable, 'tools/train.py', str(config), '--work-dir', str(work), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sizes = sizes_in(run('--dry-run'))
    assert sizes['in all, as measured in these steps'] > 50, 'large enough to be measured'
    run()
    page = (work / 'report.html').read_text()
    gib = float(re.search(r'largest memory of the process.*?([\d.]+) GiB', page)[1])
    assert sizes['of the process at most, with Python and its libraries'] == pytest.approx(1024 * gib, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize('where', list(BACKENDS))
def test_a_run_is_watched(where, tool, tmp_path, monkeypatch):
    """Files of TensorBoard, or of Weights & Biases without a network, hold the run."""
    pytest.importorskip(BACKENDS[where][1])
    monkeypatch.setenv('WANDB_MODE', 'offline')
    config, work = classifier(tmp_path), tmp_path / 'work'
    status, out, err = tool('train.py', str(config), '--work-dir', str(work), '--watch', where)
    assert status == 0, err
    pattern = dict(tensorboard='events.out.tfevents*', wandb='run-*.wandb')[where]
    assert any(file.stat().st_size > 100 for file in work.rglob(pattern))
