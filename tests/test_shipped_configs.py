"""A few configs that mmdet and mmseg ship, one or two for each operator of mmcv that they need, made small.

``tests/shipped_configs.py`` runs them all. Here a backbone has an eighth of its channels and an image 96 pixels a side.
"""

import functools
import logging

import pytest
from mmengine.config import Config
from shipped_configs import (
    attempt,
    build_model,
    classify_peft,
    installed_configs,
    order,
    outline,
    own_sizes,
    plain,
    run_model,
    run_with_peft,
    scaled_down,
    without_pretrained,
)

ext = pytest.importorskip('mmcv._ext', reason='mmcv is compiled, and has no CPU form of some of these operators')
if not ext.__file__.endswith('.py'):
    pytest.skip('mmcv is compiled, and has no CPU form of some of these operators', allow_module_level=True)

SIDE = 96
DCN = ('deform_conv_forward', 'deform_conv_backward_input', 'deform_conv_backward_parameters')
MASKED = ('masked_im2col_forward', 'masked_col2im_forward')
DCN_V2 = ('modulated_deform_conv_forward', 'modulated_deform_conv_backward')
DEFORM_POOL = ('deform_roi_pool_forward', 'deform_roi_pool_backward')

# library, config, the operators that it must call
CASES = [
    ('mmdet', 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco', (*DCN, 'roi_align_forward', 'roi_align_backward', 'nms')),
    ('mmdet', 'dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco', DCN_V2),
    ('mmdet', 'dyhead/atss_r50_fpn_dyhead_1x_coco', DCN_V2),
    ('mmdet', 'detectors/cascade-rcnn_r50-sac_1x_coco', DCN),
    ('mmdet', 'reppoints/reppoints-moment_r50_fpn_1x_coco', DCN),
    ('mmdet', 'vfnet/vfnet_r50_fpn_1x_coco', DCN),
    ('mmdet', 'tood/tood_r50_fpn_1x_coco', DCN[:2]),  # weights are constants
    ('mmdet', 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco', DCN),
    (
        'mmdet',
        'guided_anchoring/ga-retinanet_r50_fpn_1x_coco',
        (*DCN, *MASKED),
    ),
    ('mmdet', 'carafe/faster-rcnn_r50_fpn-carafe_1x_coco', ('carafe_forward', 'carafe_backward')),
    ('mmdet', 'dcn/faster-rcnn_r50_fpn_dpool_1x_coco', DEFORM_POOL),
    ('mmdet', 'dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco', DEFORM_POOL),
    ('mmdet', 'pisa/faster-rcnn_r50_fpn_pisa_1x_coco', ('nms_match',)),
    ('mmdet', 'faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco', ('softnms',)),
    ('mmseg', 'psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512', ('psamask_forward', 'psamask_backward')),
]


def narrow(config, channels: int = 64):
    """The config with 256 channels, and 1,024 of a fully connected layer, replaced by a few."""
    if isinstance(config, (list, tuple)):
        return type(config)(narrow(item, channels) for item in config)
    if not isinstance(config, dict):
        return config
    return {
        key: channels if key.endswith('channels') and value in (256, 1024) else narrow(value, channels)
        for key, value in config.items()
    }


def shrunk(config: dict) -> dict:
    """The config with an eighth of the channels in its ResNet, and with few in what follows it."""
    config = narrow(without_pretrained(config))
    config['backbone']['base_channels'] = 8
    channels = [32, 64, 128, 256]
    neck = config.get('neck')
    for part in neck if isinstance(neck, list) else [neck] if neck else []:
        if part['type'].startswith('FPN'):
            part['in_channels'] = channels
    for key, number in (('decode_head', 3), ('auxiliary_head', 2)):
        if key in config:
            config[key].update(in_channels=channels[number], channels=16)
    if config.get('decode_head', {}).get('type') == 'PSAHead':
        config['decode_head']['mask_size'] = (9, 9)
    if 'roi_head' in config:
        # On a small image there are few boxes, and with random weights none that is sure of its class.
        config['train_cfg']['rcnn'] = few(config['train_cfg']['rcnn'])
        config['test_cfg']['rcnn']['score_thr'] = 0.0
        config = scaled_down(config, most=50)
    return config


def few(rcnn):
    """The training settings of a RoI head, or of each of its stages, with eight samples an image."""
    if isinstance(rcnn, (list, tuple)):
        return [few(stage) for stage in rcnn]
    sampler = dict(rcnn['sampler'], num=8)
    if sampler['type'] == 'ScoreHLRSampler':
        sampler['score_thr'] = 0.0
    return dict(rcnn, sampler=sampler)


@pytest.mark.parametrize(('library', 'name', 'operators'), CASES, ids=[name.split('/')[1] for _, name, _ in CASES])
def test_a_shipped_config_trains_and_predicts(library, name, operators, monkeypatch):
    called = set()

    def watched(operator, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            called.add(operator)
            return function(*args, **kwargs)

        return call

    logging.getLogger('mmengine').setLevel(logging.ERROR)  # it would log how each weight is initialised
    for operator in operators:
        monkeypatch.setattr(ext, operator, watched(operator, getattr(ext, operator)))
    path = installed_configs(library) / 'configs' / f'{name}.py'
    config = shrunk(Config.fromfile(path).model.to_dict())
    model = build_model(library, config, (SIDE, SIDE))
    result = run_model(model, config, (SIDE, SIDE))
    assert result['finite'] and result['loss'] > 0
    assert result['with_gradient'] >= 0.8 * result['trained'], 'most of the model had no part in the loss'
    assert called == set(operators)


def test_what_makes_two_configs_one_model():
    """The sweep runs a config once for all that build the same model; their outline leaves out the numbers only."""
    first = dict(type='A', init_cfg=dict(type='Pretrained', checkpoint='x'), depth=50, stages=(True, False))
    second = dict(type='A', pretrained='y', depth=50, stages=[True, False])
    third = dict(type='A', depth=101, stages=[True, False])
    models = [plain(without_pretrained(config)) for config in (first, second, third)]
    for model in models:
        model.pop('init_cfg', None), model.pop('pretrained', None)
    assert models[0] == models[1] != models[2]
    assert outline(models[0]) == outline(models[2]) != outline(dict(models[2], stages=[True, True]))
    kept = without_pretrained(dict(init_cfg=[dict(type='Pretrained', checkpoint='x'), dict(type='Xavier')]))
    assert kept == dict(init_cfg=[dict(type='Xavier')])


def test_a_model_is_given_its_own_size_at_last():
    assert own_sizes(dict(data_preprocessor=dict(size=(512, 1024)))) == [
        (64, 64),
        (128, 128),
        (224, 224),
        (320, 320),
        (512, 512),
    ]
    assert own_sizes(dict(backbone=dict(img_size=384))) == [(64, 64), (384, 384)]


def test_what_runs_first():
    """One of each type, folder, family and outline, then the others; of an outline the smallest model."""

    def entry(model, outline, family, magnitude, type='t'):
        return dict(model=model, outline=outline, family=family, magnitude=magnitude, type=type)

    index = {
        'configs/a/large.py': entry('m1', 'o1', 'f1', 9),
        'configs/a/small.py': entry('m2', 'o1', 'f1', 3),
        'configs/a/same.py': entry('m2', 'o1', 'f1', 3),
        'configs/a/arch.py': entry('m3', 'o2', 'f1', 1),
        'configs/a/other.py': entry('m4', 'o3', 'f3', 1),
        'configs/b/alone.py': entry('m5', 'o4', 'f4', 7),
        'configs/a/type.py': entry('m6', 'o6', 'f6', 1, type='u'),
        'configs/b/broken.py': dict(error='no model in it'),
    }
    a = 'configs/a/'
    rest = [[f'{a}other.py'], [f'{a}arch.py']]
    assert order(index, []) == [[f'{a}small.py', f'{a}type.py'], ['configs/b/alone.py'], *rest, [f'{a}large.py']]
    assert order(index, [f'{a}large.py']) == [[f'{a}type.py'], ['configs/b/alone.py'], *rest, [f'{a}small.py']]


SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 2),
        window_size=4,
        frozen_stages=1,
    ),
    decode_head=dict(type='FCNHead', in_channels=64, channels=8, in_index=3, num_classes=3, num_convs=1),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)


STDC = dict(
    stdc_type='STDCNet1', in_channels=3, channels=(8, 8, 8, 8, 64), bottleneck_type='cat', norm_cfg=dict(type='BN')
)


@pytest.mark.parametrize(
    ('method', 'changes', 'kind'),
    [
        ('Mona', {}, 'passed'),
        ('LoRA', {}, 'passed'),
        ('LoRA', dict(type='ResNetV1c', depth=50, base_channels=2), 'refused'),
        ('Mona', dict(type='STDCNet', **STDC), 'not a host'),
    ],
)
def test_a_config_with_a_method(method, changes, kind):
    """Every backbone is put into a PeftBackbone; what then fails is told apart."""
    if changes:
        config = dict(SEGMENTOR, backbone=changes, decode_head=dict(SEGMENTOR['decode_head'], in_channels=64))
    else:
        config = SEGMENTOR
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    found = attempt(lambda: run_with_peft('mmseg', config, method, (64, 64), ''), timeout=60)
    assert classify_peft(dict(outcome='passed', peft={method: found}), method)[0] == kind, found
    if kind == 'passed':
        assert found['method_with_gradient'] == found['method'] > 0 and found['finite']
