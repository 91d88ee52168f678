"""Tuning of single weights, and SPT's structured modules."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HOSTS
from helpers import assert_equal, assert_near
from mmcv.cnn.bricks.wrappers import Linear as MmcvLinear
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.benchmark import spt as benchmark
from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules, method_names
from mona_mm.spt import sparse
from mona_mm.spt.sparse import (
    attach_sparse,
    grad_by_dense_product,
    grad_by_gather,
    grad_by_sampled_product,
    merge_sparse,
    sparse_deltas,
    sparse_weight_grad,
)
from mona_mm.spt.structured import StructuredAdapter, StructuredLoRA

FORMS = [grad_by_dense_product, grad_by_gather, grad_by_sampled_product, sparse_weight_grad]


def some(count: int, size: int) -> torch.Tensor:
    return torch.randperm(size)[:count]


@pytest.mark.parametrize('form', FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('count', [1, 2, 17, 100, 500, 35 * 21])
def test_each_form_is_the_dense_gradient_at_the_chosen_weights(form, count, monkeypatch):
    """In float64, for random sets from one weight to all, also where the work is done in pieces."""
    monkeypatch.setattr(sparse, '_ROWS', 50)
    monkeypatch.setattr(sparse, '_ELEMENTS', 1300)
    for seed in range(5):
        torch.manual_seed(seed)
        grad, x = torch.randn(130, 35, dtype=torch.float64), torch.randn(130, 21, dtype=torch.float64)
        indices = some(count, 35 * 21).sort().values.int()
        expected = (grad.T @ x).flatten()[indices.long()]
        assert_near(form(grad, x, indices), expected, 1e-6)


@pytest.mark.parametrize('form', FORMS, ids=lambda f: f.__name__)
def test_forms_of_no_tokens_and_of_half_precision(form):
    """Nothing gives zero; bfloat16 inputs give the sums of their products as exactly as the output's dtype can."""
    indices = torch.tensor([0, 3, 5], dtype=torch.int32)
    assert (form(torch.zeros(0, 2), torch.zeros(0, 3), indices) == 0).all()
    grad, x = torch.randn(600, 2).bfloat16(), torch.randn(600, 3).bfloat16()
    expected = (grad.double().T @ x.double()).flatten()[indices.long()]
    actual = form(grad, x, indices)
    tolerance = 1e-2 if actual.dtype == torch.bfloat16 else 1e-5
    assert_near(actual.double(), expected, tolerance)


@pytest.mark.parametrize('count', [1, 6, 7 * 5])
@pytest.mark.parametrize('cls', [nn.Linear, MmcvLinear])
def test_linear_gradcheck(count, cls):
    """Every gradient of the module against finite differences: input, weight delta, bias delta."""
    linear = cls(5, 7).double()
    weight = attach_sparse(linear, some(count, 35))
    bias = attach_sparse(linear, [1, 4], 'bias')
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(weight.values)

    def function(x, values, bias_values):
        return torch.func.functional_call(linear, {'peft.weight.values': values, 'peft.bias.values': bias_values}, x)

    assert torch.autograd.gradcheck(function, (x, weight.values, bias.values))


def reference(module, deltas, x, call):
    """Output, input gradient and delta gradients of a copy whose whole parameters train, by ordinary autograd."""
    stock = copy.deepcopy(module)
    merge_sparse(stock)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    for name in deltas:
        stock.get_parameter(name).requires_grad = True
    out = call(stock, x)
    out.square().sum().backward()
    return out, x.grad, {n: stock.get_parameter(n).grad.flatten()[d.indices.long()] for n, d in deltas.items()}


MODULES = {
    'linear': (lambda: nn.Linear(6, 10), (4, 3, 6), dict(weight=20, bias=3)),
    'linear_without_bias': (lambda: nn.Linear(6, 10, bias=False), (4, 6), dict(weight=2)),
    'linear_vector': (lambda: nn.Linear(6, 10), (6,), dict(weight=60)),
    'linear_bias_only': (lambda: nn.Linear(6, 10), (4, 6), dict(bias=2)),
    'layer_norm': (lambda: nn.LayerNorm(6), (4, 3, 6), dict(weight=2, bias=3)),
    'conv': (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5), dict(weight=9, bias=1)),
    'channels_last': (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 5, 5), dict(weight=9)),
}


