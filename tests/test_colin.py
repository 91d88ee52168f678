"""CoLin: counts, its formula and its term in the loss written anew in float64, and initial values."""

from itertools import product

import pytest
import torch
from helpers import assert_near
from torch import Tensor, nn

from mona_mm import PeftBackbone, count_trainable
from mona_mm.errors import ConfigError
from mona_mm.methods import CoLin
from mona_mm.nn.meta import meta_device

SIZES = {  # and the published numbers of parameters
    'T': (dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)), 669312),
    'B': (dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), 1703424),
    'L': (dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)), 2389248),
}


@pytest.mark.parametrize('size', SIZES)
def test_published_counts(size):
    swin, expected = SIZES[size]
    with meta_device():
        model = PeftBackbone(base=dict(type='mmdet.SwinTransformer', **swin), peft=dict(type='CoLin'))
    assert count_trainable(model).trainable == expected


@pytest.mark.parametrize('options', [dict(), dict(bottleneck=10, rank=3), dict(bottleneck=7, rank=7, branches=1)])
def test_counts_of_a_module(options):
    """The number in the docstring."""
    n, r, k = (options.get(name, default) for name, default in (('bottleneck', 100), ('rank', 28), ('branches', 4)))
    for m in (32, 384):
        count = sum(p.numel() for p in CoLin(m, **options).parameters())
        assert count == (2 * r + 1) * m + (2 * r + 12) * n + k * r
        if not options:
            assert count == 57 * m + 6912


def random_colin(channels: int = 12, **options) -> CoLin:
    torch.manual_seed(0)
    module = CoLin(channels, **{**dict(bottleneck=10, rank=3, branches=3), **options}).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def by_formula(p: dict[str, Tensor], x: Tensor, hw: tuple[int, int]) -> Tensor:
    """The paper's sums over branches, the convolution as a sum of shifted grids, and the gate outside of it."""
    down = sum(p['down.a'] @ torch.diag(g) @ p['down.b'] for g in p['g'])
    up = sum(p['up.a'] @ torch.diag(g) @ p['up.b'] for g in p['g'])
    hidden = x @ down + p['down.bias']
    extra = x.shape[1] - hw[0] * hw[1]
    grid = hidden[:, extra:].reshape(len(x), *hw, -1)
    padded = nn.functional.pad(grid, (0, 0, 1, 1, 1, 1))
    convolved = p['depthwise.bias'] + sum(
        p['depthwise.weight'][:, 0, i, j] * padded[:, i : i + hw[0], j : j + hw[1]]
        for i, j in product(range(3), repeat=2)
    )
    gate = 1 / (1 + torch.exp(-p['depthwise.gate']))
    mixed = gate * convolved + (1 - gate) * grid
    hidden = torch.cat((hidden[:, :extra], mixed.reshape(len(x), -1, mixed.shape[-1])), 1)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + hidden @ up + p['up.bias']


INPUTS = {
    'grid': lambda: torch.randn(2, 35, 12),
    'class token and registers': lambda: torch.randn(3, 37, 12),
    'one image': lambda: torch.randn(1, 35, 12),
    'not contiguous': lambda: torch.randn(35, 2, 12).transpose(0, 1),
}


@pytest.mark.parametrize('inputs', INPUTS)
def test_formula(inputs):
    """Output and every gradient."""
    module = random_colin()
    x = INPUTS[inputs]().double().requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64)
    copies = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    out, expected = module(x, (5, 7)), by_formula(copies, x, (5, 7))
    assert_near(out, expected, 1e-12)
    actual = torch.autograd.grad((out * direction).sum(), [x, *module.parameters()])
    gradients = torch.autograd.grad((expected * direction).sum(), [x, *copies.values()])
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    assert_near(actual, gradients, 1e-12)
    with torch.no_grad():
        assert_near(module.eval()(x, (5, 7)), expected.detach(), 1e-12)


