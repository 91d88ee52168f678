"""Adapter+: its count, its formula written anew in float64, DropPath, and initial values."""

import copy

import pytest
import torch
from helpers import assert_equal, assert_near
from torch import nn

from mona_mm import PeftBackbone, count_trainable
from mona_mm.errors import ConfigError
from mona_mm.methods import AdapterPlus
from mona_mm.nn.meta import meta_device


def test_published_count():
    """Rank 8 on ViT-B: 12 blocks of one module."""
    with meta_device():
        model = PeftBackbone(
            base=dict(type='mmpretrain.VisionTransformer', arch='base'), peft=dict(type='AdapterPlus', bottleneck=8)
        )
    assert count_trainable(model).trainable == 165984 == 12 * (2 * 768 * 8 + 8 + 768 + 768)


def random_module(**options) -> AdapterPlus:
    torch.manual_seed(0)
    module = AdapterPlus(12, **{**dict(bottleneck=5), **options}).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def formula(module: AdapterPlus, x: torch.Tensor) -> torch.Tensor:
    hidden = x @ module.down.weight.T + module.down.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + module.scale * (hidden @ module.up.weight.T + module.up.bias)


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('contiguous', [True, False])
def test_formula(fast, contiguous):
    """Output and every gradient, in train mode too where nothing is dropped."""
    for module in (random_module().eval(), random_module(drop_path=0.0).train()):
        module.fast = fast
        x = torch.randn(35, 3, 12, dtype=torch.float64).transpose(0, 1)
        x = (x.contiguous() if contiguous else x).requires_grad_()
        direction = torch.randn(x.shape, dtype=torch.float64)
        out, expected = module(x, (5, 7)), formula(module, x)
        assert_near(out, expected, 1e-12)
        actual, gradients = (
            torch.autograd.grad((each * direction).sum(), [x, *module.parameters()]) for each in (out, expected)
        )
        assert_near(actual, gradients, 1e-12)


def test_whole_branches_of_images_are_dropped():
    """An image has its branch, divided by the probability to keep it, or none of it."""
    module = random_module(drop_path=0.25).train()
    assert AdapterPlus(12).drop_path.drop_prob == 0.1
    x = torch.randn(200, 4, 12, dtype=torch.float64)
    out, kept = module(x, (2, 2)), x + (formula(module, x) - x) / 0.75
    is_kept = (out - kept).abs().amax((1, 2)) < 1e-12
    is_dropped = (out - x).abs().amax((1, 2)) == 0
    assert (is_kept ^ is_dropped).all() and 20 < is_dropped.sum() < 80


def test_hooks_and_other_layers_for_the_last_projection():
    """A hook on it sees its output, and a layer of another class in its place is called."""
    module, seen = random_module().eval(), []
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    expected = module(x, (2, 2))
    hooked = copy.deepcopy(module)
    hooked.up.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
    assert_near(hooked(x, (2, 2)), expected, 1e-12)
    assert seen == [12]
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module).float(), {nn.Linear})
    assert_near(quantized(x.float(), (2, 2)), expected.float(), 0.05)


def test_initial_values():
    """Truncated normals of std 0.01 within two standard deviations, zero biases, scales of one; a reset restores them,
    and the module begins close to the identity."""
    module = AdapterPlus(384, bottleneck=64)
    for linear in (module.down, module.up):
        assert 0.0085 < linear.weight.std() < 0.009 and linear.weight.abs().max() <= 0.02
        assert_equal(linear.bias.detach(), torch.zeros_like(linear.bias))
    assert_equal(module.scale.detach(), torch.ones(384))
    x = torch.randn(1, 4, 384)
    assert 0 < (module.eval()(x, (2, 2)) - x).norm() < 0.05 * x.norm()
    nn.init.normal_(module.scale)
    module.reset_parameters()
    assert_equal(module.scale.detach(), torch.ones(384))


@pytest.mark.parametrize(('name', 'value'), [('bottleneck', 0), ('drop_path', 1.0)])
def test_bad_arguments(name, value):
    with pytest.raises(ConfigError, match=f'AdapterPlus: {name}={value}'):
        AdapterPlus(12, **{name: value})
