"""What lies behind a backbone's last output does not train, and is said to."""

import pytest
import torch
from conftest import HOSTS
from torch import nn

import mona_mm
from mona_mm.errors import ConfigError
from mona_mm.frozen.count import count_trainable
from mona_mm.frozen.reach import unreached
from mona_mm.frozen.rules import check_trainable, freeze
from mona_mm.registry import MODELS

EARLY = {name: dict(host, out_indices=(1,) if 'vit' in name else (0, 1)) for name, host in HOSTS.items()}


def without_gradient(backbone: nn.Module) -> set[str]:
    """By a real backward pass."""
    backbone.eval()
    outputs = backbone(torch.randn(1, 3, 64, 64))
    sum(output.sum() for output in outputs).backward()
    return {name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize('name', HOSTS)
def test_what_gets_no_gradient_does_not_train(name, monkeypatch):
    """On every host: a method's modules behind the last output are frozen, those before it train and get a gradient;
    the log says so, and the record knows."""
    base = dict(type='Mona', bottleneck=4)
    said = []
    monkeypatch.setattr('mona_mm.frozen.rules.print_log', lambda message, **_: said.append(message))
    backbone = mona_mm.PeftBackbone(base=dict(EARLY[name]), peft=base, trainable='norm')
    assert [f'after the last output of {type(backbone).__name__}' in message for message in said] == [True]
    assert without_gradient(backbone) == set()
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert (
        0 < sum('.peft.' in name for name in trains) < sum('.peft.' in name for name, _ in backbone.named_parameters())
    )
    check_trainable(backbone)
    assert count_trainable(backbone).trainable == sum(backbone.get_parameter(name).numel() for name in trains)
    freeze(nn.ModuleDict(dict(backbone=backbone)), 'none')  # once more, around it


@pytest.mark.parametrize('name', HOSTS)
def test_all_that_gets_no_gradient_is_found(name):
    backbone = MODELS.build(dict(EARLY[name]))
    backbone.train()
    before = {path: m.training for path, m in backbone.named_modules()}
    random = torch.get_rng_state()
    found = unreached(backbone)
    assert torch.equal(torch.get_rng_state(), random)
    assert before == {path: m.training for path, m in backbone.named_modules()}
    assert found == without_gradient(backbone) and found


@pytest.mark.parametrize('name', HOSTS)
def test_nothing_is_behind_the_last_stage(name):
    backbone = MODELS.build(dict(HOSTS[name]))
    assert unreached(backbone) == set()


@pytest.mark.parametrize('rule', ['partial_1', 'stages.3', 'stages.2.blocks.0.norm1', ['bias', 'stages.3.blocks.0']])
def test_a_rule_that_reaches_no_output_is_refused(rule):
    """Also where another rule beside it does."""
    with pytest.raises(ConfigError, match=r'SwinTransformer \(out_indices=\(0, 1\)\).*stages'):
        mona_mm.PeftBackbone(base=dict(EARLY['mmdet-swin']), trainable=rule)


def test_stock_modules():
    """Of a ResNet, alone or in a model, as of a supported host."""
    resnet = dict(type='mmdet.ResNet', depth=18, out_indices=(0, 1))
    with pytest.raises(ConfigError, match=r"trainable='layer3'.*ResNet.*layer3\.0"):
        mona_mm.FrozenModel(base=dict(resnet), trainable='layer3')
    model = nn.ModuleDict(dict(backbone=MODELS.build(dict(resnet)), head=nn.Linear(2, 2)))
    freeze(model, ['backbone', 'head'])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert 'backbone.layer2.0.conv1.weight' in trains and 'head.weight' in trains
    assert not any('layer3' in name or 'layer4' in name for name in trains)
    model = nn.ModuleDict(dict(backbone=MODELS.build(dict(resnet)), head=nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"'backbone\.layer3'.*last output of ResNet \(out_indices=\(0, 1\)\)"):
        freeze(model, 'backbone.layer3')
    with pytest.raises(ConfigError, match="'last_block'.*ModuleDict.*PeftBackbone.*begin with backbone, head"):
        freeze(model, 'partial_1')


def test_modules_in_common_are_left_as_they_are():
    """A layer that is used twice has its parameters still, and reaches the output from one of its places."""
    backbone = MODELS.build(dict(type='mmdet.ResNet', depth=18, out_indices=(0,), frozen_stages=-1, norm_eval=False))
    conv = backbone.layer1[0].conv1
    backbone.layer1[1].conv2 = backbone.layer1[0].conv2 = conv
    backbone.layer2[1].conv2.weight = backbone.layer2[1].conv1.weight
    before = {name: (id(p), p.device) for name, p in backbone.named_parameters(remove_duplicate=False)}
    found = unreached(backbone)
    assert before == {name: (id(p), p.device) for name, p in backbone.named_parameters(remove_duplicate=False)}
    assert found == without_gradient(backbone) and 'layer2.1.conv1.weight' in found
    assert 'layer1.0.conv1.weight' not in found


def test_a_method_all_of_which_is_behind(tmp_path):
    """A plan of SPT for the last stage only, where the outputs end before it."""
    peft = dict(type='SPT', structured=dict(type='LoRA', rank=2), plan={'stages.3.blocks.0': ['q']})
    mona_mm.PeftBackbone(base=dict(HOSTS['mmdet-swin']), peft=peft)
    with pytest.raises(ConfigError, match=r'SwinTransformer.*out_indices.*stages\.3'):
        mona_mm.PeftBackbone(base=dict(EARLY['mmdet-swin']), peft=peft)


def test_shared_modules_keep_their_tensors():
    """A module that is in two places, and a parameter of two modules: looked at once, and theirs afterwards."""
    backbone = MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=8, out_indices=(0, 1)))
    first, second = backbone.layer1
    second.conv1, second.conv2.weight = first.conv1, first.conv2.weight
    backbone.layer4[1].conv1 = backbone.layer4[0].conv2
    before = dict(backbone.named_parameters(remove_duplicate=False))
    found = unreached(backbone)
    assert found == {
        name for name, p in backbone.named_parameters() if p.requires_grad and name[:6] in ('layer3', 'layer4')
    }
    assert all(p is before[name] for name, p in backbone.named_parameters(remove_duplicate=False))
