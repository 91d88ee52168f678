"""Mona is the published Mona: formula, counts, initial values, and where its dropout is."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import HOSTS
from helpers import assert_near
from mmengine.registry import MODELS

from mona_mm import PeftBackbone, count_trainable
from mona_mm.hosts import method_modules
from mona_mm.methods import Mona
from mona_mm.methods.folded_mona import FoldedMona
from mona_mm.nn.meta import meta_device

SIZES = {
    'swin_t': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'swin_b': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'swin_l': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


# The paper's four design versions, and other kernels.
VARIANTS = {
    'published': dict(),
    'design-1': dict(scaled_norm=[], average=False),
    'design-2': dict(scaled_norm=['down', 'pointwise'], average=False),
    'design-3': dict(scaled_norm=[]),
    'one-kernel': dict(kernel_sizes=[5]),
    'four-kernels': dict(kernel_sizes=[1, 3, 9, 7]),
}


def plain_scaled_norm(p: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    norm = (x - mean) / (var + 1e-5).sqrt() * p[f'{name}.norm.weight'] + p[f'{name}.norm.bias']
    return p[f'{name}.gamma'] * norm + p[f'{name}.gammax'] * x


def plain_mona(
    p: dict[str, torch.Tensor],
    x: torch.Tensor,
    hw: tuple[int, int],
    kernel_sizes: Sequence[int] = (3, 5, 7),
    scaled_norm: Sequence[str] = ('down',),
    average: bool = True,
) -> torch.Tensor:
    """The formula of the class's docstring, written out with plain functions, one pixel and one channel at a time
    where the convolutions are."""
    s = plain_scaled_norm(p, 'entrance', x) if 'down' in scaled_norm else x
    d = s @ p['down.weight'].T + p['down.bias']
    batch, _, width = d.shape
    grid = d.view(batch, *hw, width)
    mixed = torch.zeros_like(grid)
    for i, k in enumerate(kernel_sizes):
        weight, bias = p[f'depthwise.{i}.weight'], p[f'depthwise.{i}.bias']
        padded = F.pad(grid, (0, 0, k // 2, k // 2, k // 2, k // 2))
        for dy in range(k):
            for dx in range(k):
                mixed = mixed + weight[:, 0, dy, dx] * padded[:, dy : dy + hw[0], dx : dx + hw[1]]
        mixed = mixed + bias
    q = (mixed / (len(kernel_sizes) if average else 1) + grid).view(batch, -1, width)
    m = plain_scaled_norm(p, 'middle', q) if 'pointwise' in scaled_norm else q
    r = m @ p['pointwise.weight'][:, :, 0, 0].T + p['pointwise.bias'] + q
    activated = 0.5 * r * (1 + torch.erf(r / 2**0.5))
    return x + activated @ p['up.weight'].T + p['up.bias']


def randomised(channels: int, bottleneck: int, **options) -> Mona:
    module = Mona(channels, bottleneck, **options).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


@pytest.mark.parametrize('hw', [(5, 4), (1, 9), (8, 8)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_formula_and_gradients_in_float64(hw, variant):
    """Output, input gradient and parameter gradients equal those of the plain formula, for every design version."""
    module = randomised(6, 4, **VARIANTS[variant])
    x = torch.randn(2, hw[0] * hw[1], 6, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = module(x1, hw), plain_mona(parameters, x2, hw, **VARIANTS[variant])
    assert_near(out, expected, 1e-12)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert_near(x1.grad, x2.grad, 1e-12)
    gradients = {name: p.grad for name, p in parameters.items()}
    assert_near({name: p.grad for name, p in module.named_parameters()}, gradients, 1e-12)
    n, m, sizes = 4, 6, VARIANTS[variant].get('kernel_sizes', (3, 5, 7))
    norms = VARIANTS[variant].get('scaled_norm', ['down'])
    count = (2 * n + 1) * m + n * n + 2 * n + n * sum(k * k + 1 for k in sizes)
    count += 4 * m * ('down' in norms) + 4 * n * ('pointwise' in norms)
    assert sum(p.numel() for p in module.parameters()) == count


def test_extra_tokens_bypass_the_convolutions():
    """A class token and register tokens are adapted without neighbours, and change nothing on the grid."""
    module = randomised(6, 4)
    hw = (3, 5)
    tokens = torch.randn(2, 5 + 15, 6, dtype=torch.float64)  # a class token and four registers first
    out = module(tokens, hw)
    assert_near(out[:, 5:], module(tokens[:, 5:], hw), 1e-12)
    state = dict(module.named_parameters())
    without = {
        name: torch.zeros_like(p) if 'depthwise' in name or 'pointwise' in name else p for name, p in state.items()
    }
    assert_near(out[:, :5], plain_mona(without, tokens[:, :5], (1, 5)), 1e-12)


def test_train_mode_drops_after_the_activation():
    """In train mode exactly the input of `up` is dropped, with probability 0.1 and the survivors scaled by 1/0.9."""
    module = randomised(6, 64).train()
    seen = {}
    module.up.register_forward_hook(lambda m, args, out: seen.update(up=args[0]))
    module.act.register_forward_hook(lambda m, args, out: seen.update(act=out))
    module(torch.randn(4, 100, 6, dtype=torch.float64), (10, 10))
    alive = seen['act'] != 0  # the GELU of a large negative number is zero already
    dropped = seen['up'] == 0
    assert 0.09 < dropped[alive].double().mean() < 0.11
    assert_near(seen['up'][~dropped], (seen['act'] / 0.9)[~dropped], 1e-12)
    dropouts = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in dropouts] == [0.1]


def test_mona_is_outside_drop_path():
    """With every residual branch dropped, the block still applies both its Mona modules: they come after the adds."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'))
    model.init_weights()
    model.train()
    block = model.stages[0].blocks[0]
    for m in block.modules():
        if type(m).__name__ == 'DropPath':
            m.drop_prob = 1 - 1e-9
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    x = torch.randn(2, 49, 24)
    expected = block.peft.post_ffn(block.peft.post_attn(x, (7, 7)), (7, 7))
    assert_near(block(x, (7, 7)), expected)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize('loaded', [False, True], ids=['random-base', 'pretrained-base'])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_initial_values(library, loaded, tmp_path):
    """gamma 1e-6, gammax 1, norm 1 and 0, linears truncated normal 0.02 with zero bias, convolutions as torch makes
    them: the same after a pretrained load and without one."""
    base = dict(HOSTS[f'{library}-swin'])
    if loaded:
        torch.save(MODELS.build(base).state_dict(), tmp_path / 'base.pth')
        base['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    model = PeftBackbone(base=base, peft=dict(type='Mona'))
    model.init_weights()
    modules = method_modules(model)
    assert len(modules) == 10
    for m in modules:
        assert (m.entrance.gamma == 1e-6).all() and (m.entrance.gammax == 1).all()
        assert (m.entrance.norm.weight == 1).all() and (m.entrance.norm.bias == 0).all()
        for linear in (m.down, m.up):
            assert (linear.bias == 0).all()
            assert 0.017 < linear.weight.std() < 0.023 and linear.weight.abs().max() <= 2
        for conv in (*m.depthwise, m.pointwise):
            bound = (conv.weight[0].numel()) ** -0.5
            assert conv.weight.abs().max() <= bound and conv.bias.abs().max() <= bound
            assert conv.weight.std() > 0.4 * bound and conv.bias.abs().sum() > 0
    assert not torch.equal(modules[0].down.weight, modules[1].down.weight)


@pytest.mark.parametrize(('size', 'count'), [('swin_t', 1408128), ('swin_b', 3667456), ('swin_l', 5267712)])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_published_counts(library, size, count):
    """Exactly the published numbers of trainable parameters, by the formula of the docstring, too."""
    with meta_device():
        model = PeftBackbone(base=dict(type=f'{library}.SwinTransformer', **SIZES[size]), peft=dict(type='Mona'))
    counted = count_trainable(model)
    assert counted.backbone_trainable == counted.trainable == count
    n, depths = 64, SIZES[size]['depths']
    widths = [SIZES[size]['embed_dims'] * 2**i for i in range(4)]
    assert count == sum(2 * d * ((2 * n + 5) * m + n * n + 88 * n) for d, m in zip(depths, widths, strict=True))


@pytest.mark.parametrize('arguments', [dict(bottleneck=0), dict(bottleneck=1.5), dict(dropout=1.0), dict(dropout=-0.1)])
def test_bad_arguments(arguments):
    """One error names the argument and what it may be."""
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f'{name}={value}'):
        Mona(8, **arguments)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(kernel_sizes=[3, 9], average=False),
        dict(scaled_norm=[], kernel_sizes=[1]),
        dict(scaled_norm=['pointwise']),
        dict(scaled_norm=['down', 'pointwise'], average=False),
    ],
    ids=str,
)
@pytest.mark.parametrize('extra', [0, 2])
def test_folded_form_is_equal(options, extra):
    """The deploy form, one depthwise kernel and no identities, computes what the module does, to 1e-5, with and without
    tokens beside the grid, at every scale of its parameters."""
    module = Mona(24, bottleneck=8, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    module.eval()
    folded = FoldedMona.of(module)
    x = torch.randn(2, extra + 5 * 7, 24)
    with torch.no_grad():
        expected = module(x, (5, 7))
        assert_near(folded(x, (5, 7)), expected)
        assert (expected - x).abs().max() > 0.1
    assert sum(p.numel() for p in folded.parameters()) <= sum(p.numel() for p in module.parameters())


@torch.no_grad()
def test_folded_form_is_traced_and_hooked(tmp_path):
    """Without gradients, as models are exported and features read: a trace has nothing but stock operations and can be
    saved, torch.func works, and hooks on its layers are called."""
    folded = FoldedMona.of(Mona(24, bottleneck=8)).eval().requires_grad_(False)
    x = torch.randn(2, 35, 24)
    expected = folded(x, (5, 7))
    traced = torch.jit.trace(lambda x: folded(x, (5, 7)), torch.randn(2, 35, 24))
    assert 'mkldnn' not in str(traced.inlined_graph)
    traced.save(str(tmp_path / 'trace.pt'))
    assert_near(torch.jit.load(str(tmp_path / 'trace.pt'))(x), expected)
    mapped = torch.func.vmap(lambda x: folded(x[None], (5, 7))[0])(x)
    assert_near(mapped, expected)
    seen = []
    for layer in (folded.down, folded.pointwise, folded.up):
        layer.register_forward_hook(lambda m, args, out: seen.append(m))
    assert_near(folded(x, (5, 7)), expected)
    assert seen == [folded.down, folded.pointwise, folded.up]
