"""Adapter, AdaptFormer, LoRA and LoRand: where they sit in train mode, initial values, counts, plain formulas."""

import pytest
import torch
from conftest import HOSTS
from helpers import assert_near, pairwise
from mmengine.registry import MODELS
from torch import nn

from mona_mm import PeftBackbone, count_trainable
from mona_mm.errors import ConfigError
from mona_mm.hosts import find_host, method_modules
from mona_mm.methods import Adapter, AdaptFormer, LoRA, LoRand
from mona_mm.nn.meta import meta_device

# Trainable backbone parameters of Swin-T, -B and -L, from the authors' logs and code.
COUNTS = {
    'Adapter': (1140864, 3107328, 4659456),
    'LoRA': (1130496, 3080192, 4620288),
    'AdaptFormer': (570432, 1553664, 2329728),
    'LoRand': (1758144, 4754688, 7082880),
    'LoRand-8': (873408, 2370816, 3543936),
}
SIZES = (
    dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
)


@pytest.mark.parametrize(
    'size', [0, pytest.param(1, marks=pytest.mark.slow), 2], ids=['T', 'B', 'L']
)  # B and L differ in width alone
@pytest.mark.parametrize('method', COUNTS)
def test_published_counts(method, size):
    """Exactly the published numbers of trainable parameters."""
    name, _, inner = method.partition('-')
    peft = dict(type=name, inner=int(inner)) if inner else dict(type=name)
    with meta_device():
        model = PeftBackbone(base=dict(type='mmdet.SwinTransformer', **SIZES[size]), peft=peft)
    assert count_trainable(model).trainable == COUNTS[method][size]


def swin_block(peft: dict, dropped: bool):
    """The first block of a Swin in train mode, with every residual branch dropped or none."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)
    model.init_weights()
    for p in (p for m in method_modules(model) for p in m.parameters()):
        nn.init.normal_(p, std=0.1)
    model.train()
    block = model.stages[0].blocks[0]
    for m in block.modules():
        if type(m).__name__ == 'DropPath':
            m.drop_prob = 1 - 1e-9 if dropped else 0.0
        elif isinstance(m, nn.Dropout):
            m.p = 0.0
    return block


def test_placement_when_every_path_is_dropped():
    """Adapter sits before DropPath and contributes nothing, LoRA likewise; LoRand after it, so its value at zero
    stays; AdaptFormer is beside it, so its whole branch stays."""
    x, hw = torch.randn(2, 49, 24), (7, 7)
    for peft in (dict(type='Adapter'), dict(type='LoRA', rank=4)):
        assert_near(swin_block(peft, dropped=True)(x, hw), x)
    block = swin_block(dict(type='LoRand', inner=4), dropped=True)
    zero = torch.zeros_like(x)
    expected = x + block.peft.attn_out(zero, hw) + block.peft.ffn_out(zero, hw)
    assert not torch.allclose(expected, x)
    assert_near(block(x, hw), expected)
    block = swin_block(dict(type='AdaptFormer'), dropped=True)
    expected = x + block.peft.parallel_ffn(x, hw)
    assert not torch.allclose(expected, x)
    assert_near(block(x, hw), expected)


def stock_attention(block, x, hw):
    """The attention branch of a Swin block without a method's hooks on its end."""
    end = block.attn.drop
    hooks = end._forward_hooks, end._forward_pre_hooks
    end._forward_hooks, end._forward_pre_hooks = {}, {}
    out = block.attn(block.norm1(x), hw)
    end._forward_hooks, end._forward_pre_hooks = hooks
    return out


def test_placement_when_no_path_is_dropped():
    """With nothing dropped, each method's formula around the stock branches."""
    x, hw = torch.randn(2, 49, 24), (7, 7)

    def ffn(block, y):
        return block.ffn.layers(block.norm2(y))

    block = swin_block(dict(type='Adapter'), dropped=False)
    y = x + block.peft.attn_branch(stock_attention(block, x, hw), hw)
    assert_near(block(x, hw), y + block.peft.ffn_branch(ffn(block, y), hw))

    block = swin_block(dict(type='LoRand', inner=4), dropped=False)
    y = x + block.peft.attn_out(stock_attention(block, x, hw), hw)
    assert_near(block(x, hw), y + block.peft.ffn_out(ffn(block, y), hw))

    block = swin_block(dict(type='AdaptFormer'), dropped=False)
    y = x + stock_attention(block, x, hw)
    assert_near(block(x, hw), y + ffn(block, y) + block.peft.parallel_ffn(y, hw))


