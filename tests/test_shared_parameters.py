"""Modules that share parameters: each is stored, counted, frozen and optimised once, and stays one."""

import copy
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from safetensors import safe_open
from torch import nn

import mona_mm
from mona_mm import count_trainable, load_delta, save_delta
from mona_mm.checkpoint.delta import changing
from mona_mm.checkpoint.delta_file import read_delta, write_delta
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.commands.cli import build_runner
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.frozen.rules import freeze, select
from mona_mm.methods import StreamModule
from mona_mm.optim.constructor import PeftOptimWrapperConstructor
from mona_mm.registry import METHODS

SWIN = dict(
    type='mmdet.SwinTransformer', embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), out_indices=(1, 2, 3)
)
FILE = 'x.delta.safetensors'


def rtmdet(share_conv=True):
    """mmdet's RTMDet, whose levels share convolutions, but not norms, by default."""
    head = dict(
        type='mmdet.RTMDetSepBNHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=2,
        share_conv=share_conv,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(type='mmdet.MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type='mmdet.DistancePointBBoxCoder'),
        with_objectness=False,
    )
    neck = dict(type='mmdet.CSPNeXtPAFPN', in_channels=[32, 64, 128], out_channels=8, num_csp_blocks=1)
    backbone = dict(type='mona_mm.PeftBackbone', base=dict(SWIN), peft=dict(type='Mona', bottleneck=4))
    model = dict(type='mmdet.RTMDet', backbone=backbone, neck={**neck, 'norm_cfg': dict(type='BN')}, bbox_head=head)
    train_cfg = dict(assigner=dict(type='mmdet.DynamicSoftLabelAssigner', topk=3), allowed_border=-1, pos_weight=-1)
    return MODELS.build(dict(**model, train_cfg=train_cfg, test_cfg=dict(nms_pre=10)))


@MODELS.register_module()
class SharingModel(BaseModel):
    """Every kind of sharing: a module under two names, a parameter of two modules, one tensor behind two parameters,
    overlapping views, a buffer, a view that is not contiguous, and parts of the model that share."""

    def __init__(self, tied=True):
        super().__init__()
        self.backbone = mona_mm.FrozenModel(base=dict(type='Pair'), trainable='none')
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = nn.Sequential(self.first[0], nn.BatchNorm1d(4)) if tied else nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4)
        )  # fmt: skip
        self.embedding = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        whole = torch.randn(8, 4)
        self.part_a, self.part_b = nn.Parameter(whole[:6]), nn.Parameter(whole[2:])
        self.same = nn.Parameter(self.part_a.data)
        self.crooked = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer('scale', torch.ones(2))
        if tied:
            self.head.weight = self.embedding.weight
            self.first.register_buffer('scale', self.scale)

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        x = self.head(self.embedding(self.second(self.first(self.backbone(x)))))
        x = x + self.part_a.sum() + self.part_b.sum() + self.crooked.sum()
        return dict(loss=x.square().mean()) if mode == 'loss' else x


@MODELS.register_module()
class Pair(nn.Sequential):
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            one = nn.Linear(4, 4)
            super().__init__(OrderedDict(a=one, b=nn.Linear(4, 4), again=one))


SHARED = {'second.0.weight', 'second.0.bias', 'head.weight', 'first.scale', 'same'}


def places(model):
    """Which names are which memory."""
    return {name: (t.data_ptr(), t.shape) for name, t in model.state_dict().items()}


def partition(model):
    """The names that are one tensor, together."""
    together = {}
    for name, place in places(model).items():
        together.setdefault(place, set()).add(name)
    return sorted(map(sorted, together.values()))


@pytest.mark.parametrize('many', [False, True], ids=['small', 'large'])
def test_a_tensor_is_stored_once(many, tmp_path):
    """And comes back under all its names, into one memory again; so do views of one memory, and what is written once
    more (as the hook does it to add the metrics) is the same."""
    model = SharingModel()
    if many:
        model.register_parameter('large', nn.Parameter(torch.randn(300000)))
    save_delta(model, tmp_path / FILE)
    delta = read_delta(tmp_path / FILE)
    assert set(delta.header.shared) == SHARED and set(delta.tensors) == changing(model) > SHARED
    stored = sum(t.nbytes for name, t in delta.tensors.items() if name not in SHARED)
    assert (tmp_path / FILE).stat().st_size < stored + 4000
    write_delta(tmp_path / f'again.{FILE}', delta.header, delta.tensors)
    torch.manual_seed(5)
    for file in (FILE, f'again.{FILE}'):
        fresh = SharingModel()
        if many:
            fresh.register_parameter('large', nn.Parameter(torch.zeros(300000)))
        before, shares = places(fresh), partition(fresh)
        loaded = load_delta(fresh, tmp_path / file)
        assert places(fresh) == before and partition(fresh) == shares == partition(model)
        actual = fresh.state_dict()
        assert all(torch.equal(actual[name], tensor) for name, tensor in model.state_dict().items())
        own = {id(p): p for p in model.parameters() if p.requires_grad}
        values = sum(p.numel() for p in own.values()) - model.same.numel() + model.scale.numel()
        values += sum(2 * 4 + 1 for _ in ('first', 'second'))  # statistics
        assert sum(loaded.parts.values()) == values


