"""What docs/extending.md says to write, tried: a method, a host, a task and a hook, each from files of its own."""

import importlib
import json
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import HOSTS, ROOT, SWIN
from helpers import assert_near
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS
from mmengine.runner import Runner
from suite import (
    CLONES,
    METHOD_CONFIGS,
    check_copies,
    check_names,
    check_round_trip,
    check_start,
    images,
    outputs,
    trains_in_mixed_precision,
)

from mona_mm import PeftBackbone
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError
from mona_mm.hosts import HOSTS as REGISTERED
from mona_mm.hosts import method_modules
from mona_mm.registry import METHODS
from mona_mm.reproduce import Metric, Task, register_task
from mona_mm.reproduce.tasks import MMCV_SCORES, MMENGINE_SCORES, TASKS

PAGE = (ROOT / 'docs/extending.md').read_text()
FILES = dict(re.findall(r'```python\n# (\S+\.py)\n(.*?)```', PAGE, re.DOTALL))


@pytest.fixture
def load_file(tmp_path, monkeypatch):
    """Writes the files of the page of the given names into a folder, and imports those that are modules."""
    registries = [METHODS.module_dict, MMENGINE_HOOKS.module_dict, REGISTERED, TASKS, MMENGINE_SCORES, MMCV_SCORES]
    before = [dict(registry) for registry in registries]
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []

    def load(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(FILES[name])
            if '/' not in name:
                loaded.append(file.stem)
                importlib.import_module(file.stem)

    yield load
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in loaded:
        sys.modules.pop(name, None)


def check_method(peft, host, tmp_path):
    check_names(host, peft)
    check_round_trip(host, peft)
    check_copies(PeftBackbone(base=host, peft=peft), CLONES['deepcopy'])
    check_start(host, peft, 'pretrained', tmp_path)
    trains_in_mixed_precision(host, dict(peft=peft), torch.bfloat16)


@pytest.mark.parametrize('name', ['scale_shift.py', 'held_shift.py', 'output_scale.py'])
def test_a_method(name, load_file, tmp_path):
    """The file alone makes a method, which is built by its name and behaves as one of this package."""
    load_file(name)
    peft = dict(type=''.join(word.title() for word in name.removesuffix('.py').split('_')))
    check_method(peft, HOSTS['mmdet-swin'], tmp_path)


def test_a_term_in_the_loss(load_file):
    """It is in the losses of a model around the backbone, by its name, and in the gradients."""
    load_file('held_shift.py')

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='HeldShift', weight=2.0))

        def forward(self, inputs, mode='loss'):
            return dict(loss_task=0 * self.backbone(inputs)[-1].sum())

    model = Model()
    loss, log = model.parse_losses(model(images()))
    loss.backward()
    shifts = [module.shift for module in method_modules(model)]
    assert_near(log['loss_shift'], 2 * torch.cat(shifts).square().sum())
    assert_near([shift.grad for shift in shifts], [4 * shift.detach() for shift in shifts])


def test_a_linear_method_merges(load_file):
    """What the method at linear sites adds is in the merged weights."""
    load_file('output_scale.py')
    torch.manual_seed(0)
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='OutputScale'))
    model.init_weights()
    stock = MODELS.build(HOSTS['mmdet-swin'])
    stock.load_state_dict(merged_state_dict(model))
    x = images()
    model.eval(), stock.eval()
    for a, b in zip(outputs(stock, x), outputs(model, x), strict=True):
        assert_near(a, b)


GATED_NET = """
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn


class MLP(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class GatedBlock(nn.Module):
    def __init__(self, channels, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path)

    def gate(self, x):
        return x * self.depthwise(x).sigmoid()

    def forward(self, x):
        x = x + self.drop_path(self.gate(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@MODELS.register_module()
class GatedNet(BaseModule):
    def __init__(self, channels=16, depth=2, drop_path_rate=0.1, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, channels, 4, 4)
        self.blocks = nn.ModuleList(GatedBlock(channels, drop_path_rate) for _ in range(depth))

    def forward(self, x):
        outs = [self.stem(x)]
        for block in self.blocks:
            outs.append(block(outs[-1]))
        return tuple(outs[1:])
"""


@pytest.fixture
def gated_net(load_file, tmp_path):
    """The config of the backbone of which the page says how it is declared, after that declaration."""
    (tmp_path / 'gated_net.py').write_text(GATED_NET)
    importlib.import_module('gated_net')
    load_file('gated_host.py')
    yield dict(type='GatedNet')
    MODELS.module_dict.pop('GatedNet')
    sys.modules.pop('gated_net')