def second_blocks(name: str, peft: dict, dropped: bool):
    """The second block of a host in double precision, with a method of random weights and with none, in train mode,
    with every residual branch dropped or none. In that block DropPath is a module, and SwinV2's has its extra norm."""
    torch.manual_seed(1)
    model = PeftBackbone(base=HOSTS[name], peft=peft, fast=False)
    stock = MODELS.build(HOSTS[name])
    for p in model.parameters():  # norms, layer scale and biases included
        nn.init.normal_(p, mean=0.2, std=0.3)
    stock.load_state_dict(model.state_dict(), strict=False)
    blocks = []
    for each in (model, stock):
        each.double().train()
        blocks.append(list(find_host(model).blocks(each).values())[1])
        for m in blocks[-1].modules():
            if type(m).__name__ == 'DropPath':
                m.drop_prob = 1 - 1e-9 if dropped else 0.0
            elif isinstance(m, nn.Dropout):
                m.p = 0.0
    return blocks


def post_norm(block, at, x, hw, kept):
    """SwinV2: the branches end with their norms, after DropPath; the extra norm is the block's last."""
    y = at('attn_branch', block.attn(x, hw) if kept else torch.zeros_like(x)) * kept
    y = at('post_attn', x + at('attn_out', block.norm1(y)))
    z = at('ffn_branch', block.ffn.layers(y)) * kept
    z = at('post_ffn', y + at('ffn_out', block.norm2(z)) + at('parallel_ffn', y))
    return block.norm3(z)


def pyramid(block, at, x, hw, kept):
    """PVTv2: before the branches their norms."""
    y = at('attn_branch', block.attn(block.norm1(x), hw, identity=torch.zeros_like(x)) if kept else x) * kept
    y = at('post_attn', x + at('attn_out', y))
    grid = block.norm2(y).transpose(1, 2).unflatten(2, hw)
    z = at('ffn_branch', block.ffn.layers(grid).flatten(2).transpose(1, 2)) * kept
    return at('post_ffn', y + at('ffn_out', z) + at('parallel_ffn', y))


def convnext(block, at, x, hw, kept):
    """ConvNeXt: one branch, on maps."""
    end = block.drop_path
    block.drop_path = nn.Identity()
    y = x.transpose(1, 2).unflatten(2, hw)
    z = (block(y) - y).flatten(2).transpose(1, 2)
    block.drop_path = end
    return at('post_ffn', x + at('ffn_out', at('ffn_branch', z) * kept) + at('parallel_ffn', x))


FORMULAS = {
    'mmpretrain-swinv2': post_norm,
    'mmdet-pvtv2': pyramid,
    'mmpretrain-convnext': convnext,
    'mmpretrain-convnextv2': convnext,
}


@pytest.mark.parametrize(
    ('name', 'method', 'dropped'),
    pairwise(list(FORMULAS), ['Mona', 'Adapter', 'AdaptFormer', 'LoRand'], dict(kept=False, dropped=True)),
)
def test_placement_in_other_blocks(name, method, dropped):
    """Each method's formula around the stock branches of every other kind of block: before DropPath or after it, before
    a norm that ends the branch or after it, beside the FFN from what enters it."""
    peft = {'type': method, 'inner' if method == 'LoRand' else 'bottleneck': 4}
    block, stock = second_blocks(name, peft, dropped)
    hw, used = (8, 8), set()
    x = torch.randn(2, 64, block.get_parameter(block.spec.linears['fc2'].weight).shape[0], dtype=torch.float64)

    def at(site, y):
        if site not in block.peft:
            return torch.zeros_like(y) if site == 'parallel_ffn' else y
        used.add(site)
        out = block.peft[site](y, hw)
        assert not torch.allclose(out, y, atol=1e-2), 'the formula would not see it'
        return out

    if 'convnext' in name:
        out = block(x.transpose(1, 2).unflatten(2, hw)).flatten(2).transpose(1, 2)
    else:
        out = block(x, hw)
    expected = FORMULAS[name](stock, at, x, hw, 0.0 if dropped else 1.0)
    assert used == set(block.peft)
    assert_near(out, expected, 1e-11)


def test_lora_equals_merged_weights(host):
    """On every linear and slice: the branch equals adding `delta_weight` to the rows of the stock weight."""
    sites = list(find_host(MODELS.build(host)).linears)
    model = PeftBackbone(base=host, peft=dict(type='LoRA', rank=4, alpha=3.0, sites=sites))
    model.init_weights()
    for m in method_modules(model):
        nn.init.normal_(m.up.weight)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    descriptor = find_host(model)
    with torch.no_grad():
        for block in descriptor.blocks(model).values():
            for site in sites:
                linear = descriptor.linears[site]
                weight = block.get_parameter(linear.weight)
                delta = block.peft[site].delta_weight(weight[linear.rows(weight)])
                weight[linear.rows(weight)] += delta.view_as(weight[linear.rows(weight)])
                block.peft[site].up.weight.zero_()
    for merged, unmerged in zip(model(x), expected, strict=True):
        assert_near(merged, unmerged)