@pytest.mark.parametrize('weight', [0.5, 2])
def test_orthogonality_term(weight):
    """The sum over both projections, element by element, and its gradient in closed form."""
    module = random_colin(orthogonality=weight)
    losses = module.auxiliary_losses()
    assert list(losses) == ['loss_orthogonal']
    total, gradients = 0.0, {}
    for name, p in module.named_parameters():
        if name.endswith(('.a', '.b')):
            q = p.detach() if name.endswith('.a') else p.detach().T
            difference = q.T @ q - torch.eye(3, dtype=torch.float64)
            total += weight * 3 * sum(float(each) ** 2 for each in difference.flatten())
            gradient = weight * 3 * 4 * q @ difference
            gradients[name] = gradient if name.endswith('.a') else gradient.T
    assert_near(losses['loss_orthogonal'], torch.tensor(total, dtype=torch.float64), 1e-12)
    losses['loss_orthogonal'].backward()
    actual = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    assert_near(actual, gradients, 1e-12)


def test_no_orthogonality_term():
    assert not random_colin(orthogonality=0).auxiliary_losses()


def test_orthogonality_term_in_half_precision():
    """Squares of bfloat16 values are summed in float32."""
    module = random_colin().to(torch.bfloat16)
    term = module.auxiliary_losses()['loss_orthogonal']
    assert term.dtype == torch.float32
    assert_near(term, module.float().auxiliary_losses()['loss_orthogonal'])


def test_orthogonality_term_of_shards():
    """What a process has of sharded factors has no term, rather than a wrong one."""
    module = random_colin()
    module.up.a.data = module.up.a.data.flatten()[:7]
    with pytest.raises(ConfigError, match=r'FSDP.*orthogonality=0'):
        module.auxiliary_losses()


def test_initial_values():
    """Factors are averages of the leading singular vectors of Kaiming-uniform matrices, the scales the singular values
    of the second projection's; signs of singular vectors are free, and are the same for both factors."""
    torch.manual_seed(3)
    module = CoLin(12, bottleneck=10, rank=3, branches=2)
    torch.manual_seed(3)
    for linear, shape in ((module.down, (12, 10)), (module.up, (10, 12))):
        bound = shape[0] ** -0.5
        draws = torch.empty(2, *shape).uniform_(-bound, bound)
        bias = torch.empty(shape[1]).uniform_(-bound, bound)
        left, values, right = torch.linalg.svd(draws.double(), full_matrices=False)
        for k in range(3):
            pairs = [
                ((left[0, :, k] * s + left[1, :, k] * t) / 2, (right[0, k] * s + right[1, k] * t) / 2)
                for s, t in product((1, -1), repeat=2)
            ]
            distances = [
                max((linear.a[:, k] - a).abs().max().item(), (linear.b[k] - b).abs().max().item()) for a, b in pairs
            ]
            assert min(distances) < 1e-6
        assert_near(linear.bias.detach(), bias)
    assert_near(module.g.detach().double(), values[:, :3], 1e-6)
    assert module.depthwise.weight.abs().max() <= 1 / 3 and module.depthwise.weight.std() > 0.15
    assert module.depthwise.gate.eq(0).all()


def test_wide_and_narrow_projections_begin_alike():
    """A stream narrower than the bottleneck, as Swin-T's first stage: the same averages, of orthonormal columns."""
    for channels in (96, 384):
        module = CoLin(channels)
        for factor in (module.down.a, module.down.b.T, module.up.a, module.up.b.T):
            assert_near(factor.norm(dim=0).detach(), torch.full((28,), 0.5), 0.5)
        assert (module.g.diff(dim=1) <= 0).all() and (module.g > 0).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(rank=0), 'CoLin: rank=0'),
        (dict(branches=1.5), r'CoLin: branches=1\.5'),
        (dict(orthogonality=-1), r'CoLin: orthogonality=-1 must be a number of at least 0'),
        (dict(rank=13), 'rank=13 must be at most 12, the smaller of the width 12 and bottleneck=100'),
        (dict(bottleneck=2, rank=3), 'rank=3 must be at most 2'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CoLin(12, **arguments)
