"""Mona's fast form is its plain form: forward, backward, dropout, precision; and it keeps little for the backward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_gpu
from helpers import assert_near
from torch import nn

from mona_mm.benchmark import module as benchmark
from mona_mm.methods import Mona, fast_mona
from mona_mm.nn import choice
from mona_mm.nn.products import linear

GRIDS = {  # (batch, (H, W), extra tokens)
    'odd': (2, (5, 9), 0),
    'one row': (1, (1, 17), 0),
    'smaller than the kernels': (3, (2, 2), 0),
    'class and register tokens': (2, (7, 6), 5),
    'batch 1': (1, (25, 38), 0),
    'tiled filter gradient': (1, (41, 39), 0),
    'tiled filter gradient, batch': (4, (21, 23), 1),
}
VARIANTS = {
    'published': dict(),
    'no norm': dict(scaled_norm=[]),
    'summed': dict(average=False),
    'one kernel': dict(kernel_sizes=[5]),
    'other kernels': dict(kernel_sizes=[1, 3, 9]),
}


def build(channels: int = 24, bottleneck: int = 16, **options) -> Mona:
    """A Mona in train mode, far enough from its initial values for every parameter to matter."""
    module = Mona(channels, bottleneck, **options).train()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def step(module: Mona, x: torch.Tensor, grad: torch.Tensor, hw, fast: bool, autocast: torch.dtype | None = None):
    """Output and all gradients of one seeded step, by name."""
    module = copy.deepcopy(module)
    module.fast = fast
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = module(x, hw)
    assert (type(out.grad_fn).__name__ == '_MonaBackward') == fast
    out.backward(grad.to(out.dtype))
    return {'out': out.detach(), 'x': x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_the_plain_form(grid, variant):
    """Output and all gradients, within 1e-5 in float32 and 1e-12 in float64, with the same dropout mask."""
    batch, hw, extra = GRIDS[grid]
    module = build(**VARIANTS[variant])
    x = torch.randn(batch, extra + hw[0] * hw[1], 24)
    grad = torch.randn_like(x)
    assert_near(step(module, x, grad, hw, True), step(module, x, grad, hw, False), 1e-5)
    module, x, grad = module.double(), x.double(), grad.double()
    assert_near(step(module, x, grad, hw, True), step(module, x, grad, hw, False), 1e-12)


@pytest.mark.parametrize('form', ['autocast', 'pure'])
@pytest.mark.parametrize('grid', GRIDS)
def test_bfloat16_on_every_grid(grid, form):
    """In bfloat16, too, with the same dropout mask: types as the plain form's, and as near to float32 as it is."""
    batch, hw, extra = GRIDS[grid]
    module = build().bfloat16().float()  # numbers that bfloat16 has
    x = torch.randn(batch, extra + hw[0] * hw[1], 24).bfloat16().float()
    grad = torch.randn_like(x).bfloat16().float()
    exact = step(module, x, grad, hw, False)
    if form == 'pure':
        module, x, grad = module.bfloat16(), x.bfloat16(), grad.bfloat16()
    autocast = torch.bfloat16 if form == 'autocast' else None
    plain, fast = (step(module, x, grad, hw, fast, autocast) for fast in (False, True))
    for name, e in exact.items():
        assert fast[name].dtype == plain[name].dtype
        distance = [(t[name].float() - e).norm() / e.norm() for t in (plain, fast)]
        assert distance[1] <= 3 * distance[0] + 3e-3, f'{name}: {distance}'


