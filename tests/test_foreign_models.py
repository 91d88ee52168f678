"""The wrapper of transformers' models, and detectors and segmentors around it and around timm's."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from foreign_hosts import FOREIGN, HUGGING_FACE, INSTALLED, build, image, installed, names, register_small_models
from helpers import assert_near
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError
from mona_mm.hosts import find_host, method_modules
from mona_mm.nn.meta import meta_device

needs_transformers = installed('hf')


@pytest.fixture(autouse=True, scope='module')
def small_models_of_timm():
    if INSTALLED['timm']:
        register_small_models()


@needs_transformers
def test_options_of_hfbackbone(monkeypatch):
    """Indices count layers from 0, sizes are padded, and nothing asks the hub on its own."""
    base = HUGGING_FACE['hf-dinov2']
    both, last = build(base), build(base, out_indices=(-1,))
    last.load_state_dict(both.state_dict())
    assert both.out_indices == (0, 1) and last.out_indices == (1,)
    assert torch.equal(last(image())[0], both(image())[1])
    assert [tuple(out.shape) for out in both(image(50, 70))] == [(2, 24, 4, 5)] * 2
    for out_indices in ((1, 0), (2,), (0, 0), (-3,), ()):
        with pytest.raises(ConfigError, match='must be different indices of the 2 layers'):
            build(base, out_indices=out_indices)
    with pytest.raises(ConfigError, match='needs a model_type'):
        build(base, config=dict(hidden_size=24))
    with pytest.raises(ConfigError, match='transformers refuses config='):
        build(base, config=dict(model_type='dinov9'))
    with pytest.raises(ConfigError, match='no backbone for config='):
        build(base, config=dict(model_type='bert'))
    with pytest.raises(ConfigError, match='ConvNextV2Backbone has no activation checkpoints'):
        build(HUGGING_FACE['hf-convnextv2'], with_cp=True)
    with pytest.raises(ConfigError, match=r'takes images of \(64, 64\) alone'):
        build(HUGGING_FACE['hf-hiera'])(image(96, 64))
    asked = []
    monkeypatch.setattr('transformers.AutoConfig.from_pretrained', lambda *args, **kwargs: asked.append(args))
    with pytest.raises(ConfigError, match='no file or folder here.*allow_download=True'):
        build(base, config='facebook/dinov2-small')
    assert not asked


@needs_transformers
@pytest.mark.parametrize('name', ['hf-dinov3', 'hf-swin', 'hf-dinov2'])
def test_with_cp_of_hfbackbone(name):
    """transformers' checkpoints around the blocks change no gradient, in training mode."""
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = PeftBackbone(base=dict(HUGGING_FACE[name], with_cp=with_cp), peft=dict(type='Mona', bottleneck=4))
        model.train()
        torch.manual_seed(1)
        sum(out.square().mean() for out in model(image())).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_near(gradients[1], gradients[0])


@pytest.mark.parametrize('name', names(('timm-dinov3', 'timm-caformer', 'timm-swin-list')))
def test_checkpoints_of_timm(name):
    """timm's own activation checkpoints, around blocks or stages, change no gradient of a method."""
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = PeftBackbone(base=copy.deepcopy(FOREIGN[name]), peft=dict(type='Mona', bottleneck=4))
        for module in model.modules():
            if checkpoints and hasattr(module, 'grad_checkpointing'):
                module.grad_checkpointing = True
        model.train()
        sum(out.square().mean() for out in model(image())).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_near(gradients[1], gradients[0])


def detector(backbone: dict, neck: dict | list, strides: list[int]) -> nn.Module:
    init_default_scope('mmdet')
    return MODELS.build(
        ConfigDict(
            type='mmdet.RetinaNet',
            data_preprocessor=dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32),
            backbone=backbone,
            neck=neck,
            bbox_head=dict(
                type='mmdet.RetinaHead',
                num_classes=2,
                in_channels=16,
                stacked_convs=1,
                feat_channels=16,
                anchor_generator=dict(
                    type='mmdet.AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=strides,
                ),
                bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
            ),
            train_cfg=dict(
                assigner=dict(type='mmdet.MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            test_cfg=dict(
                nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10
            ),
        )
    )


PLAIN = ('timm-dinov3', 'timm-vit-registers', 'hf-dinov3', 'hf-dinov2')
PYRAMIDS = {
    'timm-swin': [8, 16, 32, 64],
    'timm-convnext': [8, 16, 24, 32],
    'timm-pvt': [8, 16, 24, 32],
    'timm-focalnet': [8, 16, 32, 64],
    'timm-caformer': [32, 32, 64, 64],
    'hf-swin': [8, 16, 32, 64],
    'hf-convnextv2': [8, 16, 24, 32],
}


