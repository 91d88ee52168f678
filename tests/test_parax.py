"""ParaX: formula, counts, initial values, its fast form, and the pools that the blocks of a stage share."""

import copy
import math
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HOSTS, ROOT
from declared_hosts import DECLARED
from helpers import assert_equal, assert_near, in_processes
from metafiles import COUNT, listed
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS, init_default_scope
from safetensors import safe_open
from suite import images, off_initial_values, outputs
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import mona_mm
from mona_mm import PeftBackbone, count_trainable
from mona_mm.checkpoint.convert import convert_model, convert_state_dict
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules
from mona_mm.methods import ParaX
from mona_mm.nn.depthwise import convolve
from mona_mm.nn.meta import meta_device
from mona_mm.reproduce.cells import config_name, method_of
from mona_mm.reproduce.logs import Log
from mona_mm.reproduce.published import published_trainable
from mona_mm.reproduce.tasks import TASKS

SIZES = {
    'swin_b': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'swin_l': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
SWIN, VIT = HOSTS['mmdet-swin'], HOSTS['mmpretrain-vit']
VARIANTS = {
    'published': dict(),
    'no residual scale': dict(residual_scale=False, layer_scale=0.5),
    'other kernels': dict(kernel_sizes=[5, 1, 9, 3], router_width=3),
}
GRIDS = {  # (batch, (H, W), extra tokens)
    'odd': (2, (5, 9), 0),
    'one token': (1, (1, 1), 0),
    'one row': (3, (1, 7), 0),
    'class and register tokens': (2, (7, 6), 5),
    'rows in two strips': (1, (35, 4), 0),
}


# The formula ---------------------------------------------------------------------------------------------------------


def plain_depthwise(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """A depthwise convolution of one image (H, W, n) with (n, k, k), one pixel of the kernel at a time."""
    height, width, _ = x.shape
    size = kernel.shape[-1]
    padded = F.pad(x, (0, 0, size // 2, size // 2, size // 2, size // 2))
    out = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            out = out + padded[i : i + height, j : j + width] * kernel[:, i, j]
    return out


def plain_parax(p: dict[str, torch.Tensor], x: torch.Tensor, hw: tuple[int, int], kernel_sizes) -> torch.Tensor:
    """The formula of the class's docstring, of one image at a time."""

    def gelu(v):
        return v * (1 + torch.erf(v / 2**0.5)) / 2

    def image(x):  # (H, W, C)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        norm = (x - mean) / (var + 1e-5).sqrt() * p['norm.weight'] + p['norm.bias']
        s = p['norm_scale'] * norm + x
        t = s + plain_depthwise(s, p['opening.weight'][:, 0]) + p['opening.bias']
        scores = gelu(t.mean((0, 1)) @ p['router.0.weight'].T + p['router.0.bias'])
        scores = scores @ p['router.2.weight'].T + p['router.2.bias']
        down, up, *kernels = (
            sum(gate * expert for gate, expert in zip(kind.exp() / kind.exp().sum(), experts, strict=True))
            for kind, experts in zip(
                scores.view(2 + len(kernel_sizes), -1),
                [p['pool.down'], p['pool.up'], *(p[f'pool.filters.{i}'] for i in range(len(kernel_sizes)))],
                strict=True,
            )
        )
        z = t @ down.T
        steps = [plain_depthwise(z, kernels[0])]
        for i, kernel in enumerate(kernels[1:]):
            a, b = p['chain'][2 * i], p['chain'][2 * i + 1]
            steps.append(plain_depthwise(a * z + b * steps[-1], kernel))
        shares = (sum(steps) @ p['mixing.weight'].T + p['mixing.bias']).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        u = z + sum(shares[..., i, None] * step for i, step in enumerate(steps))
        w = gelu(u + u @ p['project.weight'].T + p['project.bias']) @ up.T
        v = w + plain_depthwise(w, p['closing.weight'][:, 0]) + p['closing.bias']
        residual = p['residual_scale'] * x + p['residual_bias'] if 'residual_scale' in p else x
        return p['scale'] * v + p['bias'] + residual

    extra = x.shape[1] - hw[0] * hw[1]
    mapped = [image(each[extra:].view(*hw, -1)).flatten(0, 1) for each in x]
    return torch.stack([torch.cat((each[:extra], y)) for each, y in zip(x, mapped, strict=True)])


def build(channels: int = 12, experts: int = 3, rank: int = 8, **options) -> ParaX:
    """A ParaX with a pool of several experts, far from its initial values."""
    modules = {f'block{i}': {'post_ffn': ParaX(channels, rank=rank, **options)} for i in range(experts)}
    ParaX.share(modules)
    module = modules['block1' if experts > 1 else 'block0']['post_ffn']
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def gradients(out: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, parameters: dict[str, torch.Tensor]):
    found = torch.autograd.grad((out * weight).sum(), [x, *parameters.values()])
    return dict(zip(['x', *parameters], found, strict=True), out=out.detach())


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'plain'])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_formula(variant, grid, fast):
    """Output and all gradients, of the router and the pool too, are those of the formula, to 1e-12 in float64."""
    module = build(**VARIANTS[variant]).double()
    module.fast = fast
    batch, hw, extra = GRIDS[grid]
    x = torch.randn(batch, extra + hw[0] * hw[1], 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    parameters = dict(module.named_parameters())
    expected = gradients(plain_parax(parameters, x, hw, module.kernel_sizes), weight, x, parameters)
    assert_near(gradients(module(x, hw), weight, x, parameters), expected, 1e-12, least=1e-3)


def test_each_image_has_its_own_weights():
    """The images of a batch do not see each other, and other images get other matrices."""
    module = build().double()
    x = torch.randn(3, 20, 12, dtype=torch.float64) + torch.randn(3, 1, 12, dtype=torch.float64)
    together = module(x, (4, 5))
    assert_near(torch.cat([module(each[None], (4, 5)) for each in x]), together, 1e-12)
    down, _, _ = module.pool(module._gates(x))
    assert (down[0] - down[1]).abs().max() > 0.01 * down.abs().max()


# The fast form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('host', [SWIN, VIT, HOSTS['mmpretrain-convnext']], ids=['swin', 'vit', 'convnext'])
def test_fast_form_in_a_backbone(host, monkeypatch):
    """A backbone computes the same with and without it, to 1e-12 in float64, gradients too; and it is what runs."""
    runs = []
    for name in ('_adapt', '_adapt_fast'):
        form = getattr(ParaX, name)
        monkeypatch.setattr(ParaX, name, lambda *args, form=form, name=name: (runs.append(name), form(*args))[1])
    model = PeftBackbone(base=dict(host, drop_path_rate=0.0), peft=dict(type='ParaX', rank=8), fast=False)
    model.init_weights()
    off_initial_values(model)
    model = model.double()
    x = images().double()
    weights = [torch.randn_like(out) for out in outputs(model, x)]
    results = []
    for fast in (False, True):
        for module in method_modules(model):
            module.fast = fast
        runs.clear()
        model.zero_grad()
        outs = outputs(model, x)
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
        assert set(runs) == {'_adapt_fast' if fast else '_adapt'}
        named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append({**named, **{str(i): out.detach() for i, out in enumerate(outs)}})
    largest = max(tensor.abs().max().item() for tensor in results[0].values())
    assert_near(results[1], results[0], 1e-12, least=1e-3 * largest)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('grid', GRIDS)
def test_fast_form_is_as_precise(grid, autocast):
    """Against the plain form in float64: float32 within 1e-5, and bfloat16 as close as the plain form in bfloat16."""
    module = build()
    batch, hw, extra = GRIDS[grid]
    x = torch.randn(batch, extra + hw[0] * hw[1], 12)
    weight, found = torch.randn_like(x), {}
    for name, dtype in (('exact', torch.float64), ('plain', torch.float32), ('fast', torch.float32)):
        module = module.to(dtype)
        module.fast = name == 'fast'
        low = autocast if name != 'exact' else None
        leaf, parameters = x.to(dtype).requires_grad_(), dict(module.named_parameters())
        with torch.autocast('cpu', low or torch.bfloat16, enabled=low is not None):
            out = module(leaf, hw)
        assert out.dtype == dtype
        found[name] = gradients(out, weight.to(dtype), leaf, parameters)
    exact, plain, fast = ({k: t.double() for k, t in of_form.items()} for of_form in found.values())
    if autocast is None:
        assert_near(fast, exact, 1e-5, least=0.1)
    else:
        errors = [sum((t - exact[k]).norm() / (exact[k].norm() + 1) for k, t in each.items()) for each in (plain, fast)]
        assert errors[1] <= 1.5 * errors[0]


def test_a_hook_or_a_replaced_part_is_called():
    """The fast form would pass them by."""
    module, seen = build(), []
    module.project.register_forward_hook(lambda *args: seen.append('hook'))
    module(torch.randn(1, 20, 12), (4, 5))
    assert seen == ['hook']
    module = build()
    module.opening = nn.Identity()
    out = module(x := torch.randn(1, 20, 12), (4, 5))
    module.fast = False
    assert_equal(out, module(x, (4, 5)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_small_layer_scale_in_half_precision(dtype):
    """A branch times 1e-5 is not lost beside larger biases; it is rounded a few times more than in the plain form."""
    module = build()
    nn.init.constant_(module.scale, 1e-5)
    x, found = torch.randn(1, 48, 12), []
    with torch.no_grad():
        for fast, enabled in ((False, False), (False, True), (True, True)):
            module.fast = fast
            with torch.autocast('cpu', dtype, enabled=enabled):
                scaled = module(x, (6, 8)).double()
                module.scale.zero_()
                found.append(scaled - module(x, (6, 8)).double())
            nn.init.constant_(module.scale, 1e-5)
    errors = [(low - found[0]).norm() / found[0].norm() for low in found[1:]]
    assert errors[1] <= 3 * errors[0]


@pytest.mark.parametrize('size', [3, 5, 7])
def test_gradient_of_a_depthwise_kernel(size):
    """By torch and by correlation: the same, also of the second order, and in bfloat16 as close as torch's."""
    grid = torch.randn(2, 3, 37, 6, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 1, size, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(grid)
    both = []
    for fast in (False, True):
        first = torch.autograd.grad(
            (convolve(grid, kernel, fast=fast).sin() * weight).sum(), (grid, kernel), create_graph=True
        )
        both.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (grid, kernel))])
    assert_near(both[1], both[0], 1e-12)
    low = [t.detach().bfloat16().requires_grad_() for t in (grid, kernel)]
    exact = torch.autograd.grad((convolve(grid, kernel) * weight).sum(), kernel)[0]
    for fast in (False, True):
        near = torch.autograd.grad((convolve(*low, fast=fast) * weight.bfloat16()).sum(), low[1])[0]
        assert (near - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ('host', 'tool'),
    [
        pytest.param(VIT, 'trace', id='vit-trace'),
        pytest.param(SWIN, 'trace', id='swin-trace', marks=pytest.mark.slow),
        pytest.param(VIT, 'export', id='vit-export', marks=pytest.mark.slow),
    ],
)
def test_traced_and_exported(host, tool):
    """Tracers record the plain form, for other images."""
    model = PeftBackbone(base=host, peft=dict(type='ParaX', rank=8))
    model.init_weights()
    off_initial_values(model)
    model.eval()
    x, other = images(), images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # sizes are constants of what is traced
        if tool == 'trace':
            recorded = torch.jit.trace(model, x, check_trace=False)
        else:
            recorded = torch.export.export(model, (x,), strict=False).module()
        assert_near(outputs(recorded, other), outputs(model, other))


# Counts and pools ----------------------------------------------------------------------------------------------------


def count_of(base: dict, **peft) -> int:
    with meta_device():
        return count_trainable(PeftBackbone(base=base, peft=dict(type='ParaX', **peft))).backbone_trainable


def formula(channels: int, experts: int, sites: int = 2, rank: int = 128) -> int:
    """The count of a stage in the docstring."""
    module = 43 * channels + rank**2 + 4 * rank + 23 + 85 * experts
    return sites * experts * module + experts * (2 * rank * channels + 83 * rank)


def test_published_counts():
    """5,239,152 in Swin-B and 7,296,624 in Swin-L, each pool once; the formula says so, too."""
    for name, published in (('swin_b', 5_239_152), ('swin_l', 7_296_624)):
        size = SIZES[name]
        assert count_of(dict(type='mmdet.SwinTransformer', **size)) == published
        assert sum(formula(size['embed_dims'] * 2**i, depth) for i, depth in enumerate(size['depths'])) == published


def test_counts_on_other_hosts():
    """A plain ViT is one stage, of as many experts as blocks have the method; ConvNeXt has one site."""
    width, depth = VIT['arch']['embed_dims'], VIT['arch']['num_layers']
    assert count_of(VIT, rank=8) == formula(width, depth, rank=8)
    assert count_of(VIT, rank=8, blocks='last 2') == formula(width, 2, rank=8)
    assert count_of(VIT, rank=4, sites=['post_ffn']) == formula(width, depth, sites=1, rank=4)
    convnext = HOSTS['mmpretrain-convnext']
    stages = zip(convnext['arch']['channels'], convnext['arch']['depths'], strict=True)
    assert count_of(convnext, rank=8) == sum(formula(c, m, sites=1, rank=8) for c, m in stages)


def test_output_norms_train_by_a_rule():
    """The published code trains them, and its Swin-B then trains 3,840 more; a host without them is refused."""
    swin_b = dict(type='mmdet.SwinTransformer', **SIZES['swin_b'])
    with meta_device():
        model = PeftBackbone(base=swin_b, peft=dict(type='ParaX'), trainable='output_norms')
    trained = {name for name, p in model.named_parameters() if p.requires_grad and '.peft.' not in name}
    assert trained == {f'norm{i}.{part}' for i in range(4) for part in ('weight', 'bias')}
    count = count_trainable(model)
    assert count.backbone_trainable == 5_239_152 + 3_840
    assert next(part for part in count.parts if part.part == 'method (ParaX)').trainable == 5_239_152
    with pytest.raises(ConfigError, match='output_norms'):
        PeftBackbone(base=VIT, peft=dict(type='ParaX', rank=8), trainable='output_norms')


def pools(model) -> list[nn.Module]:
    """One module of each different pool of a backbone, in order."""
    return list({id(m.pool.down): m.pool for m in reversed(method_modules(model))}.values())[::-1]


def test_a_stage_has_one_pool():
    """Of all modules in a sequence, with an expert for every block; blocks of another rank have another pool, and so
    have stages of the same width."""
    base = dict(SWIN, depths=(2, 3, 1, 1))
    model = PeftBackbone(base=base, peft=dict(type='ParaX', rank=8))
    assert [len(pool.down) for pool in pools(model)] == [2, 3, 1, 1]
    for stage, pool in zip(model.stages, pools(model), strict=True):
        for m in (m for block in stage.blocks for m in block.peft.values()):
            assert all(own is p for own, p in zip(m.pool.parameters(), pool.parameters(), strict=True))
    peft = dict(type='ParaX', rank={'stages.1.blocks.0': 4, 'default': 8}, blocks='stages.1.*')
    model = PeftBackbone(base=base, peft=peft)
    assert [tuple(pool.down.shape) for pool in pools(model)] == [(1, 4, 48), (2, 8, 48)]
    model(images())
    twins = PeftBackbone(base=DECLARED['mmseg-svt'], peft=dict(type='ParaX', rank=4))
    assert [len(pool.down) for pool in pools(twins)] == [2] * 4


def test_a_look_at_what_an_output_depends_on_leaves_the_pools():
    """A backbone that may end early is run without weights when it is frozen, and has its own again after that."""
    model = PeftBackbone(base=dict(type='mmdet.ResNet', depth=18, base_channels=8), peft=dict(type='ParaX', rank=4))
    assert not any(p.is_meta for p in model.parameters())
    before = dict(model.named_parameters(remove_duplicate=False))
    functional_call(model, {name: p.detach() * 0 for name, p in model.named_parameters()}, images())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())


def test_initial_values():
    """Those of the published code; every pool is initialised once, with an expert unlike the others."""
    model = PeftBackbone(base=SWIN, peft=dict(type='ParaX', rank=24, layer_scale=0.25))
    model.init_weights()
    for m in method_modules(model):
        assert (m.norm_scale == 1e-5).all() and (m.scale == 0.25).all() and (m.chain == 1).all()
        assert (m.residual_scale == 1).all() and not m.residual_bias.any() and not m.bias.any()
        for layer in (m.opening, m.closing, m.router[0], m.router[2], m.mixing, m.project):
            fan_in = layer.weight[0].numel()
            assert not layer.bias.any() and 0.5 < layer.weight.abs().max() * fan_in**0.5 <= 1 + 1e-6
    for pool in pools(model):
        for experts in pool.parameters():
            assert 0.017 < experts.std() < 0.023
        assert len(pool.down) == 1 or not torch.equal(pool.down[0], pool.down[1])
    assert sum(m.resets_pool for m in method_modules(model)) == len(pools(model))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rank=0), 'rank=0 must be'),
        (dict(rank=4096), 'rank=4096 must be at most'),
        (dict(kernel_sizes=[3]), 'at least two different odd'),
        (dict(kernel_sizes=[3, 4]), 'at least two different odd'),
        (dict(kernel_sizes=[3, 3]), 'at least two different odd'),
        (dict(router_width=1.5), 'router_width=1.5 must be'),
        (dict(layer_scale=-1.0), 'layer_scale=-1.0 must be'),
        (dict(residual_scale=1), 'residual_scale=1 must be True or False'),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PeftBackbone(base=SWIN, peft=dict(dict(type='ParaX', rank=8), **options))


