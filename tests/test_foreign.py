"""timm's and transformers' models as backbones: their checkpoints, the places of the sites, and models around them."""

import copy
import json
import re
from collections.abc import Iterable

import pytest
import torch
from conftest import ROOT
from foreign_hosts import FOREIGN, HUGGING_FACE, INSTALLED, TIMM, installed, register_small_models
from helpers import assert_equal, assert_near
from mmengine.registry import MODELS, init_default_scope
from suite import check_delta, check_merge
from torch import nn

import mona_mm
from mona_mm import PeftBackbone
from mona_mm.checkpoint.pretrained import load_pretrained
from mona_mm.errors import CheckpointMismatchError, ConfigError, MissingFileError
from mona_mm.hosts import HOSTS, find_host, sites_of
from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS

needs_timm = installed('timm')
needs_transformers = installed('hf')


@pytest.fixture(autouse=True, scope='module')
def small_models_of_timm():
    if INSTALLED['timm']:
        register_small_models()


def build(base: dict, **more) -> nn.Module:
    model = MODELS.build({**copy.deepcopy(base), **more})
    model.eval()
    return model


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> None:
    """Values that no initialisation gives, so that what is not loaded shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def names(chosen: Iterable[str]) -> list:
    return [pytest.param(name, marks=installed(name)) for name in chosen]


# Checkpoints


def plain_timm(name: str) -> nn.Module:
    """The model of timm alone, with a classifier."""
    import timm

    options = {key: value for key, value in TIMM[name].items() if key not in ('type', 'features_only', 'feature_cls')}
    model = timm.create_model(options.pop('model_name'), **{k: v for k, v in options.items() if k != 'out_indices'})
    randomise(model)
    return model.eval()


@pytest.mark.parametrize('name', names(TIMM))
def test_a_checkpoint_of_timm(name, tmp_path):
    """Its names are those of the model with a classifier, and the backbone then computes that model's maps."""
    plain = plain_timm(name)
    torch.save(plain.state_dict(), tmp_path / 'timm.pth')
    backbone = PeftBackbone(
        base=dict(TIMM[name], init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))),
        peft=dict(type='LoRA', rank=2, sites=['fc1', 'fc2']),
    )
    backbone.init_weights()
    backbone.eval()
    indices = TIMM[name].get('out_indices', (0, 1, 2, 3))
    with torch.no_grad():
        maps = plain.forward_intermediates(image(), indices=list(indices), intermediates_only=True)
        outs = [out.permute(0, 3, 1, 2) if name == 'timm-swin-list' else out for out in backbone(image())]
    assert_near(outs, list(maps))


@needs_timm
def test_a_checkpoint_of_a_deeper_model_is_refused(tmp_path):
    """What the backbone has left out is dropped, and nothing else."""
    torch.save(plain_timm('timm-vit').state_dict(), tmp_path / 'timm.pth')
    base = {key: value for key, value in TIMM['timm-vit'].items() if key != 'out_indices'}
    pruned = build(base, out_indices=(0,))
    load_pretrained(pruned, str(tmp_path / 'timm.pth'))
    with pytest.raises(CheckpointMismatchError, match=r'unexpected: timm_model\.model\.blocks\.1'):
        load_pretrained(build(base, depth=1, out_indices=(0,)), str(tmp_path / 'timm.pth'))
    with pytest.raises(CheckpointMismatchError, match=r'missing: timm_model\.model\.blocks\.2'):
        load_pretrained(build(base, depth=3, out_indices=(2,)), str(tmp_path / 'timm.pth'))
    with pytest.raises(CheckpointMismatchError, match=r'other shapes: '):
        load_pretrained(build(base, mlp_ratio=3, out_indices=(0,)), str(tmp_path / 'timm.pth'))
    (swin := plain_timm('timm-swin')).layers[2].blocks.append(copy.deepcopy(swin.layers[2].blocks[0]))
    torch.save(swin.state_dict(), tmp_path / 'swin.pth')
    for name, path in (('timm-swin', r'model\.layers\.2'), ('timm-swin-list', 'layers_2')):
        with pytest.raises(CheckpointMismatchError, match='timm cannot read|unexpected: timm_model.' + path):
            load_pretrained(build(TIMM[name]), str(tmp_path / 'swin.pth'))


def hugging_face_folder(name: str, folder, **options) -> None:
    """A folder as the hub has it: of the model with a classifier where there is one, else of the model alone."""
    import transformers

    config = transformers.AutoConfig.for_model(**HUGGING_FACE[name]['config'])
    try:
        model = transformers.AutoModelForImageClassification.from_config(config)
    except ValueError:
        model = transformers.AutoModel.from_config(config)
    randomise(model)
    model.save_pretrained(folder, **options)


