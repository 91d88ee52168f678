"""The list of backbones says what find_host says of each."""

import copy

import pytest
import torch
from conftest import HOSTS
from declared_hosts import DECLARED, VARIANTS
from mmengine.registry import MODELS

from mona_mm import PeftBackbone
from mona_mm.catalogue.hosts import LIBRARIES, backbone_rows, render_hosts
from mona_mm.errors import UnsupportedHostError
from mona_mm.hosts import REFUSED, find_host, method_modules, method_names
from mona_mm.nn.meta import meta_device


def test_every_backbone_is_listed():
    """Each class once, hosts with sites, the others with a reason."""
    rows = backbone_rows()
    assert len({(row.library, row.name) for row in rows}) == len(rows) > 100
    assert {row.library for row in rows} == set(LIBRARIES)
    assert all(bool(row.sites) != bool(row.reason) for row in rows)
    assert len(render_hosts(rows).splitlines()) == len(rows) + 5


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['common', 'all'])
def test_the_sites_are_those_of_the_hosts(whole):
    """Backbones that are built have no other sites than their class, and each of its sites is in one of them."""
    rows = {(row.library, row.name): row for row in backbone_rows()}
    found: dict[tuple[str, str], set[str]] = {}
    common = [base for name, base in DECLARED.items() if whole or name not in VARIANTS]
    for base in (*HOSTS.values(), *common):
        with meta_device():
            model = MODELS.build(copy.deepcopy(base))
        key = type(model).__module__.partition('.')[0], type(model).__name__
        found.setdefault(key, set()).update(find_host(model).sites)
    listed = {key: set(rows[key].sites) for key in found}
    assert listed == found if whole else all(found[key] <= listed[key] for key in found)


def test_no_backbone_is_merely_not_declared():
    """Each has its sites or the reason why it can have none, but for timm's, which are of any class."""
    undeclared = [row.name for row in backbone_rows() if row.reason.startswith('not declared')]
    assert set(undeclared) <= {'TIMMBackbone'}
    assert all(reason.isascii() and not reason.endswith('.') for reason in REFUSED.values())


def test_a_refusal_says_why():
    """What the list says of a class is what a config with it is told."""
    base = dict(type='mmpretrain.ShuffleNetV2', widen_factor=0.5)
    with pytest.raises(UnsupportedHostError, match='ShuffleNetV2 is not a supported host: its units concatenate'):
        PeftBackbone(base=base, peft=dict(type='Mona'))


RESNET = dict(type='mmseg.ResNetV1c', base_channels=8, norm_eval=False)
AROUND = {
    'BiSeNetV1': dict(
        type='mmseg.BiSeNetV1',
        context_channels=(16, 32, 64),
        spatial_channels=(8, 8, 8, 16),
        out_channels=16,
        backbone_cfg=dict(RESNET, depth=18),
    ),
    'ICNet': dict(
        type='mmseg.ICNet',
        layer_channels=(64, 256),
        light_branch_middle_channels=8,
        psp_out_channels=16,
        out_channels=(8, 8, 16),
        backbone_cfg=dict(RESNET, depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)),
    ),
}


@pytest.mark.parametrize('name', AROUND)
def test_a_method_in_the_backbone_within_a_backbone(name):
    """What the refusal of a backbone around another one advises works."""
    base = copy.deepcopy(AROUND[name])
    with pytest.raises(UnsupportedHostError, match=r'backbone_cfg.*mona_mm\.PeftBackbone'):
        PeftBackbone(base=copy.deepcopy(base), peft=dict(type='Mona', bottleneck=4))
    peft = dict(type='Mona', bottleneck=4)
    base['backbone_cfg'] = dict(type='mona_mm.PeftBackbone', base=base['backbone_cfg'], peft=peft)
    model = MODELS.build(base)
    assert method_modules(model)
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    assert method_names(model) <= {name for name, p in model.named_parameters() if p.grad is not None}