# Parameters that train in the backbone: the modules and pools, and the output norms of Swins.
TRAINED = {
    'parax_cascade_swin_b_coco': 5_239_152 + 3_840,
    'parax_retinanet_swin_l_voc': 7_296_624 + 5_760 - 2 * 192,  # the first stage has no output
    'parax_upernet_swin_l_ade20k': 7_296_624 + 5_760,
    'parax_cascade_dinov2_b_coco': formula(768, 12, rank=64),
    'parax_upernet_dinov2_b_ade20k': formula(768, 12, rank=64),
    'parax_retinanet_dinov2_s_voc': formula(384, 12, rank=64),
}


@pytest.mark.parametrize('name', TRAINED)
def test_configs(name):
    """What trains in the backbone of each shipped config, what the model index and the tables say of it, and that it is
    the config of LoRA but for the method and the published settings."""
    file = ROOT / f'configs/parax/{name}.py'
    assert len(file.read_text().splitlines()) <= 15
    cfg = load_config(str(file))
    init_default_scope(cfg.default_scope)
    with meta_device():
        backbone = MODELS.build(cfg.model.backbone)
    assert count_trainable(backbone).backbone_trainable == TRAINED[name] == listed()[name]['Metadata'][COUNT]
    task = next((task for task in TASKS.values() if config_name('parax', task.name) == name), None)
    assert task is None or published_trainable('parax', task.name) == TRAINED[name]
    other = load_config(str(ROOT / f'configs/lora/{name.replace("parax", "lora")}.py'))
    if 'ade20k' in name and 'swin' in name:
        assert cfg.optim_wrapper.optimizer.pop('lr') == 3e-4 and other.optim_wrapper.optimizer.pop('lr') == 6e-5
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.pop('backbone') == dict(decay_mult=1.0)
    assert cfg.model.backbone.pop('trainable', None) == ('output_norms' if 'swin' in name else None)
    for each in (cfg, other):
        each.model.backbone.pop('peft')
    assert cfg.to_dict() == other.to_dict()