@pytest.mark.parametrize('name', names(HUGGING_FACE))
def test_a_folder_of_hugging_face(name, tmp_path):
    """Config and weights from one folder give the maps of transformers' own loading."""
    hugging_face_folder(name, tmp_path)
    indices = HUGGING_FACE[name]['out_indices']
    base = dict(type='mona_mm.HFBackbone', config=str(tmp_path), out_indices=indices)
    backbone = PeftBackbone(
        base=dict(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path))),
        peft=dict(type='LoRA', rank=2, sites=['fc1', 'fc2']),
    )
    torch.manual_seed(0)
    backbone.init_weights()
    backbone.eval()
    cls = type(build(base).hf_model)
    expected = cls.from_pretrained(str(tmp_path), out_features=[f'stage{i + 1}' for i in indices])
    with torch.no_grad():
        assert_equal(list(backbone(image())), list(expected(image()).feature_maps))
    stock = build(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.safetensors')))
    stock.init_weights()  # without this package's functions around it
    assert_near(list(stock(image())), list(backbone(image())))


@needs_transformers
def test_what_does_not_fit_of_hugging_face_is_refused(tmp_path):
    """Missing, unexpected and other shapes are named; a folder may be in parts, or hold nothing."""
    hugging_face_folder('hf-dinov2', tmp_path, max_shard_size='10KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    load_pretrained(build(HUGGING_FACE['hf-dinov2']), str(tmp_path))

    def other(**options):
        config = {**HUGGING_FACE['hf-dinov2']['config'], **options}
        return build(dict(HUGGING_FACE['hf-dinov2'], config=config, out_indices=(0,)))

    with pytest.raises(CheckpointMismatchError, match=r'missing: hf_model\.encoder\.layer\.2'):
        load_pretrained(other(num_hidden_layers=3), str(tmp_path))
    with pytest.raises(CheckpointMismatchError, match=r'unexpected: hf_model\.\S*encoder\.layer\.1'):
        load_pretrained(other(num_hidden_layers=1), str(tmp_path))
    with pytest.raises(
        CheckpointMismatchError, match=r'other shapes: \S*mlp.fc1.weight \(48, 24\) instead of \(72, 24\)'
    ):
        load_pretrained(other(mlp_ratio=3), str(tmp_path))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(MissingFileError, match=r'empty has no model\.safetensors'):
        load_pretrained(other(), str(tmp_path / 'empty'))
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=3)))
    with pytest.raises(CheckpointMismatchError, match='is no index'):
        load_pretrained(other(), str(tmp_path))