@pytest.mark.parametrize('name', names((*PLAIN, *PYRAMIDS)))
def test_in_a_detector(name):
    """A loss with gradients of the method, and boxes."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    base = copy.deepcopy(FOREIGN[name])
    if name in PLAIN:
        base['out_indices'] = (1,)
        neck, strides = dict(type='mona_mm.SimpleFeaturePyramid', in_channels=24, out_channels=16), [4, 8, 16, 32]
    else:
        neck = dict(type='mmdet.FPN', in_channels=PYRAMIDS[name], out_channels=16, num_outs=4)
        strides = [4, 8, 16, 32]
    model = detector(dict(type='mona_mm.PeftBackbone', base=base, peft=dict(type='Mona', bottleneck=4)), neck, strides)
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 64), pad_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1))
    )
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))
    model.train()
    losses = model.loss(image()[:1], [sample])
    sum(sum(loss) if isinstance(loss, list) else loss for loss in losses.values()).backward()
    method = [p for n, p in model.backbone.named_parameters() if '.peft.' in n]
    assert method and all(p.grad is not None for p in method)
    assert all(p.grad is None for n, p in model.backbone.named_parameters() if '.peft.' not in n)
    model.eval()
    with torch.no_grad():
        assert len(model.predict(image()[:1], [sample])[0].pred_instances) > 0


@pytest.mark.parametrize('name', names(('timm-dinov3', 'timm-swin', 'hf-dinov2', 'hf-swin')))
def test_in_a_segmentor(name):
    """UperNet over maps of every stage, or of layers of a plain model brought to four scales."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    base, channels = copy.deepcopy(FOREIGN[name]), PYRAMIDS.get(name, [16] * 4)
    model = MODELS.build(
        ConfigDict(
            type='mmseg.EncoderDecoder',
            data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(64, 64)),
            backbone=dict(type='mona_mm.PeftBackbone', base=base, peft=dict(type='LoRA', rank=2)),
            neck=None
            if name in PYRAMIDS
            else dict(type='mona_mm.SimpleFeaturePyramid', in_channels=24, out_channels=16, scales=(4, 2), num_outs=4),
            decode_head=dict(
                type='mmseg.UPerHead',
                in_channels=channels,
                in_index=[0, 1, 2, 3],
                channels=16,
                pool_scales=(1, 2),
                dropout_ratio=0.0,
                num_classes=3,
                norm_cfg=dict(type='BN'),
                align_corners=False,
                loss_decode=dict(type='mmseg.CrossEntropyLoss'),
            ),
            test_cfg=dict(mode='whole'),
        )
    )
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, 64, 64)))
    sample.set_metainfo(dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
    losses = model.loss(image(), [sample, sample])
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    assert all((p.grad is not None) == ('.peft.' in n) for n, p in model.backbone.named_parameters())
    model.eval()
    with torch.no_grad():
        assert model.predict(image(), [sample, sample])[0].pred_sem_seg.data.shape == (1, 64, 64)


PAGE = (ROOT / 'docs/backbones.md').read_text()
CONFIGS = dict(re.findall(r'```python\n# (\S+\.py)\n(.*?)```', PAGE, re.DOTALL))


@pytest.mark.parametrize(
    ('name', 'block'),
    [
        pytest.param('retinanet_dinov3_s_voc.py', 'EvaBlock', marks=installed('timm')),
        pytest.param('upernet_hf_swin_t_ade20k.py', 'SwinLayer', marks=installed('hf')),
    ],
)
def test_the_configs_of_the_page(name, block, tmp_path, monkeypatch):
    """They build, with Mona in every block."""
    (tmp_path / 'mona').mkdir()
    (tmp_path / '_base_').symlink_to(ROOT / 'configs/_base_')
    (tmp_path / 'mona' / name).write_text(CONFIGS[name])
    monkeypatch.chdir(tmp_path)
    if 'hf' in name:
        from transformers import SwinConfig

        SwinConfig().save_pretrained(tmp_path / 'data/swin-tiny-patch4-window7-224')
    config = load_config(str(tmp_path / 'mona' / name))
    init_default_scope(config.default_scope)
    with meta_device():
        model = MODELS.build(config.model)
    host = find_host(model.backbone)
    assert host.specs[0].cls.endswith(f'.{block}') and len(host.blocks(model.backbone)) == 12
    assert len(method_modules(model.backbone)) == 24
