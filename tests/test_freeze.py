"""Rules select what they say, frozen means frozen, and counts are right."""

import copy
import pickle

import pytest
import torch
from conftest import HOSTS
from mmengine.registry import MODELS
from torch import nn

from mona_mm import FrozenModel, PeftBackbone, count_trainable
from mona_mm.errors import ConfigError, FreezeError
from mona_mm.frozen.rules import METHOD_RULES, check_trainable, freeze, select
from mona_mm.hosts import find_host

RESNET = dict(type='mmdet.ResNet', depth=18, norm_eval=False)
HEAD = dict(type='mmseg.FCNHead', in_channels=512, channels=8, num_classes=2)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize('kind', ['all', 'none'])
def test_all_and_none(host, kind):
    model = PeftBackbone(base=host, trainable=kind)
    assert trainable(model) == (names(model) if kind == 'all' else set())


def test_bias_is_bitfit(host):
    """Every bias, relative-position bias tables included, and nothing else."""
    model = PeftBackbone(base=host, trainable='bias')
    expected = {n for n in names(model) if n.endswith(('.bias', '_bias', 'relative_position_bias_table'))}
    assert trainable(model) == expected
    if host['type'].endswith('.SwinTransformer'):
        assert any('table' in n for n in expected)


def test_norm_is_norm_tuning(host):
    """Every parameter of a LayerNorm, patch-embedding and output norms included."""
    model = PeftBackbone(base=host, trainable='norm')
    layer_norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert trainable(model) == {f'{n}.{p}' for n in layer_norms for p in ('weight', 'bias')}


def test_last_block_is_partial_1(host):
    model = PeftBackbone(base=host, trainable='last_block')
    blocks = find_host(model).blocks(model)
    prefix = f'{list(blocks)[-1]}.'
    assert prefix in ('stages.3.blocks.0.', 'layers.2.', 'stages.3.0.', 'layers.3.1.0.')
    assert trainable(model) == {n for n in names(model) if n.startswith(prefix)}


@pytest.mark.parametrize(('published', 'rule'), METHOD_RULES.items())
def test_published_names_of_rules(published, rule):
    """The tables' names select the same and are what reports say."""
    by_name, by_rule = (PeftBackbone(base=HOSTS['mmdet-swin'], trainable=r) for r in (published, rule))
    assert trainable(by_name) == trainable(by_rule)
    assert count_trainable(by_name).method == count_trainable(by_rule).method == published


def test_paths_types_and_lists():
    """Module paths and module types, alone and together; a parameter's own path selects that parameter."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], trainable=['stages.3', 'Conv2d', 'norm0.weight'])
    expected = {n for n in names(model) if n.startswith('stages.3.')}
    expected |= {'patch_embed.projection.weight', 'patch_embed.projection.bias', 'norm0.weight'}
    assert trainable(model) == expected


def test_path_does_not_match_a_longer_name():
    """`layer1` is not `layer10`: a path is a path, not a prefix of letters."""
    model = nn.Module()
    model.layer1, model.layer10 = nn.Linear(2, 2), nn.Linear(2, 2)
    assert select(model, 'layer1') == {'layer1.weight', 'layer1.bias'}


@pytest.mark.parametrize(
    ('rule', 'suggestion'), [('stages.4', "'stages.3'"), ('LayerNom', "'LayerNorm'"), ('xyz', 'patch_embed')]
)
def test_rule_that_matches_nothing(rule, suggestion):
    with pytest.raises(ConfigError, match=f'(?s)trainable={rule!r}[^.]* SwinTransformer.*{suggestion}'):
        PeftBackbone(base=HOSTS['mmdet-swin'], trainable=[rule])


@pytest.mark.parametrize('rules', [5, [], [None], ['norm', 3]])
def test_what_is_no_rule(rules):
    with pytest.raises(ConfigError, match='must be a rule or a list of rules'):
        PeftBackbone(base=HOSTS['mmdet-swin'], trainable=rules)


def test_rules_add_to_a_method():
    """Under a method the rules choose among the base's parameters; the method's always train."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'), trainable='last_block')
    method = {n for n in names(model) if '.peft.' in n}
    last = {n for n in names(model) if n.startswith('stages.3.blocks.0.')}
    assert trainable(model) == method | last