def meta(kind: str) -> dict[str, torch.Tensor]:
    """A checkpoint with the names and shapes of Meta's, of random values: two layers of width 24 and two heads."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    registers = 'storage_tokens' if 'dinov3' in kind else 'register_tokens'
    shapes: dict[str, tuple[int, ...]] = {'cls_token': (1, 1, 24), 'mask_token': (1, 24)}
    if 'registers' in kind or 'dinov3' in kind:
        shapes[registers] = (1, 4, 24)
    if 'dinov2' in kind:
        shapes['pos_embed'] = (1, 17, 24)
    shapes |= {'patch_embed.proj.weight': (24, 3, 16, 16), 'patch_embed.proj.bias': (24,)}
    linears = {'attn.qkv': (72, 24), 'attn.proj': (24, 24)}
    if 'plus' in kind:
        linears |= {'mlp.w1': (64, 24), 'mlp.w2': (64, 24), 'mlp.w3': (24, 64)}
    elif 'swiglu' in kind:
        linears |= {'mlp.w12': (128, 24), 'mlp.w3': (24, 64)}
    else:
        linears |= {'mlp.fc1': (48, 24), 'mlp.fc2': (24, 48)}
    for i in (0, 1):
        for name, shape in linears.items():
            shapes |= {f'blocks.{i}.{name}.weight': shape, f'blocks.{i}.{name}.bias': shape[:1]}
        for name in ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias', 'ls1.gamma', 'ls2.gamma'):
            shapes[f'blocks.{i}.{name}'] = (24,)
    shapes |= {'norm.weight': (24,), 'norm.bias': (24,)}
    tensors = {name: tensor(*shape) for name, shape in shapes.items()}
    if 'dinov3' in kind:
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(24)
        for i in (0, 1):
            tensors[f'blocks.{i}.attn.qkv.bias_mask'] = mask
            tensors[f'blocks.{i}.attn.qkv.bias'] *= mask
        tensors['rope_embed.periods'] = 100 ** (torch.arange(3) / 3.0)
    return tensors


_META = dict(embed_dim=24, depth=2, num_heads=2, img_size=64, patch_size=16, features_only=True, out_indices=(0,))
_LAYERS = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
_ARCH = dict(embed_dims=24, num_layers=2, num_heads=2)


def backbones_for_meta(kind: str) -> list[dict]:
    """Backbones of three libraries with the same architecture, whose first layer's map comes before any final norm."""
    dinov3, registers = 'dinov3' in kind, 4 if 'registers' in kind or 'dinov3' in kind else 0
    if dinov3:
        name = 'vit_small_plus_patch16_dinov3_qkvb' if 'plus' in kind else 'vit_small_patch16_dinov3_qkvb'
        options = dict(swiglu_align_to=8, mlp_ratio=64 / 24) if 'plus' in kind else dict(mlp_ratio=2)
        width = (
            dict(intermediate_size=64, use_gated_mlp=True, hidden_act='silu')
            if 'plus' in kind
            else dict(intermediate_size=48)
        )
        config = dict(model_type='dinov3_vit', num_register_tokens=4, rope_theta=100.0, **width)
        config['layer_norm_eps'] = 1e-5
    else:
        name = f'vit_{"giant" if "swiglu" in kind else "small"}_patch14{"_reg4" if registers else ""}_dinov2'
        # timm counts both halves of the SwiGLU, and transformers takes two thirds
        options = dict(mlp_ratio=128 / 24) if 'swiglu' in kind else dict(mlp_ratio=2)
        config = dict(model_type='dinov2_with_registers' if registers else 'dinov2', mlp_ratio=2)
        if 'swiglu' in kind:
            config |= dict(use_swiglu_ffn=True, mlp_ratio=4)
        config['layer_norm_eps'] = 1e-6
    found = [
        dict(type='mmseg.TIMMBackbone', model_name=name, pretrained=False, **_META, **options),
        dict(type='mona_mm.HFBackbone', config=dict(apply_layernorm=False, **config, **_LAYERS), out_indices=(0,)),
    ]
    if not dinov3:
        arch = dict(feedforward_channels=96 if 'swiglu' in kind else 48, **_ARCH)
        extra = dict(layer_cfgs=dict(ffn_type='swiglu_fused')) if 'swiglu' in kind else {}
        found.append(
            dict(
                type='mona_mm.DINOv2',
                arch=arch,
                num_registers=registers,
                img_size=64,
                patch_size=16,
                out_indices=[0],
                norm_cfg=dict(type='LN', eps=1e-6),
                **extra,
            )
        )
    return found


@needs_timm
@needs_transformers
@pytest.mark.parametrize('kind', ['dinov2', 'dinov2-registers', 'dinov2-swiglu', 'dinov3', 'dinov3-plus'])
def test_a_checkpoint_of_meta_gives_the_same_maps_in_every_library(kind, tmp_path):
    """Read by timm's conversion, by that for transformers and by that for mmpretrain: three independent ones."""
    torch.save(meta(kind), tmp_path / 'meta.pth')
    maps = []
    for base in backbones_for_meta(kind):
        model = build(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'meta.pth')))
        load_pretrained(model, str(tmp_path / 'meta.pth'))
        maps.append(model(image())[0])
    assert maps[0].abs().max() > 0.5
    for other in maps[1:]:
        assert_near(other, maps[0])


# Places


class Scale(StreamModule):
    """A map that is no addition of a constant."""

    sites = ('post_attn',)
    needs_grid = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def reset_parameters(self) -> None:
        pass

    def forward(self, x, hw):
        return x * self.scale + 0.1


@pytest.fixture
def scale_is_a_method():
    METHODS.register_module(module=Scale)
    yield
    METHODS.module_dict.pop('Scale')


def _vit(block, x, site):
    scale = (block.ls1, block.ls2) if hasattr(block, 'ls1') else (nn.Identity(), nn.Identity())
    u = site('post_attn', x + scale[0](block.attn(block.norm1(x))))
    return site('post_ffn', u + scale[1](block.mlp(block.norm2(u))))


def _metaformer(block, x, site):
    u = site('post_attn', block.res_scale1(x) + block.layer_scale1(block.token_mixer(block.norm1(x))))
    return site('post_ffn', block.res_scale2(u) + block.layer_scale2(block.mlp(block.norm2(u))))


def _swin(block, x, site):
    u = site('post_attn', x + block._attn(block.norm1(x)))
    return site('post_ffn', u + block.mlp(block.norm2(u)))


def _dinov2(block, x, site):
    u = site('post_attn', x + block.layer_scale1(block.attention(block.norm1(x))[0]))
    return site('post_ffn', u + block.layer_scale2(block.mlp(block.norm2(u))))


