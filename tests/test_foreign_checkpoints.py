"""Checkpoints of timm, Hugging Face and Meta in the wrappers of timm's and transformers' models."""

import copy
import itertools
import json

import pytest
import torch
from foreign_hosts import (
    FOREIGN,
    HUGGING_FACE,
    INSTALLED,
    TIMM,
    build,
    image,
    installed,
    names,
    randomise,
    register_small_models,
)
from helpers import assert_equal, assert_near
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.checkpoint.pretrained import load_pretrained
from mona_mm.errors import CheckpointMismatchError, MissingFileError

needs_timm, needs_transformers = installed('timm'), installed('hf')


@pytest.fixture(autouse=True, scope='module')
def small_models_of_timm():
    if INSTALLED['timm']:
        register_small_models()


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
def test_a_model_without_features_only(tmp_path):
    """It returns tokens, as mmpretrain's TIMMBackbone does by default, and is the same host."""
    plain = plain_timm('timm-vit')
    torch.save(plain.state_dict(), tmp_path / 'timm.pth')
    base = {key: value for key, value in TIMM['timm-vit'].items() if key not in ('features_only', 'out_indices')}
    backbone = PeftBackbone(
        base=dict(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))),
        peft=dict(type='LoRA', rank=2),
    )
    backbone.init_weights()
    backbone.eval()
    with torch.no_grad():
        assert_near(backbone(image())[0], plain.forward_features(image()))
    model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4))
    assert model(image())[0].shape == (2, 17, 24)


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


@needs_timm
def test_biases_that_timm_would_drop_are_refused(tmp_path):
    """Of Meta's DINOv3, where the model was made without them; zeros may be dropped."""
    tensors = meta('dinov3')
    base = dict(backbones_for_meta('dinov3')[0], model_name='vit_small_patch16_dinov3')
    torch.save(tensors, tmp_path / 'meta.pth')
    with pytest.raises(CheckpointMismatchError, match='_qkvb'):
        load_pretrained(build(base), str(tmp_path / 'meta.pth'))
    for i in (0, 1):
        tensors[f'blocks.{i}.attn.qkv.bias'].zero_()
    torch.save(tensors, tmp_path / 'meta.pth')
    load_pretrained(build(base), str(tmp_path / 'meta.pth'))


def meta_convnext() -> dict[str, torch.Tensor]:
    """A DINOv3 ConvNeXt of one block a stage with Meta's names and random values."""
    generator, tensors = torch.Generator().manual_seed(3), {}

    def add(name: str, *shape: int) -> None:
        tensors[f'{name}.weight'] = torch.randn(shape, generator=generator) * 0.3
        tensors[f'{name}.bias'] = torch.randn(shape[:1], generator=generator) * 0.3

    widths = (3, 8, 16, 24, 32)
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        add(f'downsample_layers.{i}.{0 if i == 0 else 1}', width, before, *([4, 4] if i == 0 else [2, 2]))
        add(f'downsample_layers.{i}.{1 if i == 0 else 0}', width if i == 0 else before)
        block = f'stages.{i}.0'
        add(f'{block}.dwconv', width, 1, 7, 7)
        add(f'{block}.norm', width)
        add(f'{block}.pwconv1', 4 * width, width)
        add(f'{block}.pwconv2', width, 4 * width)
        tensors[f'{block}.gamma'] = torch.randn(width, generator=generator)
    add('norm', 32)
    add('norms.3', 32)
    return tensors


@needs_timm
@needs_transformers
def test_metas_convnext_gives_the_same_maps_in_both_libraries(tmp_path):
    """DINOv3's, whose maps are those of the stages, without norms."""
    torch.save(meta_convnext(), tmp_path / 'meta.pth')
    maps = []
    for name in ('timm-convnext', 'hf-dinov3-convnext'):
        model = build(FOREIGN[name])
        load_pretrained(model, str(tmp_path / 'meta.pth'))
        maps.append(list(model(image())))
    assert_near(maps[1], maps[0])


@needs_timm
@needs_transformers
@pytest.mark.parametrize('library', ['timm', 'transformers'])
def test_the_converter_writes_the_names_of_a_config(library, tool, tmp_path):
    """Of Meta's DINOv3, for the backbone of a config; without one it says that no OpenMMLab backbone has such names."""
    torch.save(meta('dinov3'), tmp_path / 'meta.pth')
    base = backbones_for_meta('dinov3')[library == 'transformers']
    (tmp_path / 'config.py').write_text(f'default_scope = "mmseg"\nmodel = dict(backbone={base!r})\n')
    arguments = str(tmp_path / 'meta.pth'), str(tmp_path / 'out.pth')
    status, _, err = tool('convert_checkpoint.py', *arguments)
    assert status == 2 and 'storage_tokens' in err
    status, out, err = tool('convert_checkpoint.py', *arguments, '--config', str(tmp_path / 'config.py'))
    assert status == 0, err
    converted = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    expected = build(base)
    load_pretrained(expected, str(tmp_path / 'meta.pth'))
    assert_equal({name.removeprefix('backbone.'): t for name, t in converted.items()}, dict(expected.state_dict()))