def test_one_delta_after_the_other(tmp_path):
    """The second puts back what the first changed and it does not hold: of a shared tensor, too."""
    model = SharingModel()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.add_(1)
    for name, tensor in model.backbone.state_dict().items():
        tensor.copy_(before[f'backbone.{name}'])
    save_delta(model, tmp_path / FILE)
    head = tmp_path / f'head.{FILE}'
    save_delta(model, head, parts=['embedding'])
    fresh = SharingModel()
    fresh.load_state_dict(before)
    load_delta(fresh, tmp_path / FILE)
    load_delta(fresh, head)
    actual = fresh.state_dict()
    assert torch.equal(actual['head.weight'], model.head.weight)
    wrong = {n for n, t in before.items() if not torch.equal(actual[n], t)} - {'embedding.weight', 'head.weight'}
    assert not wrong


def test_tied_and_untied(tmp_path):
    """What was one tensor fits a model where it is two; what was two different ones fits none where it is one."""
    tied, untied = SharingModel(), SharingModel(tied=False)
    save_delta(untied, tmp_path / FILE, parts=['first', 'second', 'embedding', 'head'])
    with pytest.raises(CheckpointMismatchError, match='second.0.weight and first.0.weight'):
        load_delta(tied, tmp_path / FILE)
    save_delta(tied, tmp_path / FILE, parts=['second', 'embedding', 'head'])
    load_delta(untied, tmp_path / FILE)
    assert torch.equal(untied.second[0].weight, tied.first[0].weight)
    assert torch.equal(untied.head.weight, tied.embedding.weight) and untied.head.weight is not tied.head.weight


def test_frozen_and_shared(tmp_path):
    """The fingerprint takes them under all their names: a change under one is seen."""
    model = SharingModel()
    save_delta(model, tmp_path / FILE)
    other = SharingModel()
    with torch.no_grad():
        other.backbone.again.weight[0, 0] += 1
    with pytest.raises(CheckpointMismatchError, match='another frozen base.*2 of 6.*backbone.a.weight'):
        load_delta(other, tmp_path / FILE)


def test_rules_find_every_name():
    """A rule may name what is shared by any of its names; it is one parameter, under its first."""
    model = SharingModel()
    assert select(model, 'second.0.weight') == select(model, 'first.0.weight') == {'first.0.weight'}
    assert select(model, 'second') == {'first.0.weight', 'first.0.bias', 'second.1.weight', 'second.1.bias'}
    assert select(model, 'head') == {'embedding.weight'}
    freeze(model, ['second', 'head'])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == select(model, ['second', 'head'])
    with pytest.raises(ConfigError, match='trainable='):
        select(model, 'third')


def test_counts_and_optimizer():
    """A shared parameter counts once, in the first part that has it, and is optimised once, whatever the options."""
    model = SharingModel()
    count = count_trainable(model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert {part.part: part.total for part in count.parts}['second'] == 8
    for paramwise in (None, dict(bias_decay_mult=0.0), dict(custom_keys={'first': dict(lr_mult=0.5)})):
        config = dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1))
        optimizer = PeftOptimWrapperConstructor(config, paramwise)(model).optimizer
        given = [id(p) for group in optimizer.param_groups for p in group['params']]
        assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@DATASETS.register_module()
class SharedVectors(torch.utils.data.Dataset):
    METAINFO = metainfo = {}

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(inputs=torch.full((4,), float(i)))


