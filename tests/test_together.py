"""Where two parts of the package meet: several methods and deltas, layers in blocks, freezing around freezing."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import HOSTS
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

import mona_mm
from mona_mm import FrozenModel, PeftBackbone, PeftModel, count_trainable
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.frozen.reach import unreached
from mona_mm.spt_plans.plans import find_spt

MSCAN = dict(type='mmseg.MSCAN', embed_dims=[8] * 4, depths=[1] * 4, mlp_ratios=[2] * 4, norm_cfg=dict(type='SyncBN'))
RESNET = dict(type='mmdet.ResNet', depth=50, base_channels=8, frozen_stages=-1, norm_eval=False)
DARKNET = dict(type='mmdet.CSPDarknet', deepen_factor=0.33, widen_factor=0.125, out_indices=(2, 3))


@MODELS.register_module()
class Around(nn.Module):
    """A model around a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.backbone(x)


@MODELS.register_module()
class MeanTeacher(nn.Module):
    """A student and its frozen copy, as mmdet's semi-supervised detectors have them."""

    def __init__(self, detector):
        super().__init__()
        self.student, self.teacher = MODELS.build(detector), MODELS.build(detector)
        self.teacher.requires_grad_(False)


def test_a_delta_knows_which_of_several_methods_is_in_which_blocks(tmp_path):
    """Two methods of equal shapes in exchanged blocks have tensors of the same names, but not the same outputs."""

    def build(first: float, second: float) -> nn.Module:
        one, two = (dict(type='LoRA', rank=2, alpha=alpha) for alpha in (first, second))
        torch.manual_seed(0)
        model = PeftBackbone(
            base=HOSTS['mmpretrain-vit'], peft=[dict(one, blocks=':1'), dict(two, blocks='1:', name='late')]
        )
        model.init_weights()
        return model

    torch.manual_seed(0)
    file = str(tmp_path / 'a.delta.safetensors')
    mona_mm.save_delta(build(1.0, 64.0), file)
    mona_mm.load_delta(build(1.0, 64.0), file)
    with pytest.raises(CheckpointMismatchError, match='another method'):
        mona_mm.load_delta(build(64.0, 1.0), file)


def test_replaced_modules_of_a_block_that_has_layers_of_a_peft_model():
    """The hooks of the layers are not taken for the block's own, which are found missing and put back."""
    torch.manual_seed(0)
    backbone = dict(type='mona_mm.PeftBackbone', base=MSCAN, peft=dict(type='Mona', bottleneck=4))
    model = PeftModel(
        base=dict(type='Around', backbone=backbone), targets=[dict(path='backbone.**.fc1', type='LoRA', rank=2)]
    ).eval()
    hooks = [len(m._forward_hooks) for m in model.modules() if 'Linear' in type(m).__name__ or 'fc1' in str(type(m))]
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    revert_sync_batchnorm(model)
    model.train().eval()
    assert all(map(torch.equal, model(x), expected))
    after = [len(m._forward_hooks) for m in model.modules() if 'Linear' in type(m).__name__ or 'fc1' in str(type(m))]
    assert after == hooks


def test_a_stem_of_pixels_in_the_channels_ends_early_as_any_other():
    """CSPDarknet's first convolution has 12 channels of 3: its last stage, which no output sees, does not train."""
    backbone = PeftBackbone(base=DARKNET, peft=dict(type='Mona', bottleneck=4))
    assert not unreached(backbone)
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trains and not any(name.startswith('stage4.') for name in trains)
    outputs = backbone.train()(torch.randn(2, 3, 64, 64))
    sum(out.sum() for out in outputs).backward()
    assert all(backbone.get_parameter(name).grad is not None for name in trains)


def test_a_teacher_is_not_given_layers_of_its_own():
    base = dict(type='MeanTeacher', detector=dict(type='Around', backbone=RESNET))
    with pytest.raises(ConfigError, match=r'teacher in this MeanTeacher follows student.*detector='):
        PeftModel(base=base, targets=[dict(path='student.**.conv1', type='LoRA', rank=2)])


def test_merging_frees_what_two_layers_of_freezing_have_frozen():
    inner = dict(
        type='mona_mm.PeftModel',
        base=dict(type='Around', backbone=RESNET),
        targets=[dict(path='backbone.layer1.**.conv1', type='LoRA', rank=2)],
        trainable=['head'],
    )
    model = FrozenModel(base=inner, trainable=['head'])
    assert not model.backbone.conv1.weight.requires_grad
    mona_mm.merge(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_target_of_which_nothing_trains_is_in_the_table():
    """It is behind the last output of the backbone, and the table says so by a 0 beside its pattern."""
    paths = [f'{layer}.**.conv1' for layer in ('layer4', 'layer1')]
    model = PeftModel(
        base=dict(RESNET, out_indices=(0, 1, 2)), targets=[dict(path=path, type='LoRA', rank=2) for path in paths]
    )
    table = count_trainable(model).table()
    for path in paths:
        (row,) = [line for line in table.splitlines() if line.startswith(f'method (LoRA: {path})')]
        assert (row.split()[-3] == '0') == path.startswith('layer4')


PLANNED = """
default_scope = 'mmdet'
model = dict(
    type='mona_mm.PeftModel',
    base=dict(
        type='mmdet.RetinaNet',
        backbone=dict(
            type='mona_mm.PeftBackbone',
            base=dict(type='mmdet.SwinTransformer', embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
            peft=[dict(type='LoRA', rank=2), dict(type='SPT', budget=500)],
        ),
        neck=dict(type='mmdet.FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
        bbox_head=dict(
            type='mmdet.RetinaHead',
            num_classes=2,
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(
                type='mmdet.AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
        ),
    ),
    targets=[dict(path='neck.**.conv', type='LoRA', rank=2)],
)
"""


def test_tools_on_a_backbone_within_a_peft_model(tmp_path, capsys, monkeypatch):
    """SPT without a plan, in a list within a PeftModel: it is found with its path, and the rest is counted."""
    file = tmp_path / 'planned.py'
    file.write_text(PLANNED)
    path, _, spt = find_spt(Config.fromfile(file))
    assert path == 'model.base.backbone.peft.1' and spt['budget'] == 500
    monkeypatch.setattr('sys.argv', ['count_params.py', str(file), '--json'])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[1] / 'tools/count_params.py'))['main']()
    (row,) = json.loads(capsys.readouterr().out)
    assert row['method'] == 'LoRA+SPT' and row['budget'] == 500 and row['trainable'] is None
    methods = 2 * 2 * (2 * 16 + 2 * 32 + 2 * 64 + 2 * 128)  # LoRA of rank 2 at q and v of each stage's one block
    without = Config.fromfile(file).model.base.backbone.base
    assert row['backbone_total'] == methods + sum(p.numel() for p in MODELS.build(without).parameters())
