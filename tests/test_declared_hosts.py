"""Hosts that are only a declaration: the stock forward with hooks, for every method that has a site there."""

import copy

import pytest
import torch
from declared_hosts import DECLARED, FIXED_SIZE, VARIANTS
from helpers import assert_near
from mmengine.registry import MODELS
from suite import check_copies, check_gradients, check_names, check_round_trip
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.hosts import STREAM_SITES, find_host, method_modules
from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS

NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in DECLARED]


class Shift(StreamModule):
    """Adds a constant, and looks at the grid that it is told."""

    sites = ('post_attn',)

    def __init__(self, channels: int, by: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels) + by * torch.linspace(-1, 1, channels))

    def reset_parameters(self) -> None:
        pass

    def forward(self, x, hw):
        assert 0 <= x.shape[1] - hw[0] * hw[1] <= 1, (x.shape, hw)
        return x + self.shift if self.shift.any() else x


@pytest.fixture(autouse=True)
def shift_is_a_method():
    METHODS.register_module(module=Shift)
    yield
    METHODS.module_dict.pop('Shift')


def maps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    outs = model(x)
    return [out for out in (outs if isinstance(outs, tuple | list) else [outs]) if isinstance(out, torch.Tensor)]


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def adapted(base: dict, **peft) -> tuple[nn.Module, nn.Module]:
    """The stock backbone and the same with a method, in evaluation, with the weights of one seed."""
    torch.manual_seed(0)
    stock = MODELS.build(copy.deepcopy(base))
    model = PeftBackbone(base=copy.deepcopy(base), peft=peft, fast=False)
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    stock.eval()
    stock.requires_grad_(False)  # as in the other, for torch's attention has a form of its own then
    return stock, model


@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_changed_bit_for_bit(name):
    """Modules that do nothing, at every stream site."""
    base = DECLARED[name]
    sites = [site for site in STREAM_SITES if site in find_host(MODELS.build(copy.deepcopy(base))).sites]
    stock, model = adapted(base, type='Shift', sites=[site for site in sites if site != 'parallel_ffn'])
    assert method_modules(model)
    for a, b in zip(maps(stock, image()), maps(model, image()), strict=True):
        assert torch.equal(a, b)


BETWEEN = ('xcit', 'davit', 'tinyvit')
"""Hosts whose blocks have a convolution between the branches, on the way from the one site to the other."""


@pytest.mark.parametrize('name', NAMES)
def test_a_constant_is_the_same_before_and_after_the_residual_add(name):
    """What a hook on the end of a branch adds to it is what other hooks add to the stream behind it."""
    base = DECLARED[name]
    sites = find_host(MODELS.build(copy.deepcopy(base))).sites
    for branch in ('attn', 'ffn'):
        if f'{branch}_out' not in sites or f'post_{branch}' not in sites:
            continue
        if branch == 'attn' and name.rpartition('-')[2] in BETWEEN:
            continue
        shifted = [adapted(base, type='Shift', by=0.3, sites=[site]) for site in (f'{branch}_out', f'post_{branch}')]
        before, after = (maps(model, image()) for _, model in shifted)
        stock = maps(shifted[0][0], image())
        for a, b in zip(before, after, strict=True):
            assert_near(a, b)
        assert any((a - plain).abs().max() > 1e-3 for a, plain in zip(before, stock, strict=True))


def methods_of(name: str) -> list[dict]:
    """The methods that a host takes."""
    sites = find_host(MODELS.build(copy.deepcopy(DECLARED[name]))).sites
    found = [dict(type='Mona', bottleneck=4)]
    if 'attn_branch' in sites:
        found += [
            dict(type='Adapter', bottleneck=4),
            dict(type='LoRand', inner=2),
            dict(type='AdaptFormer', bottleneck=4),
        ]
    linear = [site for site in ('q', 'v', 'fc1', 'fc2') if site in sites]
    return [*found, dict(type='LoRA', rank=2, sites=linear)] if linear else found


DISTINCT = ('beit', 'sam', 'tinyvit', 'mvit', 'hornet', 'mscan', 'mit', 'resnet')
"""Hosts that show every kind of declaration; the others have the shared suite in `make test-all`."""


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(
            name, marks=[] if name.startswith(('mmpretrain-', 'mmseg-m')) and kind in DISTINCT else [pytest.mark.slow]
        )
        for name in DECLARED
        for kind in [name.rpartition('-')[2]]
    ],
)
def test_the_suite(name):
    """Names, gradients, round trips and copies of every method; an activation checkpoint changes no gradient."""
    base = DECLARED[name]
    for number, peft in enumerate(methods_of(name)):
        if number % 2 == len(name) % 2 or peft['type'] == 'LoRA':  # half of them, others on the next host
            check_names(base, peft)
            check_round_trip(base, peft)
            other = None if name in FIXED_SIZE else (96, 32)
            check_copies(PeftBackbone(base=copy.deepcopy(base), peft=peft), copy.deepcopy, other)
            check_gradients(PeftBackbone(base=copy.deepcopy(base), peft=peft))


@pytest.mark.parametrize('name', [name for name in DECLARED if 'res' not in name and 'hrnet' not in name])
def test_activation_checkpoints(name):
    """with_cp computes the same gradients, also under an input that requires none."""
    torch.manual_seed(0)
    model = PeftBackbone(base=copy.deepcopy(DECLARED[name]), peft=dict(type='Mona', bottleneck=4))
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        nn.init.normal_(p, std=0.1)
    found = []
    for with_cp in (False, True):
        for module in model.modules():
            if hasattr(module, 'hooked'):
                module.with_cp = with_cp
        total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in maps(model, image()))
        found.append(torch.autograd.grad(total, parameters))
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if name in ('mmseg-mit', 'mmpretrain-hornet') else [pytest.mark.slow])
        for name in DECLARED
        if name not in VARIANTS
    ],
)
def test_traced_and_exported(name):
    """torch.jit.trace and torch.export write down what is computed, hooks included."""
    torch.manual_seed(0)
    model = PeftBackbone(base=copy.deepcopy(DECLARED[name]), peft=dict(type='Mona', bottleneck=4))
    model.eval()
    for module in method_modules(model):
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    expected = maps(model, image())
    written_down = (
        torch.jit.trace(model, image(), check_trace=False),
        torch.export.export(model, (image(),)).module(),
    )
    for form in written_down:
        for a, b in zip(expected, maps(form, image()), strict=True):
            assert_near(a, b)