@pytest.mark.parametrize('trainable', ['output_norms', 'norm'])
def test_a_run_is_recognised(trainable):
    """With the output norms, as published, and without a rule; with another rule it is no published method."""
    backbone = dict(type='mona_mm.PeftBackbone', peft=dict(type='ParaX'))
    runs = [dict(model=dict(backbone=backbone | more)) for more in ({}, dict(trainable=trainable))]
    expected = ['parax', 'parax' if trainable == 'output_norms' else None]
    assert [method_of(run, Log(), {}) for run in runs] == expected


# Sharing -------------------------------------------------------------------------------------------------------------


def trained(base: dict = SWIN, steps: int = 2, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = PeftBackbone(base=dict(base, drop_path_rate=0.0), peft=dict(type='ParaX', rank=8), **options)
    model.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for seed in range(steps):
        train_step(model, optimizer, seed)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    sum(out.square().mean() for out in outputs(model, images())).backward()
    optimizer.step()


def sharing(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def test_copies_keep_the_sharing():
    """A deep copy and a pickled one have one pool for a stage, which is not the source's."""
    model, _ = trained(steps=1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sharing(twin) == sharing(model) and len(sharing(twin)) == 4 * 5
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert_equal(outputs(twin.eval(), x := images()), outputs(model.eval(), x))


@pytest.mark.parametrize('update_buffers', [False, True], ids=['parameters', 'buffers too'])
def test_an_average_follows_a_pool_as_it_does_the_rest(update_buffers):
    """What has several names is averaged once an update."""
    model, optimizer = trained(steps=0)
    average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=update_buffers)
    average.update_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, optimizer, 0)
    average.update_parameters(model)
    after = dict(model.named_parameters())
    expected = {name: 0.75 * p + 0.25 * after[name].detach() for name, p in before.items()}
    assert_near(dict(average.module.named_parameters()), expected, 1e-6)
    assert sharing(average.module) == sharing(model)


def test_a_delta_stores_a_pool_once(tmp_path):
    """Under the name of the first module, with the output norms beside it, and gives all of them back."""
    model, _ = trained(trainable='output_norms')
    file = tmp_path / 'a.delta.safetensors'
    mona_mm.save_delta(model, file)
    with safe_open(file, 'pt') as opened:
        stored = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118, it is no dict
    assert sum('.pool.' in name for name in stored) == 4 * 5
    assert sum(math.prod(shape) for shape in stored.values()) == count_trainable(model).backbone_trainable
    fresh, _ = trained(steps=0, trainable='output_norms')
    mona_mm.load_delta(fresh, file)
    assert sharing(fresh) == sharing(model)
    assert_equal(fresh.state_dict(), model.state_dict())


def test_resumed_training_is_uninterrupted_training(tmp_path):
    """Model and optimizer, saved and loaded into a new model, go on as if nothing had happened."""
    model, optimizer = trained(steps=2)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / 'a.pth')
    train_step(model, optimizer, 2)
    other, its_optimizer = trained(steps=0)
    for each, state in zip((other, its_optimizer), torch.load(tmp_path / 'a.pth'), strict=True):
        each.load_state_dict(state)
    train_step(other, its_optimizer, 2)
    assert sharing(other) == sharing(model)
    assert_equal(other.state_dict(), model.state_dict())