@needs_gpu
@pytest.mark.parametrize('grid', GRIDS)
def test_cuda(grid, monkeypatch):
    """On a GPU, too: in float32 as above, under bfloat16 within its resolution, and with the same dropout mask."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    batch, hw, extra = GRIDS[grid]
    module = build().cuda()
    x = torch.randn(batch, extra + hw[0] * hw[1], 24, device='cuda')
    grad = torch.randn_like(x)
    assert_near(step(module, x, grad, hw, True), step(module, x, grad, hw, False), 1e-5)
    fast, plain = (step(module, x, grad, hw, fast, torch.bfloat16) for fast in (True, False))
    assert_near(fast, plain, 0.1)


@pytest.mark.parametrize(
    ('variant', 'hw'),
    [
        ('published', (4, 3)),
        ('no norm', (2, 1)),
        pytest.param('published', (2, 1), marks=pytest.mark.slow),
        pytest.param('no norm', (4, 3), marks=pytest.mark.slow),
    ],
)
def test_gradcheck(variant, hw):
    """The analytic gradients are those of finite differences, the input's and every parameter's."""
    module = build(5, 3, dropout=0.0, **VARIANTS[variant]).double()
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(2, 1 + hw[0] * hw[1], 5, dtype=torch.float64, requires_grad=True)

    def forward(x, *parameters):
        for name, p in zip(names, parameters, strict=True):
            owner, _, leaf = name.rpartition('.')
            module.get_submodule(owner)._parameters[leaf] = p
        return module(x, hw)

    assert torch.autograd.gradcheck(forward, (x, *module.parameters()))


@pytest.mark.parametrize('mean', [0, 100])
@pytest.mark.parametrize('form', ['float32', 'autocast bfloat16', 'autocast float16', 'bfloat16'])
def test_precision(form, mean):
    """Measured against float64, the output and every gradient are as good as the plain form's, but for a factor of
    three of its error: also for tokens whose mean is a hundred times their deviation, with an outlying channel as Swins
    have. The errors are those of six draws together, since a single one's is luck."""
    autocast = getattr(torch, form.split()[1]) if ' ' in form else None
    errors = {'plain': {}, 'fast': {}}
    for seed in range(6):
        torch.manual_seed(seed)
        module, hw = build(48, 16, dropout=0.0), (15, 16)
        x = torch.randn(2, 240, 48) + mean
        x[..., 7] *= 30
        grad = torch.randn_like(x) * 1e-2
        exact = step(copy.deepcopy(module).double(), x.double(), grad.double(), hw, False)
        if form == 'bfloat16':
            module, x, grad = module.bfloat16(), x.bfloat16(), grad.bfloat16()
        plain, fast = (step(module, x, grad, hw, fast, autocast) for fast in (False, True))
        for name, reference in exact.items():
            assert fast[name].dtype == plain[name].dtype, name
            for kind, tensors in (('plain', plain), ('fast', fast)):
                error = (tensors[name].double() - reference).norm() / reference.norm()
                errors[kind][name] = errors[kind].get(name, 0) + error.item() / 6
    for name, plain in errors['plain'].items():
        bound = 3 * plain + (1e-6 if form == 'float32' else 1e-3)
        assert errors['fast'][name] < bound, f'{name}: {errors["fast"][name]:.1e}, plain {plain:.1e}'


@pytest.mark.parametrize('form', ['float32', 'autocast', 'bfloat16'])
@pytest.mark.parametrize('times', [1e-3, 1, 30])
def test_input_computed_from_the_output(times, form):
    """Without x, its gradients are as good as with it, also where the branch is many times as large as x: within 1e-5
    of float64's in single precision, and of the plain form's error in bfloat16, where a sum in bfloat16 could not tell
    x from it."""
    autocast = torch.bfloat16 if form == 'autocast' else None
    module, hw = build(48, 16), (15, 16)
    x = torch.randn(2, 240, 48)
    grad = torch.randn_like(x)
    with torch.no_grad():
        branch = module(x, hw) - x
        for p in module.up.parameters():
            p.mul_(times * x.norm() / branch.norm())
    exact = step(copy.deepcopy(module).double(), x.double(), grad.double(), hw, False)
    if form == 'bfloat16':
        module, x, grad = module.bfloat16(), x.bfloat16(), grad.bfloat16()
    plain, fast = (step(module, x, grad, hw, fast, autocast) for fast in (False, True))
    for name, reference in exact.items():
        errors = [
            ((form[name].double() - reference).abs().max() / reference.abs().max()).item() for form in (plain, fast)
        ]
        assert errors[1] < (1e-5 if form == 'float32' else 3 * errors[0] + 1e-3), f'{name}: {errors}'


def test_output_changed_in_place():
    """Whatever changes the output, from which x is computed, in place is refused: nothing wrong is computed."""
    for form in (torch.float32, torch.bfloat16):
        module, x = build().to(form), torch.randn(2, 132, 24, dtype=form, requires_grad=True)
        with pytest.raises(RuntimeError, match='modified.*inplace'):
            module(x, (12, 11)).mul_(2).sum().backward()