def test_a_run(tmp_path):
    """Training, with an average, to the end; the delta is the whole checkpoint's state, whose names are all there."""
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='SharedVectors'), sampler=dict(type='DefaultSampler'))
    hooks = ['mona_mm.ParamFreezeHook', 'mona_mm.LoadCheckHook', 'mona_mm.DeltaCheckpointHook', 'EMAHook']
    runner = build_runner(
        Config(
            dict(
                model=dict(type='SharingModel'),
                work_dir=str(tmp_path),
                train_dataloader=loader,
                train_cfg=dict(by_epoch=True, max_epochs=1),
                optim_wrapper=dict(
                    constructor='mona_mm.PeftOptimWrapperConstructor', optimizer=dict(type='SGD', lr=0.01)
                ),
                custom_hooks=[dict(type=hook) for hook in hooks],
                experiment_name='shared',
                log_level='ERROR',
            )
        )
    )
    runner.train()
    whole = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    fresh = SharingModel()
    load_delta(fresh, tmp_path / f'epoch_1.{FILE.partition(".")[2]}')
    assert whole.keys() == fresh.state_dict().keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize('share', [True, False])
def test_rtmdet(share, tmp_path):
    """mmdet's detector whose head shares by default: its delta is smaller by what is shared, and gives it back."""
    model = rtmdet(share)
    save_delta(model, tmp_path / FILE)
    delta = read_delta(tmp_path / FILE)
    convs = [name for name in delta.header.shared if '_convs.' in name and name.endswith('.conv.weight')]
    assert len(convs) == (2 * 2 * 2 if share else 0)  # two branches, two layers, the second and third level
    torch.manual_seed(1)
    fresh = rtmdet(share)
    fresh.backbone.load_state_dict(model.backbone.state_dict())
    load_delta(fresh, tmp_path / FILE)
    actual = fresh.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in model.state_dict().items())
    head = fresh.bbox_head
    assert (head.cls_convs[0][0].conv.weight is head.cls_convs[2][0].conv.weight) == share
    assert count_trainable(model).total == sum(p.numel() for p in model.parameters())


def test_a_backbone_that_is_used_twice(tmp_path):
    """With a method in it: saved, loaded and merged under both its names, once."""
    model = nn.Module()
    model.backbone = mona_mm.PeftBackbone(base=dict(SWIN), peft=dict(type='LoRA', rank=2))
    model.siamese = nn.ModuleDict(dict(left=model.backbone))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora' in name or '.peft.' in name:
                p.normal_()
    save_delta(model, tmp_path / FILE)
    delta = read_delta(tmp_path / FILE)
    assert all('.peft.' in name for name in delta.tensors)
    assert {name.replace('siamese.left', 'backbone') for name in delta.header.shared} < set(delta.tensors)
    state = merged_state_dict(model)
    alone = merged_state_dict(model.backbone)
    for path in ('backbone', 'siamese.left'):
        assert all(torch.equal(state[f'{path}.{name}'], tensor) for name, tensor in alone.items())
    assert not any('.peft.' in name for name in state)


class CommonScale(StreamModule):
    """A factor of every block, times one that all blocks of a width have in common."""

    sites = ('post_ffn',)
    needs_grid = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.common = nn.Parameter(torch.ones(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.ones_(self.common)

    @classmethod
    def share(cls, modules) -> None:
        first = {}
        for module in (module for of_block in modules.values() for module in of_block.values()):
            module.common = first.setdefault(len(module.common), module.common)

    def forward(self, x, hw):
        return x * self.scale * self.common


@pytest.fixture
def common_scale():
    METHODS.register_module(module=CommonScale)
    yield
    METHODS.module_dict.pop('CommonScale')


def test_a_method_shares_parameters_between_its_blocks(tmp_path, common_scale):
    """Counted, stored and trained once, and still one in a copy, after a delta, and after re-initialisation."""
    base = dict(SWIN, depths=(1, 2, 1, 1))
    cfg = dict(type='mona_mm.PeftBackbone', base=base, peft=dict(type='CommonScale'))
    model = MODELS.build(cfg)
    model.init_weights()
    start = copy.deepcopy(model)
    assert count_trainable(model).backbone_trainable == (16 + 2 * 32 + 64 + 128) + (16 + 32 + 64 + 128)

    model(torch.randn(1, 3, 32, 32))[-1].square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 10.0).step()
    save_delta(model, tmp_path / FILE)
    with safe_open(tmp_path / FILE, 'pt') as file:
        assert sum(name.endswith('.common') for name in file.keys()) == 4  # noqa: SIM118, it is no dict

    load_delta(start, tmp_path / FILE)
    for each in (start, copy.deepcopy(start)):
        blocks = each.stages[1].blocks
        assert blocks[0].peft.post_ffn.common is blocks[1].peft.post_ffn.common
        assert torch.equal(blocks[1].peft.post_ffn.common, model.stages[1].blocks[0].peft.post_ffn.common)
    assert not torch.equal(start.stages[1].blocks[0].peft.post_ffn.common, torch.ones(32))