@pytest.mark.parametrize('needs_grad', [True, False], ids=['input_grad', 'no_input_grad'])
@pytest.mark.parametrize('kind', MODULES)
def test_any_module_against_autograd(kind, needs_grad):
    """Outputs and gradients equal those of the merged module whose whole parameters train; the base gets none; the
    merged module's output is equal bit for bit and its class the stock one. In the channels-last format, which the
    effective weight does not have, equal to rounding."""
    build, shape, counts = MODULES[kind]
    same = partial(assert_near, relative=1e-12) if kind == 'channels_last' else assert_equal
    module = build().double()
    stock, names = type(module), {n for n, _ in module.named_parameters()}
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=needs_grad)
    plain = module(x)
    deltas = {n: attach_sparse(module, some(count, module.get_parameter(n).numel()), n) for n, count in counts.items()}
    same(module(x), plain)
    for delta in deltas.values():
        nn.init.normal_(delta.values)
    out = module(x)
    out.square().sum().backward()
    expected, grad_x, grads = reference(module, deltas, x, lambda m, x: m(x))
    same(out, expected)
    if needs_grad:
        assert_near(x.grad, grad_x, 1e-12)
    for name, delta in deltas.items():
        assert_near(delta.values.grad, grads[name], 1e-6)
    assert all(module.get_parameter(n).grad is None or n not in counts for n in names)
    for name in names:
        assert_equal(module.get_parameter(name), before[name])
    assert names < {n for n, _ in module.named_parameters()} and isinstance(module, stock)
    added = {n for n, _ in module.named_parameters()} - names
    assert all(f'.{n}'.startswith('.peft.') for n in added)

    merged = merge_sparse(module)
    assert set(merged) == set(counts) and type(module) is stock and not hasattr(module, 'peft')
    assert_equal(module(x), expected)