@pytest.mark.parametrize('method', ['mona', 'adapter', 'adaptformer', 'lorand', 'lora-ffn'])
def test_a_host(method, gated_net, tmp_path):
    """The file alone makes a backbone a host of every method that has a site there."""
    peft = METHOD_CONFIGS[method]
    check_method(peft, gated_net, tmp_path)
    torch.manual_seed(0)
    model = PeftBackbone(base=gated_net, peft=peft)
    modules = method_modules(model)
    assert len(modules) == (2 if method == 'adaptformer' else 4)
    x = images()
    sum(out.square().mean() for out in model(x)).backward()
    assert all(any(p.grad is not None and p.grad.any() for p in module.parameters()) for module in modules)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_host_without_a_method_is_stock(gated_net):
    """The forward with sites computes what the stock blocks compute."""
    torch.manual_seed(0)
    model = PeftBackbone(base=gated_net, peft=dict(type='LoRA', rank=2, sites=['fc1']))  # begins at zero
    stock = MODELS.build(gated_net)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if '.peft.' not in k})
    x = images()
    model.eval(), stock.eval()
    for a, b in zip(outputs(model, x), outputs(stock, x), strict=True):
        assert_near(a, b)


def command(monkeypatch, capsys, *arguments):
    """What tools/reproduce.py prints."""
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *map(str, arguments)])
    runpy.run_path(str(ROOT / 'tools/reproduce.py'), run_name='__main__')
    return capsys.readouterr().out


def test_a_task(load_file, tmp_path, monkeypatch, capsys):
    """A base config, a config of Mona and a row, in a folder of their own: a run is recognised, compared, and stands
    beside its published number."""
    names = [name for name in FILES if 'food101' in name]
    assert names == ['configs/_base_/food101_swin_l.py', 'configs/mona/swin_l_food101.py', 'food101.py']
    shutil.copytree(ROOT / 'configs/_base_', tmp_path / 'configs/_base_')
    load_file(*names)
    TASKS.pop('food101')
    sys.modules.pop('food101')  # the command imports it
    assert len(FILES['configs/mona/swin_l_food101.py'].splitlines()) <= 15

    cfg = load_config(str(tmp_path / 'configs/mona/swin_l_food101.py'), {'optim_wrapper.optimizer.lr': 1e-3})
    run = tmp_path / 'work/20260101_000000'
    (run / 'vis_data').mkdir(parents=True)
    dumped = '\n'.join(f'{key} = {value!r}' for key, value in cfg.to_dict().items())
    (run / 'vis_data/config.py').write_text(dumped)
    (run / 'vis_data/scalars.json').write_text(json.dumps({'accuracy/top1': 91.5, 'step': 100}))
    (run / f'{run.name}.log').write_text('    GPU number: 4\n')

    results = tmp_path / 'results.json'
    collected = command(monkeypatch, capsys, 'collect', tmp_path / 'work', '--import', 'food101', '--out', str(results))
    assert 'mona/food101 (swin_l_food101), done, differs from the published setting in 1 points' in collected
    TASKS.pop('food101')
    sys.modules.pop('food101')
    shown = command(monkeypatch, capsys, 'show', results, '--import', 'food101', '--task', 'food101')
    (line,) = [line for line in shown.splitlines() if line.startswith('mona ')]
    assert '91.50*' in line and '90.0' in line and '5,267,712' in line
    assert 'lr: 0.001 (published setting: 1.5625e-05)' in ' '.join(shown.split())
    assert 'The published number is an example' in shown
    planned = command(monkeypatch, capsys, 'plan', '--import', 'mona_mm', '--task', 'food101')
    assert planned.startswith('missing ') and 'swin_l_food101.py' in planned


def test_tasks_that_cannot_be(load_file):
    """A second task of one name, and a score that means something else to another task, are refused by name."""
    row = dict(config='x', model='X', trains_on=lambda model, dataset: False, training_data='X')
    with pytest.raises(ConfigError, match='a task coco already'):
        register_task(Task(name='coco', metrics={}, **row))
    with pytest.raises(ConfigError, match='accuracy/top1'):
        register_task(Task(name='new', metrics={'top1': Metric('top-1', {'accuracy/top1': 100})}, **row))
    assert 'new' not in TASKS


class Tiny(BaseModel):
    """A backbone with a method, as a model that a Runner trains."""

    def __init__(self):
        super().__init__()
        self.backbone = PeftBackbone(base=dict(type='mmdet.SwinTransformer', **SWIN), peft=dict(type='Mona'))

    def forward(self, inputs, data_samples=None, mode='loss'):
        x = torch.stack(inputs)
        return dict(loss=sum(out.square().mean() for out in self.backbone(x)))


def test_a_hook(load_file, tmp_path):
    """The hook of the page, in a Runner, logs the norm of what the method trains."""
    load_file('method_norm_hook.py')
    model = Tiny()
    model.backbone.init_weights()
    loader = torch.utils.data.DataLoader(
        [dict(inputs=torch.randn(3, 32, 32))] * 2, batch_size=2, collate_fn=pseudo_collate
    )
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        custom_hooks=[dict(type='MethodNormHook')],
        experiment_name='hook',
    )
    runner.train()
    expected = sum(p.square().sum() for m in method_modules(model) for p in m.parameters()).sqrt()
    assert runner.message_hub.get_scalar('train/method_norm').current() == pytest.approx(expected.item(), rel=1e-6)
