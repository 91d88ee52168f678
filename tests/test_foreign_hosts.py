"""timm's and transformers' models as hosts: the stock forward with hooks, for every method that has a site there."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from foreign_hosts import (
    FIXED_SIZE,
    FOREIGN,
    INSTALLED,
    TIMM,
    build,
    image,
    installed,
    names,
    randomise,
    register_small_models,
)
from helpers import assert_equal, assert_near
from suite import (
    check_copies,
    check_delta,
    check_gradients,
    check_merge,
    check_names,
    check_round_trip,
    outputs,
)
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.hosts import HOSTS, STREAM_SITES, Host, find_host, method_modules, sites_of
from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS

needs_timm = installed('timm')


@pytest.fixture(autouse=True, scope='module')
def small_models_of_timm():
    if INSTALLED['timm']:
        register_small_models()


class Affine(StreamModule):
    """Multiplies every channel by a factor and adds a constant, each of its own; nothing by default."""

    sites = ('post_attn',)
    needs_grid = False

    def __init__(self, channels: int, scale: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        each = torch.linspace(-1, 1, channels)
        self.scale, self.shift = nn.Parameter(1 + scale * each), nn.Parameter(shift * each)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x, hw):
        return x * self.scale + self.shift


class OnGrid(Affine):
    """The same, and looks at the grid: behind at most five tokens for the class and of registers."""

    needs_grid = True

    def forward(self, x, hw):
        assert 0 <= x.shape[1] - hw[0] * hw[1] <= 5, (x.shape, hw)
        return super().forward(x, hw)


@pytest.fixture(autouse=True)
def methods_of_this_file():
    for method in (Affine, OnGrid):
        METHODS.register_module(module=method)
    yield
    for method in (Affine, OnGrid):
        METHODS.module_dict.pop(method.__name__)


def is_ordered(host: Host) -> bool:
    return all(spec.row_major for spec in host.specs)


def adapted(name: str, **peft) -> tuple[nn.Module, nn.Module]:
    """The stock backbone and the same with a method, in evaluation, with the same weights."""
    stock = build(FOREIGN[name])
    randomise(stock)
    model = PeftBackbone(base=copy.deepcopy(FOREIGN[name]), peft=peft, fast=False)
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    stock.requires_grad_(False)  # as in the other, for torch's attention has a form of its own then
    return stock, model


@pytest.mark.parametrize('name', names(FOREIGN))
def test_nothing_is_changed_bit_for_bit(name):
    """Modules that do nothing, at every stream site, and all of them see the grid where there is one."""
    host = find_host(build(FOREIGN[name]))
    sites = [site for site in STREAM_SITES if site in host.sites and site != 'parallel_ffn']
    stock, model = adapted(name, type='OnGrid' if is_ordered(host) else 'Affine', sites=sites)
    assert len(method_modules(model)) == len(sites) * len(sites_of(model))
    assert_equal(outputs(model, image()), outputs(stock, image()))


@pytest.mark.parametrize('name', names(FOREIGN))
def test_a_constant_is_the_same_before_and_after_the_residual_add(name):
    """What a hook on the end of a branch adds to it is what other hooks add to the stream behind it."""
    sites = find_host(build(FOREIGN[name])).sites
    for branch in ('attn', 'ffn'):
        if f'{branch}_out' not in sites:
            continue
        stock, before = adapted(name, type='Affine', shift=0.3, sites=[f'{branch}_out'])
        _, after = adapted(name, type='Affine', shift=0.3, sites=[f'post_{branch}'])
        assert_near(outputs(before, image()), outputs(after, image()))
        assert any(
            (a - b).abs().max() > 1e-3 for a, b in zip(outputs(after, image()), outputs(stock, image()), strict=True)
        )


def methods_of(name: str) -> list[dict]:
    """The methods that a host takes."""
    host = find_host(build(FOREIGN[name]))
    found = [dict(type='Adapter', bottleneck=4), dict(type='LoRand', inner=2), dict(type='AdaptFormer', bottleneck=4)]
    found += [dict(type='LoRA', rank=2, sites=[site for site in ('q', 'v', 'fc1', 'fc2') if site in host.sites])]
    return [dict(type='Mona', bottleneck=4), *found] if is_ordered(host) else found


DISTINCT = ('timm-eva02', 'timm-dinov3', 'timm-swin-list', 'timm-hiera', 'timm-caformer', 'hf-dinov3', 'hf-swin')
"""Hosts that show every kind of declaration."""


@pytest.mark.parametrize('name', names(FOREIGN, common=DISTINCT))
def test_the_suite(name):
    """Names, round trips, copies and gradients of the methods."""
    base = FOREIGN[name]
    for number, peft in enumerate(methods_of(name)):
        if number % 2 == len(name) % 2 or peft['type'] == 'LoRA':  # half of them, others on the next host
            check_names(base, peft)
            check_round_trip(base, peft)
            other = None if name in FIXED_SIZE else (96, 32)
            check_copies(PeftBackbone(base=copy.deepcopy(base), peft=peft), copy.deepcopy, other)
            check_gradients(PeftBackbone(base=copy.deepcopy(base), peft=peft))


@pytest.mark.parametrize('name', names(FOREIGN))
def test_activation_checkpoints(name):
    """A checkpoint around every block changes no gradient, also under an input that requires none."""
    _, model = adapted(name, **methods_of(name)[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        nn.init.normal_(p, std=0.1)
    found = []
    for with_cp in (False, True):
        for module in model.modules():
            if hasattr(module, 'hooked'):
                module.with_cp = with_cp
        total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs(model, image()))
        found.append(torch.autograd.grad(total, parameters))
    assert_near(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize('name', names(DISTINCT))
def test_compiled(name):
    """torch.compile, forward and backward."""
    _, model = adapted(name, **methods_of(name)[0])
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager')
    found = []
    for each in (model, compiled):
        outs = outputs(each, image())
        sum(out.square().mean() for out in outs).backward()
        found.append([*outs, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert_near(found[1], found[0], 1e-4)


@pytest.mark.parametrize('name', names(FOREIGN, common=('timm-caformer', 'hf-dinov3')))
def test_traced_and_exported(name):
    """torch.jit.trace and torch.export write down what is computed, hooks included."""
    _, model = adapted(name, **methods_of(name)[0])
    expected = outputs(model, image())
    assert_near(outputs(torch.jit.trace(model, image(), check_trace=False), image()), expected)
    assert_near(outputs(torch.export.export(model, (image(),)).module(), image()), expected)


def _vit(block, x, site):
    scale = (block.ls1, block.ls2) if hasattr(block, 'ls1') else (nn.Identity(), nn.Identity())
    u = site('post_attn', x + scale[0](block.attn(block.norm1(x))))
    return site('post_ffn', u + scale[1](block.mlp(block.norm2(u))))


def _metaformer(block, x, site):
    u = site('post_attn', block.res_scale1(x) + block.layer_scale1(block.token_mixer(block.norm1(x))))
    return site('post_ffn', block.res_scale2(u) + block.layer_scale2(block.mlp(block.norm2(u))))


def _swin(block, x, site):
    u = site('post_attn', x + block._attn(block.norm1(x)))
    return site('post_ffn', u + block.mlp(block.norm2(u)))


def _dinov2(block, x, site):
    u = site('post_attn', x + block.layer_scale1(block.attention(block.norm1(x))[0]))
    return site('post_ffn', u + block.layer_scale2(block.mlp(block.norm2(u))))


@pytest.mark.parametrize(
    ('name', 'formula', 'shape'),
    [
        pytest.param(name, formula, shape, marks=installed(name), id=name)
        for name, formula, shape in (
            ('timm-vit-registers', _vit, (2, 21, 24)),
            ('timm-eva02', _vit, (2, 17, 24)),
            ('timm-caformer', _metaformer, None),
            ('timm-swin', _swin, (2, 16, 16, 8)),
            ('hf-dinov2', _dinov2, (2, 17, 24)),
        )
    ],
)
def test_a_map_of_the_stream_against_a_plain_formula(name, formula, shape):
    """A module at both stream sites does what a formula for the block with it in its place says."""
    stock = build(FOREIGN[name])
    randomise(stock)
    model = PeftBackbone(
        base=copy.deepcopy(FOREIGN[name]),
        peft=dict(type='Affine', scale=0.5, shift=0.1, sites=['post_attn', 'post_ffn']),
    )
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    for path, block in find_host(stock).blocks(stock).items():
        channels = sites_of(stock)[path]['post_ffn'].widths[0]
        size = shape or ((2, 16, channels) if hasattr(block.token_mixer, 'qkv') else (2, channels, 4, 4))
        if shape and shape[-1] != channels:
            continue  # of a later stage, with the same blocks
        x, module = torch.randn(size), Affine(channels, scale=0.5, shift=0.1)

        def site(name: str, x: torch.Tensor, module=module) -> torch.Tensor:
            return (
                module(x.movedim(1, -1), None).movedim(-1, 1) if x.shape[-1] != len(module.scale) else module(x, None)
            )

        with torch.no_grad():
            assert_near(model.get_submodule(path)(x), formula(block, x, site))


@pytest.mark.parametrize('name', names(FOREIGN))
def test_a_delta_and_a_merge(name, tmp_path):
    """A delta brings the method back on its base alone; LoRA merges into the stock weights."""
    host = find_host(build(FOREIGN[name]))
    sites = [site for site in ('q', 'k', 'v', 'proj', 'fc1', 'fc2') if site in host.sites]
    check_merge(FOREIGN[name], dict(type='LoRA', rank=2, sites=sites))
    check_delta(FOREIGN[name], dict(type='LoRand', inner=2, sites=['ffn_out']), tmp_path)


@pytest.mark.parametrize('name', names(('timm-hiera', 'hf-hiera')))
def test_hiera_refuses_convolutions(name):
    with pytest.raises(ConfigError, match=r'Mona reads the grid.*another order than that of the grid.s rows.*LoRA'):
        PeftBackbone(base=copy.deepcopy(FOREIGN[name]), peft=dict(type='Mona', bottleneck=4))


@needs_timm
def test_a_model_of_timm_that_is_not_declared():
    """find_host names what is supported; LoRA at sites that this model's blocks lack is refused."""
    with pytest.raises(ConfigError, match='LoRA cannot attach at q, v.*ConvNeXtBlock.*fc1, fc2'):
        PeftBackbone(base=copy.deepcopy(TIMM['timm-convnext']), peft=dict(type='LoRA'))