def test_non_contiguous_input():
    """A transposed input and a transposed gradient give what their copies give."""
    linear = nn.Linear(6, 8).double()
    delta = attach_sparse(linear, some(5, 48))
    nn.init.normal_(delta.values)
    x = torch.randn(6, 9, 2, dtype=torch.float64)
    grads = []
    for given in (x.permute(2, 1, 0), x.permute(2, 1, 0).contiguous()):
        delta.values.grad = None
        given = given.detach().requires_grad_()
        linear(given).transpose(0, 2).square().sum().backward()
        grads.append((given.grad, delta.values.grad))
    assert_near(*grads, 1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the module computes bit for bit what the merged stock linear does, its gradients agree with that
    one's to half precision, and the deltas' gradients stay in single precision."""
    linear = nn.Linear(24, 16)
    delta = attach_sparse(linear, some(30, 24 * 16))
    nn.init.normal_(delta.values, std=0.1)
    x = torch.randn(5, 7, 24, requires_grad=True)

    def call(module, x):
        with torch.autocast('cpu', dtype=dtype):
            return module(x)

    out = call(linear, x)
    assert out.dtype == dtype
    out.square().sum().backward()
    expected, grad_x, grads = reference(linear, dict(weight=delta), x, call)
    assert_equal(out, expected)
    assert x.grad.dtype == delta.values.grad.dtype == torch.float32
    assert_near(x.grad, grad_x, 2e-2)
    assert_near(delta.values.grad, grads['weight'], 2e-2)


def test_autocast_leaves_double_precision_alone_and_mixed_types_fail_as_in_a_stock_linear():
    linear = nn.Linear(4, 4).double()
    attach_sparse(linear, [0])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert linear(torch.zeros(1, 4, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(RuntimeError, match='dtype'):
        linear(torch.zeros(1, 4))


def test_on_the_meta_device():
    """Shapes without values: a plan attaches, counts and runs there."""
    linear = nn.Linear(4, 5, device='meta')
    delta = attach_sparse(linear, [1, 7])
    linear(torch.zeros(2, 4, device='meta')).sum().backward()
    assert delta.values.grad.shape == (2,) and delta.values.is_meta


def test_saved_for_backward_is_the_input_and_no_copy_of_the_weight():
    """Beside the input, the graph keeps only the frozen weight itself and the K values."""
    linear = nn.Linear(32, 64)
    delta = attach_sparse(linear, some(10, 2048))
    x = torch.randn(4, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear(x)
    assert set(saved) == {x.data_ptr(), linear.weight.data_ptr(), delta.values.data_ptr()}


@pytest.mark.parametrize('optimizer', [
    lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)
], ids=['sgd', 'adamw'])  # fmt: skip
def test_all_weights_chosen_is_ordinary_training(optimizer):
    """Ten steps with every weight and bias of a layer chosen end where ten steps of the layer itself end."""
    sparse_net = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 5)).double()
    net = copy.deepcopy(sparse_net)
    for m in (sparse_net[0], sparse_net[2]):
        for name in ('weight', 'bias'):
            attach_sparse(m, torch.arange(m.get_parameter(name).numel()), name)
    for p in (*net[3].parameters(), *sparse_net[3].parameters()):
        p.requires_grad = False
    before = net[0].weight.detach().clone()
    x, target = torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    for model in (net, sparse_net):
        step = optimizer([p for p in model.parameters() if p.requires_grad])
        for _ in range(10):
            step.zero_grad()
            F.mse_loss(model(x), target).backward()
            step.step()
    merge_sparse(sparse_net)
    assert (net[0].weight - before).abs().max() > 0.01
    for p, q in zip(net.parameters(), sparse_net.parameters(), strict=True):
        assert_near(p, q, 1e-9)


def test_optimizer_state_is_of_the_size_of_the_delta():
    linear = nn.Linear(50, 40)
    attach_sparse(linear, some(7, 2000))
    linear.bias.requires_grad = False
    optimizer = torch.optim.AdamW([p for p in linear.parameters() if p.requires_grad])
    linear(torch.randn(3, 50)).sum().backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert [t.shape for t in state] == [(7,), (7,)] and linear.weight.grad is None


@pytest.mark.parametrize('way', ['deepcopy', 'pickle', 'state_dict'])
def test_copies(way):
    """A copy computes the same, is independent of its source, and its delta is whole: values and indices."""

    def build(seed):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
        attach_sparse(module[0], some(4, 30))
        attach_sparse(module[1], [0, 3])
        return module

    module = build(0)
    for delta in sparse_deltas(module).values():
        nn.init.normal_(delta.values)
    if way == 'deepcopy':
        twin = copy.deepcopy(module)
    elif way == 'pickle':
        twin = pickle.loads(pickle.dumps(module))
    else:
        twin = build(1)  # with other indices: the file's count
        twin.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(3, 6)
    expected = module(x)
    assert_equal(twin(x), expected)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert_equal(twin(x), expected)
    merge_sparse(twin)
    assert_equal(twin(x), expected)
    assert type(twin[0]) is nn.Linear


def test_a_damaged_delta_is_refused():
    """Indices outside of the parameter, twice or in disorder would train or change other weights."""
    linear = nn.Linear(6, 5)
    attach_sparse(linear, [1, 2, 3])
    for wrong, reason in (([1, 2, 30], 'outside'), ([1, 1, 2], 'ascending'), ([3, 2, 4], 'ascending')):
        state = linear.state_dict() | {'peft.weight.indices': torch.tensor(wrong, dtype=torch.int32)}
        with pytest.raises(RuntimeError, match=f'peft.weight.indices: .*{reason}'):
            linear.load_state_dict(state)
    with pytest.raises(RuntimeError, match='size mismatch'):
        linear.load_state_dict(linear.state_dict() | {'peft.weight.indices': torch.arange(4)})


@pytest.mark.parametrize(
    ('indices', 'name', 'match'),
    [
        ([], 'weight', 'at least one whole number'),
        ([0.5], 'weight', 'at least one whole number'),
        ([[1]], 'weight', 'at least one whole number'),
        ([-1, 0], 'weight', 'from -1 to 0'),
        ([30], 'weight', r'from 30 to 30 .* shape \(5, 6\)'),
        ([2, 2], 'weight', 'ascending'),
        ([0], 'gamma', "no parameter 'gamma'.*weight, bias"),
    ],
)
def test_bad_input(indices, name, match):
    """One error that names what is wrong, and a module that is as it was."""
    linear = nn.Linear(6, 5)
    with pytest.raises(ConfigError, match=match):
        attach_sparse(linear, indices, name)
    assert type(linear) is nn.Linear and linear.weight.requires_grad


def test_twice_or_beside_another_method():
    linear = nn.Linear(6, 5)
    attach_sparse(linear, [0])
    with pytest.raises(ConfigError, match='already'):
        attach_sparse(linear, [1])
    other = nn.Linear(6, 5)
    other.peft = nn.Identity()
    with pytest.raises(ConfigError, match='peft'):
        attach_sparse(other, [1])


def test_a_parameter_is_whole_again_after_an_error_in_the_forward():
    norm = nn.LayerNorm(4)
    attach_sparse(norm, [0])
    with pytest.raises(RuntimeError):
        norm(torch.zeros(2, 3))
    assert isinstance(norm.weight, nn.Parameter)


def test_under_checkpointing_and_two_forwards_before_one_backward():
    """Both recompute or hold more than one graph of a module; gradients add up as ever."""
    linear = nn.Linear(6, 5).double()
    delta = attach_sparse(linear, some(4, 30))
    x = torch.randn(3, 6, dtype=torch.float64)
    (linear(x).square().sum() + linear(2 * x).square().sum()).backward()
    expected, delta.values.grad = delta.values.grad, None
    for factor in (1, 2):
        torch.utils.checkpoint.checkpoint(linear, factor * x, use_reentrant=False).square().sum().backward()
    assert_near(delta.values.grad, expected, 1e-12)


def test_in_a_host():
    """On the linears and norms of every kind of backbone: names, reset by `init_weights`, and the merged model: the
    same to the bit on the stock path, where FFNs have no other form for frozen weights."""
    for cfg in (HOSTS['mmdet-swin'], HOSTS['mmpretrain-vit']):
        model = PeftBackbone(base=cfg, trainable='none', fast=False)
        names = set(model.state_dict())
        for m in list(model.modules()):
            if isinstance(m, (nn.Linear, nn.LayerNorm)):
                attach_sparse(m, some(5, m.weight.numel()))
        assert names == set(model.state_dict()) - method_names(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n in method_names(model) if n.endswith('.values')
        }
        x = torch.randn(1, 3, 64, 64)
        for m in method_modules(model):
            nn.init.normal_(m.values)
        model.eval()
        expected = model(x)
        sum(out.sum() for out in expected).backward()
        assert all(m.values.grad is not None and m.values.grad.any() for m in method_modules(model)[:3])
        merge_sparse(copy_ := copy.deepcopy(model))
        assert_equal(copy_(x), expected)
        assert set(copy_.state_dict()) == names
        model.init_weights()
        assert all((m.values == 0).all() for m in method_modules(model))


def _train_on(rank, world, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).double().requires_grad_(False)
    attach_sparse(net[0], [3, 9, 20])
    attach_sparse(net[1], [1, 2], 'bias')
    data = torch.randn(8, 6, dtype=torch.float64)
    net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        part = data[rank::world]
        (net(part) + net(2 * part)).square().mean().backward()  # two forwards: DDP writes the buffers in between
        optimizer.step()
    torch.save({n: d.values.detach() for n, d in sparse_deltas(net.module).items()}, f'{results}/{world}_{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp(tmp_path):
    """Two processes on halves of a batch end with the deltas of one process on all of it."""
    for world in (1, 2):
        torch.multiprocessing.spawn(_train_on, (world, str(tmp_path / f'store{world}'), str(tmp_path)), nprocs=world)
    one, first, second = (torch.load(tmp_path / name) for name in ('1_0.pt', '2_0.pt', '2_1.pt'))
    for name, values in one.items():
        assert values.abs().max() > 0
        assert_near(first[name], values, 1e-12)
        assert_equal(first[name], second[name])


SITES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')
PATHS = {**dict.fromkeys('qkv', 'attn.qkv'), 'proj': 'attn.proj', 'fc1': 'ffn.layers.0.0', 'fc2': 'ffn.layers.1'}
STRUCTURED = {'lora': StructuredLoRA, 'adapter': StructuredAdapter}


@pytest.mark.parametrize('cls', STRUCTURED.values())
def test_structured_start_and_published_initialisation(cls):
    """The identity by default, and again after a reset; the published start is a truncated normal in both projections,
    of std 0.02, with zero biases."""
    x, y = torch.randn(2, 3, 60), torch.randn(2, 3, 80)
    module = cls(60, 80, 'fc1', 8)
    assert module(x, y, None).abs().max() == 0 and module.down.weight.std() > 0.05
    nn.init.ones_(module.up.weight)
    assert module(x, y, None).any()
    module.reset_parameters()
    assert not module(x, y, None).any()
    module = cls(60, 80, 'fc1', 8, init='trunc_normal')
    for linear in (module.down, module.up):
        assert 0.015 < linear.weight.std() < 0.025 and (linear.bias is None or not linear.bias.any())


def test_structured_counts():
    """LoRA r(in + out), Adapter 2 r out + r + out: as the published selection counts them."""
    assert sum(p.numel() for p in StructuredLoRA(60, 80, 'fc1', 8).parameters()) == 8 * 140
    assert sum(p.numel() for p in StructuredAdapter(60, 80, 'fc1', 8).parameters()) == 2 * 8 * 80 + 8 + 80


@pytest.mark.parametrize('site', SITES)
@pytest.mark.parametrize('cls', STRUCTURED.values())
def test_structured_in_train_mode(cls, site):
    """Dropout 0.1 on the branch's input except at `proj`, then DropPath 0.1 on the branch of a whole sample."""
    module = cls(40, 40, site, 8, init='trunc_normal')
    assert module.dropout.p == (0.0 if site == 'proj' else 0.1) and module.drop_path.drop_prob == 0.1
    for p in module.parameters():
        nn.init.normal_(p)
    x, y = torch.randn(2, 4000, 3, 40)
    module.train()
    added = module(x, y, None)
    dropped = (added == 0).flatten(1).all(1)
    assert 0.07 < dropped.double().mean() < 0.13
    module.dropout.p = 0.0
    scaled = module.eval()(x, y, None) / 0.9
    undropped = torch.isclose(added, scaled, rtol=1e-3, atol=1e-4).flatten(1).all(1) & ~dropped
    assert undropped.sum() == (4000 - dropped.sum() if site == 'proj' else 0)


def test_structured_formulas():
    """LoRA reads the linear's input and merges into its weight; Adapter reads its output, at `proj` the input."""
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    lora = StructuredLoRA(5, 7, 'fc2', 4).eval()
    nn.init.normal_(lora.up.weight)
    assert lora.scale == 1
    assert_near(lora(x, y, None), x @ lora.delta_weight(None).T)
    for site, z in (('fc2', y), ('proj', x)):
        module = StructuredAdapter(5, 7, site, 4, init='trunc_normal').eval()
        nn.init.normal_(module.down.bias)
        nn.init.normal_(module.up.bias)
        hidden = F.gelu(z @ module.down.weight.T + module.down.bias)
        assert_near(module(x, y, None), hidden @ module.up.weight.T + module.up.bias)


@pytest.mark.parametrize('cls', STRUCTURED.values())
@pytest.mark.parametrize('wrong', [dict(dropout=1.0), dict(drop_path=-0.1), dict(init='normal')])
def test_structured_bad_arguments(cls, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f'{cls.__name__.removeprefix("Structured")}: {name}={value!r}'):
        cls(8, 8, 'q', **wrong)


def test_benchmark(monkeypatch):
    """Every variant is measured, and what does not fit is estimated, and said so; training keeps as much as the
    delta has, with a mask as much as the layer has."""
    monkeypatch.setattr(benchmark, '_peak', lambda *args: 0.0)  # a process each
    monkeypatch.setattr(benchmark, '_PRODUCT_LIMIT', 4 * 500**2)
    rows = list(benchmark.run(repeats=2, counts=(64, 1000), shape=(60, 40), tokens=30))
    assert [(r.count, r.variant) for r in rows] == [(k, variant) for k in (64, 1000) for variant in benchmark.VARIANTS]
    assert [(r.count, r.variant) for r in rows if r.estimated] == [(1000, 'published')]
    for row in rows:
        assert row.gradient > 0 and row.step > 0 and row.gradient_ratio > 0
        assert 0 < row.gradient_floor < row.step_floor
        assert row.kept * 2**20 == pytest.approx(20 * (2400 if row.variant == 'mask' else row.count), abs=8)
        if row.variant == 'automatic':
            assert row.gradient_ratio == row.step_ratio == 1
    lines = [*benchmark.header(rows[0]).splitlines(), *map(benchmark.line, rows)]
    assert {line.count('|') for line in lines} == {11}


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs the account that Linux keeps of memory')
def test_benchmark_memory():
    """The high-water mark shows the published product (64 MiB here) and not the step that it is a part of."""
    size = ('cpu', (200, 300), 40, 4096)
    assert 60 < benchmark._peak('published', *size) / 2**20 < 80
    assert benchmark._peak('automatic', *size) / 2**20 < 10


def test_benchmark_variants_are_the_same_gradient():
    """What the benchmark compares computes the same, the published formula and the masked layer included."""
    deltas, places = {}, {}
    for variant in benchmark.VARIANTS:
        torch.manual_seed(0)
        case = benchmark._Case(variant, 'cpu', (20, 30), 50, 40)
        case.step()
        gradient = case.trained.grad
        places[variant] = case.places.flatten().nonzero().flatten() if variant == 'mask' else case.places.long()
        deltas[variant] = gradient.flatten()[places[variant]] if variant == 'mask' else gradient
        assert variant != 'mask' or gradient.count_nonzero() == 40
    for variant in benchmark.VARIANTS:
        assert_equal(places[variant], places['automatic'])
        assert_near(deltas[variant], deltas['published'])