def test_gradient_scaler():
    """float16 under a scaler: the unscaled gradients are those of float32, and none is lost."""
    module = build(dropout=0.0)
    x, hw = torch.randn(2, 120, 24), (12, 10)
    reference = step(module, x, torch.full_like(x, 1e-7), hw, False)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.autocast('cpu', torch.float16):
        out = module(x, hw)
    scaler.scale(out.sum() * 1e-7).backward()
    scaler.unscale_(optimizer)
    for name, p in module.named_parameters():
        assert_near(p.grad, reference[name], 0.05)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_kept_for_the_backward_pass(autocast):
    """Beside the parameters: the output, which a LayerNorm behind keeps anyway, the hidden state in the type it is
    computed in, a byte of mask for each of its numbers and two numbers a token. The plain form keeps more than 2.9
    times that, x among it."""
    channels, hidden, hw = 128, 64, (16, 16)
    module = Mona(channels).train()
    x = torch.randn(1, 256, channels, requires_grad=True)

    def kept(fast):
        module.fast = fast
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        storages = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        mixed = torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), mixed:
            out = module(x, hw)
        assert (x.untyped_storage().data_ptr() in storages) == (not fast)
        assert (out.untyped_storage().data_ptr() in storages) == fast
        return sum(storages.values())

    width = 4 if autocast is None else 2
    weights = width * (hidden * 49 + hidden + hidden * hidden + hidden)  # merged kernel, and the 1x1 in this type
    bound = 256 * (4 * channels + width * hidden + hidden + 8) + weights
    assert kept(True) <= bound
    assert kept(False) > 2.9 * (bound - weights)


def test_frozen_parts():
    """What needs no gradient gets none, and the others' are the same: the input's, one parameter's, all but one's."""
    x, hw = torch.randn(2, 130, 24), (13, 10)
    module = build()
    full = step(module, x, torch.ones_like(x), hw, True)
    names = [name for name, _ in module.named_parameters()]
    for trained in [
        set(),
        {'up.bias'},
        {'entrance.gammax'},
        {'depthwise.1.weight'},
        {'pointwise.bias'},
        set(names[1:]),
    ]:
        for input_trains in (True, False):
            if not (trained or input_trains):
                continue
            for name, p in module.named_parameters():
                p.requires_grad_(name in trained)
                p.grad = None
            own = x.clone().requires_grad_(input_trains)
            torch.manual_seed(7)
            module(own, hw).backward(torch.ones_like(x))
            actual = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            assert actual.keys() == trained
            if input_trains:
                actual['x'] = own.grad
            assert_near(actual, {name: full[name] for name in actual})


