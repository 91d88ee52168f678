"""DINOv2: its names in three repositories, registers, SwiGLU, images that are no multiples of the patch."""

import re

import pytest
import torch
from conftest import ROOT
from helpers import assert_equal, assert_near
from mmengine.registry import MODELS

from mona_mm import PeftBackbone
from mona_mm.checkpoint import convert_state_dict
from mona_mm.checkpoint.convert import recognise
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.frozen.activations import training_size
from mona_mm.hosts import find_host
from mona_mm.type_names import enter_scope

TINY = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
PLAIN = dict(type='mona_mm.DINOv2', arch=TINY, img_size=56)
KINDS = {
    'plain': PLAIN,
    'registers': dict(PLAIN, num_registers=4),
    'swiglu': dict(PLAIN, layer_cfgs=dict(ffn_type='swiglu_fused')),
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(KINDS[kind])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def to_meta(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmpretrain's names in those of Meta's repository, with the token that stands for masked patches."""
    names = (
        (r'^layers\.', 'blocks.'),
        (r'\.ln(\d)\.', r'.norm\1.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
        (r'\.ffn\.(w\d+)\.', r'.mlp.\1.'),
        (r'\.attn\.gamma1\.weight', '.ls1.gamma'),
        (r'\.ffn\.gamma2\.weight', '.ls2.gamma'),
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^ln1\.', 'norm.'),
    )
    renamed = {'mask_token': torch.zeros(1, 24)}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's: with registers the class token has its position added, and SwiGLU is a wide ``fc1``."""
    meta = to_meta(state)
    del meta['mask_token']
    renamed = {name.replace('.w12.', '.fc1.').replace('.w3.', '.fc2.'): t for name, t in meta.items()}
    if 'register_tokens' in renamed:
        renamed['reg_token'] = renamed.pop('register_tokens')
        renamed['cls_token'] = renamed['cls_token'] + renamed['pos_embed'][:, :1]
        renamed['pos_embed'] = renamed['pos_embed'][:, 1:]
    return renamed


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's: three linear layers in the place of ``qkv``."""
    renamed = {}
    for name, tensor in to_meta(state).items():
        name = re.sub(r'^blocks\.', 'encoder.layer.', name).replace('.attn.proj.', '.attention.output.dense.')
        name = name.replace('.ls1.gamma', '.layer_scale1.lambda1').replace('.ls2.gamma', '.layer_scale2.lambda1')
        name = name.replace('.w12.', '.weights_in.').replace('.w3.', '.weights_out.')
        name = re.sub(r'^norm\.', 'layernorm.', name)
        name = re.sub(r'^(cls_token|register_tokens|mask_token)$', r'embeddings.\1', name)
        name = name.replace('patch_embed.proj', 'embeddings.patch_embeddings.projection')
        name = 'embeddings.position_embeddings' if name == 'pos_embed' else name
        if '.attn.qkv.' in name:
            for part, piece in zip(('query', 'key', 'value'), tensor.chunk(3), strict=True):
                renamed[name.replace('.attn.qkv.', f'.attention.attention.{part}.')] = piece
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize('library', [to_meta, to_timm, to_hugging_face])
@pytest.mark.parametrize('kind', KINDS)
def test_names(kind, library, tmp_path):
    """A file of each repository loads: every tensor is where it was, and the outputs are the same."""
    source = build(kind)
    given = library(source.state_dict())
    assert recognise(given) in ('vit', 'vit-huggingface')
    converted = convert_state_dict(given)
    assert converted.keys() == source.state_dict().keys()
    torch.save(given, tmp_path / 'base.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    model = PeftBackbone(base=dict(KINDS[kind], init_cfg=init_cfg), trainable='none')
    model.init_weights()
    x = torch.randn(1, 3, 56, 56)
    model.eval()
    source.eval()
    assert_near(model(x)[0], source(x)[0])


@pytest.mark.parametrize('kind', KINDS)
def test_names_of_a_training(kind, tmp_path):
    """Meta's training writes the teacher alone, with its heads, and with blocks in groups."""
    source = build(kind)
    given = {re.sub(r'^blocks\.(\d+)\.', r'blocks.\1.\1.', name): t for name, t in to_meta(source.state_dict()).items()}
    teacher = {**{f'backbone.{name}': t for name, t in given.items()}, 'dino_head.mlp.0.weight': torch.ones(2, 2)}
    torch.save(dict(teacher=teacher), tmp_path / 'teacher_checkpoint.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'teacher_checkpoint.pth'))
    model = PeftBackbone(base=dict(KINDS[kind], init_cfg=init_cfg), trainable='none')
    model.init_weights()
    loaded = model.state_dict()
    assert_equal({name: loaded[name] for name in source.state_dict()}, source.state_dict())


def test_a_name_that_is_lost_is_refused():
    """Of a model with other modules nothing is left out in silence."""
    given = to_meta(build('plain').state_dict())
    given['blocks.0.attn.q_norm.weight'] = torch.ones(12)
    with pytest.raises(CheckpointMismatchError, match=r'q_norm'):
        convert_state_dict(given)


def test_registers_take_part_and_have_no_place():
    """The tokens of the patches attend to the registers; without any attention to them, nothing of them is left."""
    model = build('registers').double()
    model.eval()
    x = torch.randn(2, 3, 60, 75, dtype=torch.float64)  # padded to 5 x 6 patches
    (out,) = model(x)
    assert out.shape == (2, 24, 5, 6)
    torch.nn.init.normal_(model.register_tokens)
    assert not torch.allclose(model(x)[0], out)
    # Registers alone, formed by hand: the layers see cls, 4 registers, 30 patches.
    tokens, hw = model.patch_embed(x)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model(x)
    assert hw == (5, 6) and seen[0].shape == (2, 1 + 4 + 30, 24)
    assert_near(seen[0][:, 1:5], model.register_tokens.expand(2, -1, -1))


def test_layers_by_negative_indices():
    """A tuple as in mmengine's configs, counted from the end as Python does."""
    backbone = MODELS.build(dict(PLAIN, out_indices=(-2, -1)))
    last = MODELS.build(dict(PLAIN, out_indices=-1))
    last.load_state_dict(backbone.state_dict())
    image = torch.randn(1, 3, 28, 42)
    outputs = backbone(image)
    assert len(outputs) == 2
    assert_equal(outputs[1].detach(), last(image)[0].detach())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='s'), "arch='s' must be 'small', 'base', 'large', 'giant' or a dict"),
        (dict(num_registers=-1), 'num_registers=-1 must be a whole number of at least 0'),
        (dict(out_indices=(9,)), r'out_indices=\(9,\) must be indices of the \d layers'),
        (dict(out_type='map'), "out_type='map' must be 'featmap'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        MODELS.build(dict(PLAIN, **options))


@pytest.mark.parametrize('kind', KINDS)
def test_methods(kind):
    """Every kind is a host: its sites, and gradients for each module."""
    for peft in (
        dict(type='Mona', bottleneck=4),
        dict(type='LoRA', rank=2, sites=['q', 'v', 'fc1', 'fc2']),
        dict(type='Adapter', bottleneck=4),
    ):
        model = PeftBackbone(base=KINDS[kind], peft=peft)
        for name, p in model.named_parameters():
            if '.peft.' in name:
                torch.nn.init.normal_(p, std=0.1)
        model(torch.randn(2, 3, 60, 70))[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        assert len(find_host(model).blocks(model)) == 2


def test_parameters_of_the_small_one():
    """LoRA of rank 16 on q, k and v of DINOv2-S: 12 layers of 3 times 16 (384 + 384)."""
    from mona_mm.nn.meta import meta_device

    base = dict(type='mona_mm.DINOv2', arch='small')
    with meta_device():
        model = PeftBackbone(base=base, peft=dict(type='LoRA', rank=16, sites=['q', 'k', 'v']))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert trained == 12 * 3 * 16 * 768
    assert total - trained == 22_056_192  # of the published file, without the token of masked patches


CONFIGS = [
    ('cascade_dinov2_b_coco', 768, 12),
    ('upernet_dinov2_b_ade20k', 768, 12),
    ('retinanet_dinov2_s_voc', 384, 12),
]


@pytest.mark.parametrize('method', ['mona', 'lora', 'full'])
@pytest.mark.parametrize(('task', 'width', 'depth'), CONFIGS)
def test_configs(task, width, depth, method):
    """The shipped files: what trains in the backbone, and strides that are those of the pyramid."""
    name = task if method == 'mona' else f'{method}_{task}'
    cfg = load_config(str(ROOT / f'configs/{method}/{name}.py'))
    adapt_to_device(cfg)
    model = build_on_meta(cfg)
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    expected = dict(
        mona=depth * 2 * ((2 * 64 + 5) * width + 64 * 64 + 88 * 64),
        lora=depth * 2 * 16 * (width + width),
        full=sum(p.numel() for p in model.backbone.parameters()),
    )
    assert trained == expected[method]
    if 'upernet' in name:
        assert cfg.model.decode_head.in_channels == [256] * 4
        return
    strides = [14 / scale for scale in cfg.model.neck.scales]
    head = cfg.model.rpn_head if 'cascade' in name else cfg.model.bbox_head
    given = head.anchor_generator.strides
    assert given == [strides[0] * 2**level for level in range(cfg.model.neck.num_outs)]
    assert given[: len(strides)] == strides
    if 'cascade' in name:
        assert cfg.model.roi_head.bbox_roi_extractor.featmap_strides == strides
        assert cfg.model.roi_head.mask_roi_extractor.featmap_strides == strides


def test_the_late_config():
    """Mona in six of twelve layers, and what that does not keep for the backward pass."""
    cfg = load_config(str(ROOT / 'configs/mona/upernet_dinov2_b_ade20k_last6.py'))
    adapt_to_device(cfg)
    model = build_on_meta(cfg)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert {int(name.split('.')[1]) for name in trained} == set(range(6, 12))
    count = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert count == 6 * 2 * ((2 * 64 + 5) * 768 + 64 * 64 + 88 * 64)
    assert training_size(cfg) == (518, 518)


def test_a_detector_trains_and_predicts():
    """RetinaNet over a narrow DINOv2, on an image whose sides are no multiples of the patch: losses, gradients of the
    method and the pyramid, boxes within the image."""
    cfg = load_config(str(ROOT / 'configs/mona/retinanet_dinov2_s_voc.py'))
    adapt_to_device(cfg)
    cfg.model.backbone.base.update(arch=TINY, init_cfg=None, img_size=56)
    cfg.model.backbone.peft.bottleneck = 8
    cfg.model.neck.update(in_channels=24, out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    enter_scope(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    # Here, since it needs mmdet's testing helpers alone.
    from mmdet.testing import demo_mm_inputs

    batch = demo_mm_inputs(2, [(3, 100, 75), (3, 90, 90)], use_box_type=False, num_classes=20)
    data = model.data_preprocessor(batch, True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    assert len(results) == 2
    assert all((each.pred_instances.bboxes <= 110).all() for each in results)