@needs_timm
def test_another_model_of_timm_takes_a_dozen_lines():
    """The declaration that docs/extending.md shows, of a model that is not in the list: its class and the sites."""
    page = (ROOT / 'docs/extending.md').read_text()
    source = re.search(r'```python\n# cait_blocks\.py\n(.*?)```', page, re.DOTALL)[1]
    statement = source[source.index('register_blocks(') :].strip()
    assert len(statement.splitlines()) <= 12
    base = dict(
        type='mmpretrain.TIMMBackbone',
        model_name='cait_xxs24_224',
        features_only=True,
        img_size=64,
        embed_dim=24,
        depth=2,
        num_heads=2,
        out_indices=(0, 1),
    )
    before = dict(HOSTS)
    with pytest.raises(UnsupportedHostError):
        find_host(build(base))
    try:
        exec(source, {})
        stock = build(base)
        randomise(stock)
        model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4))
        model.load_state_dict(stock.state_dict(), strict=False)
        model.eval()
        assert len(sites_of(model)) == 2 and {'post_attn', 'ffn_branch', 'q'} <= set(find_host(model).sites)
        assert not torch.equal(model(image())[-1], stock(image())[-1])
        for lora in (dict(type='LoRA', rank=2, sites=['q', 'v', 'fc1']),):
            check_merge(base, lora)
    finally:
        HOSTS.clear()
        HOSTS.update(before)