def test_input_in_another_layout_and_copies():
    """A transposed input is as good as a contiguous one; copies of the module, pickled ones too, work alone."""
    module, hw = build(dropout=0.0), (11, 12)
    x = torch.randn(24, 132, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    grad = torch.randn(2, 132, 24)
    expected = step(module, x.contiguous(), grad, hw, False)
    assert_near(step(module, x, grad, hw, True), expected, 1e-5)
    assert_near(
        step(pickle.loads(pickle.dumps(module)), x, grad.permute(1, 2, 0).contiguous().permute(2, 0, 1), hw, True),
        expected,
        1e-5,
    )


def test_what_falls_back_to_the_plain_form(monkeypatch):
    """`fast = False`, a scaled norm before the 1x1, a hooked or replaced part, foreign types, few tokens on a CPU."""
    x, hw = torch.randn(2, 132, 24, requires_grad=True), (12, 11)

    def is_fast(module, x=x):
        return type(module(x, hw).grad_fn).__name__ == '_MonaBackward'

    assert is_fast(build())
    plain = build()
    plain.fast = False
    assert not is_fast(plain)
    assert not is_fast(build(scaled_norm=['down', 'pointwise']))
    hooked = build()
    seen = []
    hooked.up.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert not is_fast(hooked) and seen

    class Replaced(nn.Linear):
        pass

    replaced = build()
    replaced.down = Replaced(24, 16)
    assert not is_fast(replaced)
    assert not is_fast(build(), x.bfloat16())
    assert is_fast(build())


def test_no_images():
    """An empty batch goes through the plain form."""
    assert build()(torch.zeros(0, 12, 24), (3, 4)).shape == (0, 12, 24)


def test_without_onednn():
    """Where torch has no oneDNN, or it is switched off, the results are the same."""
    module, hw = build(dropout=0.0), (40, 41)
    x = torch.randn(2, 1640, 24)
    expected = step(module, x, x, hw, True)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_near(step(module, x, x, hw, True), expected, 1e-5)


def test_weights_that_onednn_is_slow_with(monkeypatch):
    """A weight that is neither contiguous nor the transpose of a contiguous one is no oneDNN's: it takes minutes."""
    taken = []
    monkeypatch.setattr(torch.ops.mkldnn, '_linear_pointwise', lambda x, w, *args: taken.append(w) or x @ w.t())
    x, matrix = torch.randn(5, 8), torch.randn(8, 8)
    for weight, fits in ((matrix, True), (matrix.t(), True), (torch.randn(8, 16)[:, ::2], False)):
        taken.clear()
        assert_near(linear(x, weight), x @ weight.t())
        assert bool(taken) == fits


def test_benchmark():
    """A row for every variant; the ratios are to the fast form, and the results are the published formula's."""
    rows = list(benchmark.run(repeats=2, hosts=['swin_b'], sizes=[(40, 72)]))
    assert [r.variant for r in rows] == list(benchmark.VARIANTS)
    fast, plain, published, _ = rows
    assert fast.ratio == 1 and fast.step > 0 and published.ratio > 0
    assert fast.difference < 1e-5 and plain.difference < 1e-5
    assert fast.kept < published.kept
    lines = [*benchmark.header(fast).splitlines(), *map(benchmark.line, rows)]
    assert {line.count('|') for line in lines} == {11}


def test_transforms():
    """torch.compile makes one graph of it, tracing works, torch.func differentiates it, all by the plain form; twice
    differentiating the fast form is an error that says so."""
    module, hw = build(dropout=0.0), (3, 4)
    x = torch.randn(2, 12, 24)
    expected = module(x, hw)
    compiled = torch.compile(lambda x: module(x, hw), fullgraph=True, backend='aot_eager')
    assert_near(compiled(x), expected)

    class OnGrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.mona = module

        def forward(self, x):
            return self.mona(x, hw)

    assert_near(torch.jit.trace(OnGrid(), x)(x), expected)
    own = x.clone().requires_grad_()
    module(own, hw).square().sum().backward()
    actual = torch.func.grad(lambda x: module(x, hw).square().sum())(x)
    assert_near(actual, own.grad)
    (gradient,) = torch.autograd.grad(module(own, hw).square().sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


@pytest.mark.parametrize('trains', ['all', 'input', 'down', 'up', 'filters'])
@pytest.mark.parametrize('extra', [0, 1])
@pytest.mark.parametrize('scaled_norm', [(), ('down',)], ids=['no norm', 'norm'])
def test_kept_or_recomputed(scaled_norm, extra, trains):
    """With its intermediate results kept, output and gradients are those of the form that computes them again."""
    results = []
    for form in (Mona._fast, Mona._kept):
        torch.manual_seed(0)
        module = build(scaled_norm=scaled_norm).requires_grad_(trains == 'all')
        parts = dict(down=['down', 'entrance'], up=['up'], filters=['depthwise']).get(trains, [])
        for part in parts:
            getattr(module, part).requires_grad_(True)
        torch.manual_seed(1)
        x = torch.randn(2, 60 + extra, 24, requires_grad=trains in ('all', 'input'))
        torch.manual_seed(2)
        out = form(module, x, (6, 10))
        (out * torch.linspace(-1, 1, 24)).sum().backward()
        results.append([out.detach(), *(t.grad for t in (x, *module.parameters()) if t.requires_grad)])
    assert len(results[0]) > 1
    assert_near(results[1], results[0], 1e-5)


@pytest.mark.parametrize('probability', [0.1, 0.5, 0.9, 1e-6, 1 - 1e-9])
def test_masks_of_fewer_random_numbers(probability):
    """Each element is dropped with the probability that is returned, which is the one asked for within 2^-17, and the
    mean of a constant stays what it is."""
    torch.manual_seed(0)
    mask, used = fast_mona._draw_mask(torch.empty(3, 333_333), probability, exact=False)
    assert mask.dtype == torch.bool and mask.shape == (3, 333_333)
    assert used == pytest.approx(min(probability, 1 - 2**-16), abs=2**-17) and used < 1
    count, deviation = mask.numel(), (mask.numel() * used * (1 - used)) ** 0.5
    assert abs((~mask).sum().item() - count * used) <= 5 * deviation
    halves = [part.float().mean() for part in mask.flatten()[:999_996].view(-1, 4).unbind(1)]
    assert max(abs(half.item() - (1 - used)) for half in halves) <= 5 * 2 * deviation / count + 1e-9


def test_exact_masks():
    """With ``fast='exact'``, or where choices are fixed, the mask is that of ``torch.nn.functional.dropout``."""
    x = torch.randn(1, 12, 24)
    masks = []
    for fast, measured in ((True, True), ('exact', True), (True, False)):
        choice.measure(measured)
        module = build(dropout=0.5)
        module.fast = fast
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_mona, '_draw_mask', lambda *args: masks.append(args[2]) or (args[0] > 0, 0.5))
            module._fast(x, (3, 4))
    assert masks == [False, True, True]
    torch.manual_seed(3)
    mask, used = fast_mona._draw_mask(x, 0.3, exact=True)
    torch.manual_seed(3)
    assert torch.equal(mask, F.dropout(torch.ones_like(x), 0.3) != 0) and used == 0.3
