"""The fast window attention computes what the stock one does, forward and backward, wherever it is used."""

import copy
import io
import pickle

import pytest
import torch
from conftest import HOSTS
from mmengine.registry import MODELS
from torch.autograd.graph import saved_tensors_hooks

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError
from mona_mm.fast.attention import FastWindowAttention, window_index

SWINS = ['mmdet-swin', 'mmseg-swin', 'mmpretrain-swin']
ATTENTION = dict(
    mmdet='mmdet.models.backbones.swin', mmseg='mmseg.models.backbones.swin', mmpretrain='mmpretrain.models.utils'
)


def attention(library: str = 'mmdet', window: int = 7, shift: int = 3, fast: bool = True, **options):
    """One stock attention module with a trained-looking table, fast or not."""
    import importlib

    from mona_mm.fast.attention import make_fast

    torch.manual_seed(0)
    cls = importlib.import_module(ATTENTION[library]).ShiftWindowMSA
    module = cls(embed_dims=24, num_heads=3, window_size=window, shift_size=shift, **options)
    torch.nn.init.normal_(module.w_msa.relative_position_bias_table)
    assert not fast or make_fast(module)
    return module


def run(module, hw, batch=2, seed=0):
    """Output, input gradient, and gradients of what trains."""
    torch.manual_seed(seed)
    dtype = module.w_msa.qkv.weight.dtype
    x = torch.randn(batch, hw[0] * hw[1], 24, dtype=dtype).requires_grad_()
    cotangent = torch.randn_like(x)
    module.zero_grad()
    out = module(x, hw)
    (out * cotangent).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_close(actual, expected, tolerance=1e-5):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=0)


def train_only(model, *names):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(names) if names else False)
    return model


@pytest.mark.parametrize('trains', [(), ('_bias_table', 'bias'), ('',)], ids=['frozen', 'bitfit', 'full'])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('hw', [(14, 14), (24, 36), (13, 29), (7, 12), (5, 6), (1, 30), (7, 7), (12, 12)])
@pytest.mark.parametrize(('window', 'shift'), [(7, 0), (7, 3), (12, 0), (12, 6)])
@pytest.mark.parametrize('library', ['mmdet', 'mmpretrain'])
def test_equals_stock(library, window, shift, hw, batch, trains):
    """Output and every gradient within 1e-5: whole and padded maps, shifted windows, maps smaller than a window."""
    options = dict(pad_small_map=True) if library == 'mmpretrain' else {}
    stock, fast = (attention(library, window, shift, f, **options) for f in (False, True))
    for module in (stock, fast):
        train_only(module, *trains)
    assert_close(run(fast, hw, batch), run(stock, hw, batch))
