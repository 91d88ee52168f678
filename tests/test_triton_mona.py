"""Mona's Triton kernels: in the interpreter on a CPU, through the compiler for GPUs that are not there, and on one."""

import re
import warnings

import pytest
import torch
from conftest import needs_gpu
from helpers import assert_near, command

from mona_mm.methods import Mona, fast_mona
from mona_mm.nn.choice import Ways

GRIDS = {'odd': (2, (5, 9), 0), 'class and register tokens': (3, (7, 6), 5), 'large': (2, (50, 76), 0)}


@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_in_the_interpreter(which, monkeypatch):
    """Every kernel against the plain form of its part, and a whole Mona."""
    pytest.importorskip('triton')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    options = ('--noconftest', '-q', '-p', 'no:cacheprovider', '-m', which)
    found = command('-m', 'pytest', *options, 'tests/interpreted_kernels.py')
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert int(re.search(r'(\d+) passed', found.stdout)[1]) > 20 and 'skipped' not in found.stdout


def types(kernel, dtype: str, constants: dict) -> dict[str, str]:
    """The types of a kernel's arguments: what is in the type of the product, what is in float32, and whole numbers."""
    halves = {'out', 'hidden', 'tokens', 'grad', 'kernel'} if 'base' not in kernel.arg_names else {'hidden'}
    wide = {'x', 'weight', 'bias', 'gamma', 'gammax', 'projection', 'projection_bias', 'mean', 'rstd', 'base', 'sums'}
    found = dict.fromkeys(kernel.arg_names, 'i32') | dict.fromkeys(wide, '*fp32') | dict.fromkeys(halves, f'*{dtype}')
    found |= dict(eps='fp32', scale='fp32', mask='*u8') | dict.fromkeys(constants, 'constexpr')
    if 'x' in kernel.arg_names or 'base' in kernel.arg_names:
        found['tokens'] = 'i32'
    if 'base' in kernel.arg_names:
        found['out'] = '*fp32'
    return {name: found[name] for name in kernel.arg_names}


KERNELS = {
    'down': dict(HAS_NORM=True),
    'up': dict(SIGN=1, HAS_MASK=True),
    'convolve': dict(SIZE=7, HAS_BIAS=True, ROWS=32, NARROW=64),
    'filter': dict(SIZE=7, TAPS=8, ROWS=32, NARROW=64),
}
COMPILED = [('convolve', 'bf16', 90), ('up', 'bf16', 90)]


@pytest.mark.parametrize(
    ('name', 'dtype', 'capability'),
    [
        pytest.param(name, dtype, cap, marks=[] if (name, dtype, cap) in COMPILED else [pytest.mark.slow])
        for name in KERNELS
        for dtype in ('fp32', 'bf16')
        for cap in (80, 90)
    ],
)
def test_compiled_for_a_gpu(name, dtype, capability, monkeypatch):
    """Triton compiles every kernel to machine code of an A100 and an H100, in little time and shared memory; half
    precision is multiplied by tensor cores. A whole unrolled depthwise kernel took the compiler more than a minute."""
    compiler = pytest.importorskip('triton.compiler')
    target = pytest.importorskip('triton.backends.compiler').GPUTarget('cuda', capability, 32)
    from mona_mm.methods import triton_mona

    if 'Interpreted' in type(triton_mona._up_kernel).__name__:
        pytest.skip('Triton interprets kernels here')
    kernel, constants = getattr(triton_mona, f'_{name}_kernel'), KERNELS[name]
    if name in ('down', 'up'):
        rows, wide, narrow = triton_mona._blocks(torch.float32 if dtype == 'fp32' else torch.bfloat16, 64)
        constants = dict(**constants, ROWS=rows, WIDE=wide, NARROW=narrow, PRECISION='ieee', WIDENS=False)
    source = compiler.ASTSource(fn=kernel, signature=types(kernel, dtype, constants), constexprs=constants)
    compiled = compiler.compile(source, target=target)
    assert compiled.asm['cubin'] and compiled.metadata.shared < 99 * 2**10
    if name in ('down', 'up') and dtype == 'bf16':
        assert re.search('wgmma|mma.sync', compiled.asm['ptx'])


def test_a_kernel_that_fails(monkeypatch):
    """It is warned of once, and is not chosen; running out of memory is no fault of a kernel."""
    triton_mona = pytest.importorskip('mona_mm.methods.triton_mona')

    def broken(*args):
        raise KeyError('no such instruction')

    kernel = triton_mona._reported(broken)
    ways = Ways('test of a kernel that fails', stock=lambda x: x + 1, kernel=kernel)
    monkeypatch.setattr('mona_mm.nn.choice._measures', True)
    with pytest.warns(UserWarning, match="kernel of 'broken' failed, so other forms are used: KeyError") as warned:
        assert ways(torch.zeros(2), key=(1,)).tolist() == [1, 1]
        assert ways(torch.zeros(2), key=(2,)).tolist() == [1, 1]
    assert len(warned) == 1

    def full(*args):
        raise torch.OutOfMemoryError('full')

    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter('error')
        triton_mona._reported(full)(torch.zeros(1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_where_kernels_fit(dtype, monkeypatch):
    """Never on a CPU; elsewhere for the types and sizes that they are written for."""
    assert not fast_mona.kernels_fit(torch.zeros(1, 2, 3, dtype=dtype), 64, 7)
    x = torch.zeros(1, 2, 3, dtype=dtype)
    on_gpu = type('OnGPU', (), dict(device=torch.device('cuda'), dtype=dtype))()
    if pytest.importorskip('triton'):
        assert fast_mona.kernels_fit(on_gpu, 64, 7) == (x.dtype != torch.float64)
        assert not fast_mona.kernels_fit(on_gpu, 512, 7) and not fast_mona.kernels_fit(on_gpu, 64, 9)


def on_gpu(module: Mona, form: str, x: torch.Tensor, hw, autocast: torch.dtype | None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(7)
    with torch.autocast('cuda', autocast or torch.bfloat16, enabled=autocast is not None):
        out = getattr(module, form)(x, hw)
    out.backward(torch.ones_like(out) * torch.linspace(-1, 1, out.shape[-1], device=out.device))
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@needs_gpu
@pytest.mark.parametrize('kernel_sizes', [(3, 5, 7), (3,)], ids=str)
@pytest.mark.parametrize('bottleneck', [64, 48])
@pytest.mark.parametrize('form', ['_by_kernels', '_by_convolution_kernels'])
@pytest.mark.parametrize('grid', GRIDS)
def test_on_a_gpu(grid, form, bottleneck, kernel_sizes, monkeypatch):
    """As the plain form in float32, with the same mask; in half precision as near to it as the plain form is."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    batch, hw, extra = GRIDS[grid]
    module = Mona(128, bottleneck, kernel_sizes).train().cuda()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(batch, extra + hw[0] * hw[1], 128, device='cuda')
    exact = on_gpu(module, '_plain', x, hw, None)
    assert_near(on_gpu(module, form, x, hw, None), exact, 3e-5)
    for dtype in (torch.bfloat16, torch.float16):
        plain, found = (on_gpu(module, f, x, hw, dtype) for f in ('_plain', form))
        for e, p, f in zip(exact, plain, found, strict=True):
            distances = [(t.float() - e).norm() / e.norm() for t in (p, f)]
            assert f.dtype == p.dtype and distances[1] <= 3 * distances[0] + 3e-3, distances