def test_frozen_batch_norm_keeps_its_statistics():
    """A frozen BatchNorm stays in eval mode through `.train()` and its statistics do not move; a trained one's do."""
    model = FrozenModel(base=RESNET, trainable='layer4')
    model.train()
    before = {name: b.clone() for name, b in model.named_buffers() if 'running_mean' in name}
    model(torch.randn(2, 3, 64, 64))
    moved = {name for name, b in model.named_buffers() if name in before and not torch.equal(b, before[name])}
    assert moved == {name for name in before if name.startswith('layer4.')}
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin.bn1.training and twin.layer4[0].bn1.training
    model.eval()
    assert not model.layer4[0].bn1.training


def test_frozen_model_takes_a_neck_and_a_whole_detector():
    """Any module of a config: one neck; a detector of which the heads alone train, a PeftBackbone's method besides."""
    neck = FrozenModel(
        base=dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=2), trainable='fpn_convs'
    )
    assert trainable(neck) == {n for n in names(neck) if n.startswith('fpn_convs.')}

    detector = dict(
        type='mmdet.RetinaNet',
        backbone=dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=dict(type='Mona')),
        neck=dict(type='mmdet.FPN', in_channels=[24, 48, 96, 192], out_channels=8, num_outs=5),
        bbox_head=dict(
            type='mmdet.RetinaHead',
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            anchor_generator=dict(
                type='mmdet.AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=3,
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='mmdet.L1Loss'),
        ),
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
    )
    model = FrozenModel(base=detector, trainable=['bbox_head', 'backbone'])
    assert trainable(model) == {n for n in names(model) if n.startswith('bbox_head.') or '.peft.' in n}


def test_freeze_never_unfreezes():
    """What a host fixed by itself (position embeddings, frozen_stages) no rule makes trainable."""
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    freeze(model, 'all')
    assert trainable(model) == {'weight'}


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_stay_frozen(clone):
    """A copy keeps its own frozen BatchNorms in eval mode."""
    twin = clone(FrozenModel(base=RESNET, trainable='layer4'))
    twin.train()
    assert not twin.bn1.training and twin.layer4[0].bn1.training


def test_rule_that_can_train_nothing():
    """A rule whose parameters the host itself keeps frozen would train nothing: refused, naming frozen_stages."""
    with pytest.raises(ConfigError, match=r"trainable='layer1' selects only .*frozen_stages=1"):
        FrozenModel(base=dict(RESNET, frozen_stages=1), trainable=['layer1', 'layer4'])
    with pytest.raises(ConfigError, match="trainable='norm0' .*PeftBackbone"):
        FrozenModel(
            base=dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=dict(type='Mona')),
            trainable='norm0',
        )


def test_rules_for_a_part_of_a_model():
    """The part whose frozen_stages keeps a rule from training anything is named, and the rules of hosts are refused
    where the model itself is none."""
    parts = dict(type='mmseg.EncoderDecoder', backbone=dict(RESNET, frozen_stages=2), decode_head=HEAD)
    with pytest.raises(ConfigError, match=r"trainable='backbone.layer2' .*frozen_stages=2 of backbone or by the"):
        FrozenModel(base=parts, trainable='backbone.layer2')
    for rule in ('output_norms', 'last_block'):
        with pytest.raises(ConfigError, match=f"trainable='{rule}' .*EncoderDecoder is none.*by a PeftBackbone"):
            FrozenModel(base=parts, trainable=rule)


def test_change_after_the_build_is_found():
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'))
    check_trainable(model)
    model.norm0.weight.requires_grad = True
    with pytest.raises(FreezeError, match=r'1 parameters.*norm0\.weight \(trains\)'):
        check_trainable(model)


def test_counts_and_table():
    """Parts add up; the two percentages are of the base and of base and method."""
    model = nn.Module()
    model.backbone = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'))
    model.neck = nn.Linear(3, 4)
    model.head = nn.Linear(4, 5)
    freeze(model.neck, 'none')
    count = count_trainable(model)
    base = sum(p.numel() for p in MODELS.build(HOSTS['mmdet-swin']).parameters())
    widths = [len(block.norm1.weight) for stage in model.backbone.stages for block in stage.blocks]
    method = sum(2 * ((2 * 64 + 5) * width + 64 * 64 + 88 * 64) for width in widths)
    assert {p.part: (p.trainable, p.total) for p in count.parts} == {
        'backbone base': (0, base),
        'method (Mona)': (method, method),
        'neck': (0, 16),
        'head': (25, 25),
    }
    assert (count.total, count.trainable) == (base + method + 16 + 25, method + 25)
    assert (count.backbone_total, count.backbone_trainable, count.method) == (base + method, method, 'Mona')
    lines = count.table().splitlines()
    shares = f'{method:,} = {100 * method / base:.2f}% of the base, {100 * method / (base + method):.2f}% of base and'
    assert shares in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1, 'columns are aligned'
