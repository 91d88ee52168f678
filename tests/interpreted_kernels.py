"""The Triton kernels of Mona on a CPU, by Triton's interpreter, against the plain forms of the same parts.

TRITON_INTERPRET=1 has to be set before Triton is imported, so test_triton_mona.py runs this file in a process of its
own.
"""

import pytest
import torch
from helpers import assert_near
from torch import Tensor

from mona_mm.methods import fast_mona, triton_mona

# The grid, other tokens, channels, bottleneck and kernel size, with a batch: none a multiple of the blocks' sides.
CASES = {
    'odd': (2, (3, 7), 0, 96, 64, 7),
    'class and register tokens': (2, (5, 4), 5, 40, 48, 3),
    'one token': (1, (1, 1), 1, 24, 16, 5),
    'wide': (1, (3, 13), 0, 200, 72, 7),
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The largest difference as a share of the largest value: that of one rounding of a result, and of its factors."""

SLOW = pytest.mark.slow

on_cases = pytest.mark.parametrize(
    ('case', 'dtype'),
    [
        pytest.param(case, dtype, marks=[] if 'class' in case or case == 'odd' and dtype.itemsize == 4 else [SLOW])
        for case in CASES
        for dtype in TOLERANCES
    ],
    ids=str,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def assert_as_near(found: Tensor, plain: Tensor, exact: Tensor, least: float) -> None:
    """A result is about as near to the exact one as the plain form's: the interpreter truncates where it should round,
    which doubles the errors and makes their signs equal."""
    distances = [((t.float() - exact).norm() / exact.norm()).item() for t in (plain, found)]
    assert found.dtype == plain.dtype and distances[1] <= 5 * distances[0] + least, distances


def test_is_interpreted():
    assert 'Interpreted' in type(triton_mona._up_kernel).__name__


@on_cases
@pytest.mark.parametrize('has_norm', [True, False], ids=['norm', 'no norm'])
def test_down(case, dtype, has_norm):
    """A mean far from zero, too."""
    batch, hw, extra, channels, width, _ = CASES[case]
    x = normal(batch, extra + hw[0] * hw[1], channels) * 2 + 30
    norm = [normal(channels) + i for i in range(4)] if has_norm else [None] * 4
    params = [*norm, normal(width, channels) * 0.1, normal(width)]
    eps = 1e-5 if has_norm else None
    found, expected = triton_mona.down(x, eps, params, dtype), fast_mona._down(x, eps, params, dtype)
    exact = fast_mona._down(x, eps, params, torch.float32)[0]
    assert_as_near(found[0], expected[0], exact, TOLERANCES[dtype])
    if has_norm:
        assert_near(found[1:], expected[1:])
    else:
        assert found[1:] == (None, None)


@on_cases
def test_convolve(case, dtype):
    """With and without a bias; and the gradient of the input by the flipped kernel."""
    batch, hw, extra, _, width, size = CASES[case]
    tokens = normal(batch, extra + hw[0] * hw[1], width).to(dtype)
    kernel, bias = normal(width, 1, size, size).to(dtype), normal(width).to(dtype)
    grad = normal(batch, hw[0] * hw[1], width).to(dtype)
    wide = tokens.float().requires_grad_()
    expected = fast_mona._convolve(wide, hw, kernel.float(), bias.float())
    expected.backward(grad.float())
    found = triton_mona.convolve(tokens, hw, kernel, bias)
    assert_near(found, expected.detach().to(dtype), TOLERANCES[dtype])
    without = fast_mona._convolve(tokens.float(), hw, kernel.float())
    assert_near(triton_mona.convolve(tokens, hw, kernel), without.to(dtype), TOLERANCES[dtype])
    of_tokens = triton_mona.convolve(grad, hw, kernel.flip(2, 3))
    assert_near(of_tokens, wide.grad[:, extra:].to(dtype), TOLERANCES[dtype])


@on_cases
@pytest.mark.parametrize('chunks', [256, 2])
def test_filter_gradients(case, dtype, chunks, monkeypatch):
    """From few places and from several steps of one program, with sums in float32."""
    monkeypatch.setattr(triton_mona, '_CHUNKS', chunks)
    batch, hw, extra, _, width, size = CASES[case]
    tokens = normal(batch, extra + hw[0] * hw[1], width).to(dtype)
    grad = normal(batch, hw[0] * hw[1], width).to(dtype)
    found = triton_mona.filter_gradients(grad, tokens, hw, size)
    assert_near(found, fast_mona._filter_sums(grad.float(), tokens.float(), hw, size))


@on_cases
@pytest.mark.parametrize('drops', [True, False], ids=['dropout', 'no dropout'])
def test_up(case, dtype, drops):
    """And subtracting the branch again gives the tokens."""
    batch, hw, extra, channels, width, _ = CASES[case]
    tokens = extra + hw[0] * hw[1]
    base, hidden = normal(batch, tokens, channels), normal(batch, tokens, width).to(dtype)
    mask = normal(batch, tokens, width) > -0.5 if drops else None
    weight, bias, drop = normal(channels, width) * 0.1, normal(channels), 0.3 if drops else 0.0
    activated = fast_mona._dropped(torch.nn.functional.gelu(hidden.float()), mask, drop).to(dtype).float()
    expected = base + torch.nn.functional.linear(activated, weight.to(dtype).float(), bias)
    out = triton_mona.up(base, hidden, mask, drop, weight, bias)
    assert_near(out, expected, TOLERANCES[dtype])
    assert_near(triton_mona.up(out, hidden, mask, drop, weight, bias, -1), base, 1e-6)


def step(case: str, kernels: str, autocast: bool) -> list[Tensor]:
    """The output and all gradients of a Mona with dropout, with the random numbers of a seed."""
    batch, hw, extra, channels, width, size = CASES[case]
    leaves = [normal(batch, extra + hw[0] * hw[1], channels)]
    leaves += [normal(channels) + i for i in range(4)]
    shapes = [(width, channels), (width,), (width, 1, size, size), (width,), (width, 1, 1, 1), (width,)]
    shapes += [(width, width, 1, 1), (width,), (channels, width), (channels,)]
    leaves += [normal(*shape) * 0.2 for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, *norm = leaves[:5]
    down, first, second, pointwise, up = (tuple(leaves[i : i + 2]) for i in range(5, 15, 2))
    torch.manual_seed(3)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        scaled = fast_mona.ScaledNorm(*norm, 1e-5)
        out = fast_mona.mona(x, hw, scaled, down, [first, second], pointwise, up, 0.5, 0.2, kernels=kernels)
    out.backward(normal(*out.shape) + 0.1)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ('case', 'kernels'),
    [
        ('class and register tokens', 'all'),
        pytest.param('class and register tokens', 'convolutions', marks=SLOW),
        pytest.param('odd', 'all', marks=SLOW),
    ],
)
def test_whole_mona(case, kernels):
    """Output and every gradient, with the same dropout mask; under bfloat16 as near to float32 as the plain form."""
    exact = step(case, 'none', False)
    assert_near(step(case, kernels, False), exact, 2e-5)
    plain, found = step(case, 'none', True), step(case, kernels, True)
    for e, p, f in zip(exact, plain, found, strict=True):
        assert_as_near(f, p, e, 3e-3)
