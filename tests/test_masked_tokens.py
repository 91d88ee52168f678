"""Backbones of pretraining: those that leave tokens out, so that the tokens of a block are no grid, those that keep
what another part of the model reads, and those that initialise whatever is linear."""

import pytest
import torch
from suite import check_start

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
MAE = dict(type='mmpretrain.MAEViT', arch=ARCH, img_size=32, patch_size=8, mask_ratio=0.75)


def backbone(**peft):
    torch.manual_seed(0)
    return PeftBackbone(base=MAE, peft=peft)


@pytest.mark.parametrize('fast', [True, False])
def test_a_convolution_over_a_part_of_the_grid_is_refused(fast):
    torch.manual_seed(0)
    model = PeftBackbone(base=MAE, peft=dict(type='Mona', bottleneck=4), fast=fast)
    with pytest.raises(ConfigError, match=r'5 tokens here on a grid of 4 x 4: .*a masked autoencoder'):
        model(torch.rand(2, 3, 32, 32), mask=True)
    assert model(torch.rand(2, 3, 32, 32), mask=None)[0].shape == (2, 17, 16)


@pytest.mark.parametrize(
    'peft',
    [dict(type='Adapter', bottleneck=4), dict(type='AdaptFormer', bottleneck=4), dict(type='LoRand', inner=4)],
    ids=lambda peft: peft['type'],
)
def test_a_map_of_single_tokens_is_not(peft):
    """They do not read the grid, so they train."""
    model = backbone(**peft).eval()
    tokens = model(torch.rand(2, 3, 32, 32), mask=True)[0]
    assert tokens.shape == (2, 5, 16)
    tokens.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if '.peft.' in name)


@pytest.mark.parametrize('fast', [True, False])
def test_what_a_forward_keeps_for_others_is_there(fast):
    """BEiT's forward assigns the bias of the positions to the backbone, where the neck of BEiT v2 reads it. It is that
    of the last call, as in the stock backbone."""
    base = dict(type='mmpretrain.BEiTPretrainViT', arch=ARCH, img_size=32, patch_size=8)
    model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4), fast=fast)
    found = []
    for _ in range(2):
        with torch.no_grad():
            model.rel_pos_bias.relative_position_bias_table.normal_()
        model(torch.rand(2, 3, 32, 32), mask=torch.zeros(2, 4, 4))
        found.append(model.shared_rel_pos_bias)
        assert torch.equal(found[-1], model.rel_pos_bias())
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    'peft', [dict(type='LoRA', rank=2), dict(type='Adapter', bottleneck=4)], ids=lambda p: p['type']
)
def test_blocks_that_get_the_stream_by_its_name(peft):
    """CAE's encoder calls its blocks with keywords, and leaves tokens out."""
    base = dict(type='mmpretrain.CAEPretrainViT', arch=ARCH, img_size=32, patch_size=8, layer_scale_init_value=0.1)
    model = PeftBackbone(base=base, peft=peft).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.peft.' in name:
                p.normal_(std=0.1)
    mask = torch.arange(16).repeat(2, 1) >= 4
    tokens = model(torch.rand(2, 3, 32, 32), mask=mask)
    assert tokens.shape == (2, 5, 16)
    tokens.square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if '.peft.' in name)


@pytest.mark.parametrize(
    'peft',
    [dict(type='LoRA', rank=4, sites=['q', 'v', 'fc1']), dict(type='Mona', bottleneck=4)],
    ids=lambda peft: peft['type'],
)
def test_a_backbone_that_initialises_every_linear_layer(peft, tmp_path):
    """MoCo v3's does, and expects each to have a bias, which LoRA's have not."""
    check_start(dict(type='mmpretrain.MoCoV3ViT', arch=ARCH, img_size=32, patch_size=8), peft, 'random', tmp_path)
