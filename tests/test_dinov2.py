"""DINOv2: its names in three repositories, registers, SwiGLU, images that are no multiples of the patch."""

import re

import pytest
import torch
from helpers import assert_near
from mmengine.registry import MODELS

from mona_mm import PeftBackbone
from mona_mm.checkpoint import convert_state_dict
from mona_mm.checkpoint.convert import recognise
from mona_mm.errors import CheckpointMismatchError
from mona_mm.hosts import find_host

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
