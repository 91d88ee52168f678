"""The FFN of frozen weights computes what the stock one does, forward and backward, and keeps its input alone."""

import copy
import pickle

import pytest
import torch
from conftest import HOSTS
from fast_forms import backbone_pair, kept, step
from helpers import assert_equal, assert_near, pairwise
from mmcv.cnn.bricks.transformer import FFN

from mona_mm import PeftBackbone
from mona_mm.hosts import make_fast
from mona_mm.hosts.ffn import _ROWS, FrozenLayers

SHAPES = {
    'batch 1': (1, 77),
    'odd': (3, 35),
    'several pieces': (2, _ROWS + 13),
    'whole pieces': (3, _ROWS),
    'one token': (1, 1),
    'no batch': (9,),
}


def build(fast: bool = True, trains: bool = False, channels: int = 24, **options) -> FFN:
    """A stock FFN with seeded weights, fast or not."""
    torch.manual_seed(0)
    options = dict(dict(act_cfg=dict(type='GELU')), **options)
    module = FFN(embed_dims=channels, feedforward_channels=4 * channels, **options).train().requires_grad_(trains)
    if fast:
        assert make_fast(module) and isinstance(module.layers, FrozenLayers)
    return module


def run(module, shape=(2, 35), autocast=None, layout=None):
    """Output and input gradient, for an input and a cotangent in another memory layout if asked for."""
    torch.manual_seed(1)
    dtype = module.layers[1].weight.dtype
    x = torch.randn(*shape, 24).to(dtype)
    cotangent = torch.randn(*shape, 24).to(dtype)
    if layout == 'transposed':
        x, cotangent = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, cotangent))
    elif layout == 'expanded':
        cotangent = cotangent[:1, :1].expand_as(x)
    x.requires_grad_()
    torch.manual_seed(2)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        out = module(x)
    out.backward(cotangent.to(out.dtype))
    return [out.detach(), x.grad]


def is_fast(module, *args) -> bool:
    """Whether a call takes the fast form."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Sequential, 'forward', lambda self, x: calls.append(self) or x)
        module.layers(*args or (torch.randn(2, 35, 24, requires_grad=True),))
    return not calls


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_stock(shape):
    """Output and input gradient within 1e-5 in float32 and 1e-12 in float64, whatever the number of tokens."""
    stock, fast = (build(f) for f in (False, True))
    assert is_fast(fast)
    assert_near(run(fast, SHAPES[shape]), run(stock, SHAPES[shape]))
    assert_near(run(fast.double(), SHAPES[shape]), run(stock.double(), SHAPES[shape]), 1e-12)


@pytest.mark.parametrize('layout', ['transposed', 'expanded'])
def test_memory_layouts(layout):
    """Inputs and gradients that are not contiguous give the same."""
    assert_near(run(build(), layout=layout), run(build(False), layout=layout))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('form', ['autocast bfloat16', 'autocast float16', 'bfloat16'])
def test_half_precision_is_close(form, shape):
    """In half precision: types as the stock module's, and as near to float32 as it is (within twice its distance)."""
    autocast = getattr(torch, form.split()[1]) if ' ' in form else None
    exact = run(build(False), SHAPES[shape])
    modules = (build(f) if autocast else build(f).bfloat16() for f in (False, True))
    stock, fast = (run(module, SHAPES[shape], autocast) for module in modules)
    for e, s, f in zip(exact, stock, fast, strict=True):
        assert f.dtype == s.dtype and f.isfinite().all()
        assert (f.float() - e).norm() <= 2 * (s.float() - e).norm() + 1e-3


@pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_keeps_its_input_alone(autocast):
    """Beside the parameters nothing is kept but the input, in the type of the products; stock keeps four times that,
    and under autocast copies of the weights."""
    x = torch.randn(1, 300, 24).requires_grad_()
    sizes = []
    for fast in (True, False):
        module = build(fast)
        with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
            sizes.append(sum(kept(module.layers, x).values()))
    unit = 300 * 24 * (4 if autocast is None else 2)
    assert sizes[0] == unit
    assert sizes[1] >= 4 * unit


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('biases', [False, True], ids=['weights', 'weights and biases'])
def test_weights_in_the_type_of_the_products(dtype, biases):
    """Under autocast frozen weights in its type, as `frozen_dtype` keeps them, take the fast form and give bit for bit
    what float32 ones of the same values do; in the other half type, and without autocast, they do not."""
    single, half = build(), build()
    for module in (single, half):
        for p in module.layers.parameters():
            if biases or p.dim() == 2:
                p.data = p.data.to(dtype)
    for p in single.layers.parameters():
        p.data = p.data.float()
    x = torch.randn(2, 35, 24, requires_grad=True)
    with torch.autocast('cpu', dtype):
        assert is_fast(half, x) and is_fast(single, x)
    with torch.autocast('cpu', torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        assert not is_fast(half, x)
    assert not is_fast(half, x)
    results = []
    for module in (single, half):
        torch.manual_seed(1)
        x, cotangent = torch.randn(3, 35, 24, requires_grad=True), torch.randn(3, 35, 24).to(dtype)
        with torch.autocast('cpu', dtype):
            out = module.layers(x)
        out.backward(cotangent)
        results.append([out.detach(), x.grad])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


def test_gradients():
    """The input's gradient is that of finite differences, and so is its own gradient."""
    module = build(channels=6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert is_fast(module, x)
    assert torch.autograd.gradcheck(module.layers, x)
    assert torch.autograd.gradgradcheck(module.layers, x)


@pytest.mark.parametrize('onednn', [True, False])
def test_backward_within_autocast(onednn):
    """Where only the backward pass is within autocast, it is in the forward's precision, with or without oneDNN."""
    module = build()
    results = []
    for low in (False, True):
        torch.manual_seed(1)
        x, cotangent = torch.randn(2, 35, 24, requires_grad=True), torch.randn(2, 35, 24)
        with torch.backends.mkldnn.flags(enabled=onednn):
            out = module.layers(x)
            with torch.autocast('cpu', torch.bfloat16, enabled=low):
                results.append(torch.autograd.grad(out, x, cotangent))
    assert_equal(*results)


def test_nothing_is_changed_in_place():
    """The form computes in place: its input, the gradient it is given and the weights stay as they were."""
    module = build()
    x, cotangent = torch.randn(2, 35, 24), torch.randn(2, 35, 24)
    before = [t.clone() for t in (x, cotangent, *module.parameters())]
    module(x.requires_grad_()).backward(cotangent)
    assert_equal([x.detach(), cotangent, *module.parameters()], before)


def test_without_onednn():
    """Where torch has no oneDNN, or it is switched off, the results are the same."""
    expected = run(build())
    with torch.backends.mkldnn.flags(enabled=False):
        assert_near(run(build()), expected)


def test_what_takes_the_stock_path():
    """A weight or bias that trains, an active dropout, another activation, a hooked or replaced part, foreign types,
    no tokens, other depths; but what trains is computed by the fast form where no gradient is asked for."""
    assert is_fast(build())
    for name in ('0.0.weight', '0.0.bias', '1.weight', '1.bias'):
        module = build()
        module.layers.get_parameter(name).requires_grad_()
        assert not is_fast(module), name
        with torch.no_grad():
            assert is_fast(module), name
    dropped = build(ffn_drop=0.5)
    assert not is_fast(dropped)
    dropped.eval()
    assert is_fast(dropped)
    for activation in (dict(type='ReLU'), dict(type='GELU', approximate='tanh')):
        assert not is_fast(build(act_cfg=activation))
    for part in ('0', '0.0', '0.1', '0.2', '1', '2'):
        module = build()
        module.layers.get_submodule(part).register_forward_hook(lambda m, args, out: None)
        assert not is_fast(module), part

    class Replaced(torch.nn.Linear):
        pass

    for index in (0, 1):
        module = build()
        owner = module.layers[0] if index == 0 else module.layers
        owner[index] = Replaced(24, 96) if index == 0 else Replaced(96, 24)
        module.requires_grad_(False)
        assert not is_fast(module)
    patched = build()
    patched.layers[1].forward = lambda x: x
    assert not is_fast(patched)
    module = build()
    module.layers[1] = torch.nn.Linear(96, 24, bias=False).requires_grad_(False)
    assert not is_fast(module)
    assert not is_fast(build(), torch.randn(2, 35, 24).bfloat16())
    with torch.autocast('cpu', torch.bfloat16):  # it leaves double precision alone
        assert not is_fast(build(), torch.randn(2, 35, 24).double())
        assert not is_fast(build().double(), torch.randn(2, 35, 24).double())
    assert not is_fast(build(), torch.randn(0, 35, 24))
    assert not make_fast(build(False, num_fcs=3))
    assert not make_fast(torch.nn.Linear(3, 3))


def test_layers_of_another_structure():
    """Whoever takes layers away, adds some or merges two after building is heeded."""

    class Doubled(torch.nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(2, 35, 24)
    for change in (
        lambda m: m.layers.__setitem__(0, torch.nn.Linear(24, 96)),
        lambda m: m.layers.__setitem__(0, m.layers[0][:2]),
        lambda m: m.layers.__setitem__(0, Doubled(*m.layers[0])),
        lambda m: m.layers.append(torch.nn.LayerNorm(24)),
        lambda m: m.layers.__delitem__(2),
    ):
        stock, fast = (build(f) for f in (False, True))
        for module in (stock, fast):
            torch.manual_seed(4)
            change(module)
            module.requires_grad_(False)
        assert_equal([fast(x)], [stock(x)])


def test_transforms():
    """torch.compile makes one graph of it, tracing works, and torch.func differentiates it, all by the stock path."""
    module, x = build(), torch.randn(2, 35, 24)
    expected = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x), fullgraph=True, backend='aot_eager')
    assert_near(compiled(x), expected)
    assert_near(torch.jit.trace(module, x)(x), expected)
    own = x.clone().requires_grad_()
    module(own).square().sum().backward()
    actual = torch.func.grad(lambda x: module(x).square().sum())(x)
    assert_near(actual, own.grad)


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_are_fast_and_independent(clone):
    """A copy is fast itself and does not see later changes of its source."""
    module = build()
    before = run(module)
    twin = clone(module)
    assert is_fast(twin) and twin.state_dict().keys() == build(False).state_dict().keys()
    with torch.no_grad():
        module.layers[1].weight.zero_()
    assert_equal(run(twin), before)
    assert (run(module)[0] != before[0]).any()


METHODS = {
    'mona': dict(type='Mona', bottleneck=8, dropout=0.0),
    'adaptformer': dict(type='AdaptFormer', bottleneck=8, dropout=0.0),
    'lora at fc1 and fc2': dict(type='LoRA', rank=4, sites=['fc1', 'fc2']),
}


@pytest.mark.parametrize(
    ('name', 'method'),
    pairwise(
        ['mmdet-swin', 'mmseg-swin', 'mmpretrain-swin', 'mmpretrain-vit', 'mmpretrain-swinv2'],
        list(METHODS),
        common=lambda name, method: method == 'mona' or name in ('mmdet-swin', 'mmpretrain-vit'),
    ),
)
def test_backbones_are_equal(name, method):
    """Whole backbones in train mode with seeded DropPath: outputs and the gradient of everything that trains. A method
    at the FFN's own linears is heeded."""
    stock, fast = backbone_pair(HOSTS[name], peft=METHODS[method])
    assert any(isinstance(m, FrozenLayers) for m in fast.modules())
    assert not any(isinstance(m, FrozenLayers) for m in stock.modules())
    assert stock.state_dict().keys() == fast.state_dict().keys()
    fast.train()
    stock.train()
    size = (50, 70) if name.endswith('swin') else (64, 64)
    assert_near(step(fast, size), step(stock, size), 5e-5)


def test_activation_checkpointing():
    """`with_cp=True` changes nothing."""
    results = [
        step(backbone_pair(dict(HOSTS['mmdet-swin'], with_cp=cp), peft=METHODS['mona'])[1]) for cp in (False, True)
    ]
    assert_near(*results)


def test_a_backbone_keeps_less():
    """By whole backbones: with frozen FFNs a third less is kept; what trains keeps what the stock one does."""
    x = torch.randn(1, 3, 64, 64)
    for options, least, most in (
        (dict(peft=METHODS['adaptformer']), 0, 0.75),
        (dict(trainable='norm'), 0, 0.75),
        (dict(trainable='bias'), 0.8, 1),
    ):
        models = [PeftBackbone(HOSTS['mmdet-swin'], fast=fast, **options) for fast in (False, True)]
        stock, fast = (sum(kept(model, x).values()) for model in models)
        assert least * stock <= fast <= most * stock, options