@pytest.mark.usefixtures('scale_is_a_method')
@pytest.mark.parametrize(
    ('name', 'formula', 'shape'),
    [
        pytest.param(name, formula, shape, marks=installed(name), id=name)
        for name, formula, shape in (
            ('timm-vit-registers', _vit, (2, 21, 24)),
            ('timm-eva02', _vit, (2, 17, 24)),
            ('timm-caformer', _metaformer, None),
            ('timm-swin', _swin, (2, 16, 16, 8)),
            ('hf-dinov2', _dinov2, (2, 17, 24)),
        )
    ],
)
def test_a_map_of_the_stream_against_a_plain_formula(name, formula, shape):
    """A module at both stream sites does what a formula for the block with it in its place says."""
    stock = build(FOREIGN[name])
    randomise(stock)
    model = PeftBackbone(base=copy.deepcopy(FOREIGN[name]), peft=dict(type='Scale', sites=['post_attn', 'post_ffn']))
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    for path, block in find_host(stock).blocks(stock).items():
        channels = sites_of(stock)[path]['post_ffn'].widths[0]
        size = shape or ((2, 16, channels) if hasattr(block.token_mixer, 'qkv') else (2, channels, 4, 4))
        if shape and shape[-1] != channels:
            continue  # of a later stage, with the same blocks
        x, module = torch.randn(size), Scale(channels)

        def site(name: str, x: torch.Tensor, module=module) -> torch.Tensor:
            return (
                module(x.movedim(1, -1), None).movedim(-1, 1) if x.shape[-1] != len(module.scale) else module(x, None)
            )

        with torch.no_grad():
            assert_near(model.get_submodule(path)(x), formula(block, x, site))


@pytest.mark.parametrize('name', names(FOREIGN))
def test_a_delta_and_a_merge(name, tmp_path):
    """A delta brings the method back on its base alone; LoRA merges into the stock weights."""
    host = find_host(build(FOREIGN[name]))
    sites = [site for site in ('q', 'k', 'v', 'proj', 'fc1', 'fc2') if site in host.sites]
    check_merge(FOREIGN[name], dict(type='LoRA', rank=2, sites=sites))
    check_delta(FOREIGN[name], dict(type='LoRand', inner=2, sites=['ffn_out']), tmp_path)


@pytest.mark.parametrize('name', names(('timm-hiera', 'hf-hiera')))
def test_hiera_refuses_convolutions(name):
    with pytest.raises(ConfigError, match=r'Mona reads the grid.*another order than that of the grid.s rows.*LoRA'):
        PeftBackbone(base=copy.deepcopy(FOREIGN[name]), peft=dict(type='Mona', bottleneck=4))


@needs_timm
def test_a_model_of_timm_that_is_not_declared():
    """find_host names what is supported; LoRA at sites that this model's blocks lack is refused."""
    with pytest.raises(ConfigError, match='LoRA cannot attach at q, v.*ConvNeXtBlock.*fc1, fc2'):
        PeftBackbone(base=copy.deepcopy(TIMM['timm-convnext']), peft=dict(type='LoRA'))


@needs_timm
def test_another_model_of_timm_takes_a_dozen_lines():
    """The declaration that docs/extending.md shows, of a model that is not in the list: its class and the sites."""
    page = (ROOT / 'docs/extending.md').read_text()
    source = re.search(r'```python\n# cait_blocks\.py\n(.*?)```', page, re.DOTALL)[1]
    statement = source[source.index('register_blocks(') :].strip()
    assert len(statement.splitlines()) <= 12
    base = dict(
        type='mmpretrain.TIMMBackbone',
        model_name='cait_xxs24_224',
        features_only=True,
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=2,
        out_indices=(0, 1),
    )
    before = dict(HOSTS)
    with pytest.raises(mona_mm.errors.UnsupportedHostError):
        find_host(build(base))
    try:
        exec(source, {})
        stock = build(base)
        randomise(stock)
        model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4))
        model.load_state_dict(stock.state_dict(), strict=False)
        model.eval()
        assert len(sites_of(model)) == 2 and {'post_attn', 'ffn_branch', 'q'} <= set(find_host(model).sites)
        assert not torch.equal(model(image())[-1], stock(image())[-1])
        for lora in (dict(type='LoRA', rank=2, sites=['q', 'v', 'fc1']),):
            check_merge(base, lora)
    finally:
        HOSTS.clear()
        HOSTS.update(before)


# Around them


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


def detector(backbone: dict, neck: dict | list, strides: list[int]) -> nn.Module:
    init_default_scope('mmdet')
    return MODELS.build(
        dict(
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
        dict(
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