@pytest.mark.parametrize('cls', [Adapter, AdaptFormer])
def test_adapter_formula_and_initial_values(cls):
    module = cls(32, bottleneck=16).double().eval()
    for linear in (module.down, module.up):
        assert (linear.bias == 0).all() and 0.015 < linear.weight.std() < 0.025
        nn.init.normal_(linear.bias)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    hidden = x @ module.down.weight.T + module.down.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    branch = hidden @ module.up.weight.T + module.up.bias
    assert_near(module(x, (3, 3)), x + branch if cls is Adapter else 0.1 * branch)
    assert module.dropout.p == 0.1


def test_lora_begins_as_zero_and_scales_by_alpha_over_rank():
    module = LoRA(12, 8, rank=4, alpha=2.0)
    x = torch.randn(3, 12)
    assert (module(x, None, None) == 0).all() and module.down.weight.abs().max() <= 12**-0.5
    nn.init.normal_(module.up.weight)
    assert_near(module(x, None, None), 0.5 * x @ module.down.weight.T @ module.up.weight.T)
    assert LoRA(12, 8).scale == 1 / 64


def test_lorand_initial_values():
    """Factors Kaiming-uniform with a = sqrt(5), each by its own shape; the bias by the input's width."""
    module = LoRand(64, inner=16)
    for linear, width in ((module.down, 64), (module.up, 32)):
        for stack in (linear.a, linear.g, linear.b):
            bound = stack.shape[-1] ** -0.5
            assert stack.abs().max() <= bound and stack.std() > 0.5 * bound
        assert linear.bias.abs().max() <= width**-0.5
    assert not any(isinstance(m, nn.Dropout) for m in module.modules())


@pytest.mark.parametrize(
    ('cls', 'widths', 'arguments'),
    [
        (Adapter, (8,), dict(bottleneck=0)),
        (AdaptFormer, (8,), dict(dropout=1.0)),
        (LoRA, (8, 8), dict(rank=0)),
        (LoRand, (8,), dict(inner=-1)),
        (LoRand, (8,), dict(branches=1.5)),
    ],
)
def test_bad_arguments(cls, widths, arguments):
    """One error names the argument and what it may be."""
    name, value = next(iter(arguments.items()))
    with pytest.raises(ConfigError, match=f'{cls.__name__}: {name}={value}'):
        cls(*widths, **arguments)


PLAIN = {
    Adapter: lambda m, x: x + m.up(m.dropout(m.act(m.down(x)))),
    AdaptFormer: lambda m, x: m.scale * m.up(m.dropout(m.act(m.down(x)))),
    LoRA: lambda m, x: m.up(m.scale * m.down(m.dropout(x))),
    LoRand: lambda m, x: x + m.up(m.act(m.down(x))),
}


@pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('method', PLAIN)
def test_in_place_is_the_plain_formula(method, autocast):
    """What is computed in place is the plain formula to the bit, in train mode: output, types, every gradient, and the
    input as it was; without gradients, too, and for an input that is not contiguous."""
    torch.manual_seed(0)
    sizes = dict(in_channels=24, out_channels=24, rank=8, dropout=0.3) if method is LoRA else dict(channels=24)
    module = method(**sizes).train()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    for x in (torch.randn(3, 35, 24), torch.randn(35, 3, 24).transpose(0, 1)):
        results = []
        for forward in (PLAIN[method], lambda m, x: m(x, (5, 7)) if m.sites[0] != 'q' else m(x, None, None)):
            own = x.clone(memory_format=torch.preserve_format).requires_grad_()
            module.zero_grad()
            torch.manual_seed(1)
            with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
                out = forward(module, own)
                out.backward(torch.ones_like(out) * x)
                with torch.no_grad():
                    free = forward(module.eval(), own)
            module.train()
            results.append([out.detach(), own.detach(), own.grad, free, *(p.grad for p in module.parameters())])
        for plain, actual in zip(*results, strict=True):
            assert plain.dtype == actual.dtype and torch.equal(plain, actual)


@pytest.mark.parametrize('method', PLAIN)
def test_hooks_on_what_is_computed_in_place(method):
    """What a hook on the last projection keeps stays as it was given, and backward hooks on every module work; both
    change nothing."""
    sizes = dict(in_channels=24, out_channels=24, rank=8) if method is LoRA else dict(channels=24)
    module = method(**sizes).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x, seen = torch.randn(3, 35, 24, requires_grad=True), []

    def run() -> list[torch.Tensor]:
        out = module(x, (5, 7)) if module.sites[0] != 'q' else module(x, None, None)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    expected = run()
    module.up.register_forward_hook(lambda m, args, out: seen.append((out, out.detach().clone())))
    for m in module.modules():
        m.register_full_backward_hook(lambda m, grad_in, grad_out: None)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    assert len(seen) == 1 and torch.equal(*seen[0])