def test_activation_checkpoints_give_the_same_gradients():
    """Each block computes anew what it needs, the mixed weights too; the gradients of a pool still add up."""
    models = [trained(dict(SWIN, with_cp=with_cp), steps=0)[0] for with_cp in (False, True)]
    found = []
    for model in models:
        torch.manual_seed(3)
        sum(out.square().mean() for out in outputs(model, images())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_near(found[1], found[0], 1e-6, least=1e-4)


def train_on(x: torch.Tensor, wrap=lambda model: model) -> dict[str, torch.Tensor]:
    """Two steps of the same small backbone; what it has then trained."""
    torch.manual_seed(0)
    base = dict(SWIN, depths=(1, 2, 1, 1), drop_path_rate=0.0)
    model = PeftBackbone(base=base, peft=dict(type='ParaX', rank=4)).double()
    model.init_weights()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in wrapped(x)).backward()
        optimizer.step()
    assert len(sharing(model)) == 4 * 5
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def train_on_a_half(batch: torch.Tensor, folder: Path) -> None:
    """The same in one of two processes, on its half of a batch."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    torch.save(train_on(batch[rank::2], DistributedDataParallel), folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Two gloo processes on halves of a batch end with the parameters of one process on all of it, the pools too."""
    batch = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    in_processes(2, tmp_path, train_on_a_half, batch, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert_near(first, train_on(batch), 1e-12, least=1e-3)
    assert_equal(second, first)


# Published checkpoints -----------------------------------------------------------------------------------------------

PUBLISHED_PARTS = {
    'norm_scale': 'norm_gamma',
    'opening': 'dwconv1',
    'closing': 'dwconv2',
    'mixing': 'attn.0',
    'chain': 'conv_res_scale',
    'project': 'proj',
    'scale': 'layer_scale',
    'bias': 'layer_bias',
    'residual_scale': 'res_scale',
    'residual_bias': 'res_bias',
}
PUBLISHED_POOL = {'down': 'projA_params', 'up': 'projB_params'}
PUBLISHED_POOL.update({f'filters.{i}': f'conv{k}x{k}_params' for i, k in enumerate((3, 5, 7))})


def to_parax(model: nn.Module, adapters: dict[str, str], norms: str, base: dict[str, str]) -> dict[str, torch.Tensor]:
    """A backbone with ParaX in the published names: written independently of the converter."""
    published = {}
    for name, tensor in model.state_dict().items():
        block, found, part = name.partition('.peft.')
        for old, new in base.items():
            block = block.replace(old, new)
        if not found:
            published[re.sub(r'^norm(\d)', norms, block)] = tensor
            continue
        site, part = part.split('.', 1)
        if part.startswith('pool.'):
            stage = re.search(r'\d', block)[0]
            expert = PUBLISHED_POOL[part.removeprefix('pool.')]
            published[f'peft_params.{stage}.{expert}'] = tensor.unsqueeze(2) if 'conv' in expert else tensor
            continue
        first, dot, rest = part.partition('.')
        published[f'{block}.{adapters[site]}.{PUBLISHED_PARTS.get(first, first)}{dot}{rest}'] = tensor
        published[f'{block}.{adapters[site]}.logit_scale'] = torch.zeros(5)
    return published


PUBLISHED = {
    'swin': (
        'mmdet-swin',
        dict(post_attn='adapter1', post_ffn='adapter2'),
        r'extra_norm\1',
        {
            'stages.': 'layers.',
            '.attn.w_msa.': '.attn.',
            '.ffn.layers.0.0.': '.mlp.fc1.',
            '.ffn.layers.1.': '.mlp.fc2.',
            'patch_embed.projection.': 'patch_embed.proj.',
        },
    ),
    'convnext': (
        'mmpretrain-convnext',
        dict(post_ffn='adapter'),
        r'extra_norm.\1',
        {'.depthwise_conv.': '.dwconv.', '.pointwise_conv': '.pwconv'},
    ),
}


@pytest.mark.parametrize('whole', [False, True], ids=['backbone', 'detector'])
@pytest.mark.parametrize('host', PUBLISHED)
def test_published_checkpoints(host, whole):
    """They load strictly, output norms included, and a pool has the name of each of its modules."""
    name, adapters, norms, base = PUBLISHED[host]
    cfg = dict(base=dict(HOSTS[name]), peft=dict(type='ParaX', rank=8), trainable='output_norms')
    source, target = PeftBackbone(**cfg), PeftBackbone(**cfg)
    off_initial_values(source)
    expected = {k: t for k, t in source.state_dict().items() if '.downsample.' not in k}  # re-ordered: test_convert.py
    published = {k: t for k, t in to_parax(source, adapters, norms, base).items() if '.downsample.' not in k}
    if whole:
        state = convert_model(
            {'state_dict': {f'backbone.{k}': t for k, t in published.items()} | {'head.b': torch.zeros(1)}}
        )
        assert state.pop('head.b').numel() == 1
        state = {k.removeprefix('backbone.'): t for k, t in state.items()}
    else:
        state = convert_state_dict(published)
    assert_equal(state, expected)
    assert not target.load_state_dict(state, strict=False).unexpected_keys


def test_a_temperature_of_the_published_router():
    """It multiplies the scores of a kind of expert before the softmax, and becomes a part of the last layer."""
    name, adapters, norms, base = PUBLISHED['swin']
    model = PeftBackbone(base=HOSTS[name], peft=dict(type='ParaX', rank=8))
    off_initial_values(model)
    published = to_parax(model, adapters, norms, base)
    temperature = torch.randn(5)
    published['layers.0.blocks.1.adapter1.logit_scale'] = temperature
    state = convert_state_dict(published)
    path = 'stages.0.blocks.1.peft.post_attn.router.2'
    before, after = (nn.Linear(16, 5 * 2) for _ in range(2))
    for layer, source in ((before, model.state_dict()), (after, state)):
        layer.load_state_dict({part: source[f'{path}.{part}'] for part in ('weight', 'bias')})
    hidden = torch.randn(3, 16)
    assert_near(after(hidden).view(3, 5, 2), before(hidden).view(3, 5, 2) * temperature.exp()[:, None])
    other = 'stages.0.blocks.0.peft.post_attn.router.2.weight'
    assert_equal(state[other], model.state_dict()[other])
