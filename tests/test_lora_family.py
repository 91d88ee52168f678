"""DoRA, rsLoRA and LoRA that begins with a part of the base: plain formulas, Hugging Face's PEFT, counts, precision."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import HOSTS
from helpers import assert_equal, assert_near
from metafiles import COUNT, listed
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from shipped import CONFIGS
from suite import freeze_alike, load, outputs
from torch import nn

import mona_mm
from mona_mm import PeftBackbone, PeftModel, count_trainable
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules, method_names
from mona_mm.hosts.block import StockLinear
from mona_mm.methods import DoRA, LoRA
from mona_mm.methods.base import start_from_base
from mona_mm.methods.lora import singular_factors
from mona_mm.nn.meta import meta_device
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture
from mona_mm.spt.plan import module_cost

IN, OUT, RANK, ALPHA = 10, 8, 3, 2.0
STARTS = ('zero', 'trunc_normal', 'principal', 'minor')


def start_of(weight, rank, part, scale):
    """The two matrices that a LoRA begins with, from the singular vectors, by the published formulas."""
    u, s, vt = torch.linalg.svd(weight)
    order = torch.arange(len(s))[:rank] if part == 'principal' else torch.arange(len(s))[-rank:]
    root = torch.diag(s[order] / scale) ** 0.5
    return root @ vt[order], u[:, order] @ root


def plain_weight(module, weight, scale, initial):
    """The effective weight of LoRA or DoRA, by its definition. ``initial`` has the matrices that are subtracted."""
    changed = weight + scale * (module.up.weight @ module.down.weight)
    if initial is not None:
        changed = changed - scale * (initial[1] @ initial[0])
    if isinstance(module, DoRA):
        norm = (changed**2).sum(1) ** 0.5
        norm = norm.detach() if module.detach_norm else norm
        changed = (module.magnitude / norm)[:, None] * changed
    return changed


def module_beside(linear, cls, **options):
    """A module in float64 beside a linear layer, with every parameter off the value that it begins with."""
    module = cls(linear.in_features, linear.out_features, rank=RANK, alpha=ALPHA, **options).double()
    module.start_from(linear.weight.detach())
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


CASES = [
    (cls, init, rslora, detach)
    for cls, init, rslora, detach in itertools.product((LoRA, DoRA), STARTS, (False, True), (True, False))
    if cls is DoRA or (detach and init != 'trunc_normal')
]


@pytest.mark.parametrize(('cls', 'init', 'rslora', 'detach'), CASES)
def test_formula(cls, init, rslora, detach):
    """Output and every gradient, that of the input included, and of the addition to the weight, which hosts that read
    a weight train by."""
    linear = nn.Linear(IN, OUT).double()
    options = dict(init=init, use_rslora=rslora, **({} if cls is LoRA else dict(detach_norm=detach)))
    module = module_beside(linear, cls, **options)
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    initial = start_of(linear.weight.detach(), RANK, init, scale) if init in ('principal', 'minor') else None
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, OUT, dtype=torch.float64)
    expected = F.linear(x, plain_weight(module, linear.weight, scale, initial), linear.bias)
    tensors = [x, *module.parameters()]
    gradients = torch.autograd.grad((expected * direction).sum(), tensors)
    out = linear(x)
    by_output = out + module(x, out, StockLinear(linear, slice(None)))
    by_weight = F.linear(x, linear.weight + module.delta_weight(linear.weight), linear.bias)
    for actual in (by_output, by_weight):
        assert_near(actual, expected, 1e-12)
        assert_near(torch.autograd.grad((actual * direction).sum(), tensors), gradients, 1e-11)


@pytest.mark.parametrize('cls', [LoRA, DoRA])
def test_dropout_is_on_the_input_of_the_change(cls):
    """In training the base sees the whole input; in evaluation nothing is dropped."""
    linear = nn.Linear(IN, OUT).double()
    module = module_beside(linear, cls, dropout=0.4, init='minor').train()
    initial = module.initial_down, module.initial_up
    change = plain_weight(module, linear.weight, ALPHA / RANK, initial) - linear.weight
    x = torch.randn(6, IN, dtype=torch.float64)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    torch.manual_seed(3)
    assert_near(module(x, linear(x), StockLinear(linear, slice(None))), F.linear(dropped, change), 1e-11)
    module.eval()
    assert_near(module(x, linear(x), StockLinear(linear, slice(None))), F.linear(x, change), 1e-11)
    assert not module.is_weight_delta


@pytest.mark.parametrize('part', ['principal', 'minor'])
@pytest.mark.parametrize('shape', [(12, 7), (7, 12)])
def test_singular_factors(part, shape):
    """The part of the weight with the largest or smallest singular values; the rest of it has the others."""
    weight = torch.randn(shape, dtype=torch.float64)
    down, up = singular_factors(weight, 3, part, 0.5)
    values, taken = torch.linalg.svdvals(weight), slice(3) if part == 'principal' else slice(-3, None)
    assert_near(torch.linalg.svdvals(up @ down)[:3], values[taken] / 0.5, 1e-12)
    left = torch.linalg.svdvals(weight - 0.5 * up @ down)
    assert_near(left[:4], torch.cat((values[:0], values[3:] if part == 'principal' else values[:-3])), 1e-12)
    assert_near((up**2).sum(0), (down**2).sum(1), 1e-12)  # the square root of the values is in each


def test_a_part_that_is_zero_still_trains():
    """Of a weight without singular values, such as that of a new layer that begins at zero, no gradient is lost."""
    for weight in (torch.zeros(OUT, IN), torch.ones(OUT, IN)):
        module = LoRA(IN, OUT, rank=RANK, init='minor')
        module.start_from(weight)
        x = torch.randn(4, IN)
        assert (module(x, None, None) == 0).all()
        module(x, None, None).sum().backward()
        assert (module.up.weight.grad.norm(dim=0) > 0).all()


def test_rows_of_zeros():
    """A row of the base without a direction: no division by zero, and its addition and then its magnitude train."""
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight[2] = 0
    linear.requires_grad_(False)
    module = DoRA(IN, OUT, rank=RANK)
    module.start_from(linear.weight)
    assert module.magnitude[2] == 0
    optimizer, x, target = torch.optim.SGD(module.parameters(), lr=0.05), torch.randn(64, IN), torch.randn(64, OUT)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        out = linear(x)
        row = (out + module(x, out, StockLinear(linear, slice(None))) - target)[:, 2]
        losses.append(row.square().mean())
        losses[-1].backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
    assert module.magnitude[2] != 0 and losses[-1] < losses[0]
    assert module.delta_weight(linear.weight).isfinite().all()


def test_counts():
    """DoRA of rank 16 on q, k and v of DINOv2-S: 36 times 16 (384 + 384) + 384; the variants of LoRA as LoRA."""
    sites = ['q', 'k', 'v']
    trainable = {}
    for name, peft in dict(
        dora=dict(type='DoRA'), lora=dict(type='LoRA', rank=16), minor=dict(type='LoRA', rank=16, init='minor')
    ).items():
        with meta_device():
            model = PeftBackbone(base=dict(type='mona_mm.DINOv2', arch='small'), peft=dict(peft, sites=sites))
        trainable[name] = count_trainable(model).trainable
    assert trainable == dict(dora=456_192, lora=442_368, minor=442_368)
    module = DoRA(IN, OUT, rank=RANK)
    assert sum(p.numel() for p in module.parameters()) == RANK * (IN + OUT) + OUT


@pytest.mark.parametrize('cls', [LoRA, DoRA])
def test_bad_arguments(cls):
    for options, message in (
        (dict(rank=9, init='principal'), 'rank=9 must be at most 8 with init='),
        (dict(rank=2, alpha=0, init='minor'), 'alpha must be above 0'),
        (dict(rank=2, init='pissa'), "init='pissa' must be 'zero', 'trunc_normal', 'principal' or 'minor'"),
        (dict(rank=2, use_rslora=1), 'use_rslora=1 must be True or False'),
    ):
        with pytest.raises(ConfigError, match=f'{cls.__name__}: {message}'):
            cls(IN, OUT, **options)
    with pytest.raises(ConfigError, match=f'{cls.__name__}: init=.*not finite'):
        cls(IN, OUT, rank=2, init='minor').start_from(torch.full((OUT, IN), torch.nan))


# In hosts ------------------------------------------------------------------------------------------------------------

EVERY_SITE = ['q', 'k', 'v', 'proj', 'fc1', 'fc2']
FAMILY = {
    'dora': dict(type='DoRA', rank=4, sites=EVERY_SITE),
    'dora-principal': dict(type='DoRA', rank=4, sites=EVERY_SITE, init='principal', detach_norm=False),
    'principal': dict(type='LoRA', rank=4, sites=EVERY_SITE, init='principal'),
    'minor': dict(type='LoRA', rank=4, sites=EVERY_SITE, init='minor', use_rslora=True),
}


@pytest.mark.parametrize('name', ['mmdet-swin', 'mmpretrain-swinv2'])  # of which one reads the weight of qkv
@pytest.mark.parametrize('method', FAMILY)
def test_starts_as_the_stock_model(name, method):
    """Bit for bit, where a host calls its linear layers, and where it reads their weights."""
    stock = MODELS.build(HOSTS[name])
    stock.init_weights()
    model = PeftBackbone(base=HOSTS[name], peft=FAMILY[method], fast=False)
    load(model, stock.state_dict())
    freeze_alike(stock, model)
    start_from_base(model)
    stock.eval()  # mmpretrain's returns nothing
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    assert_equal(outputs(model, x), outputs(stock, x))


@pytest.mark.parametrize('method', FAMILY)
def test_gradients_under_autocast(method):
    """What bfloat16 does to the gradients is rounding: the norm and the differences are computed in float32."""
    torch.manual_seed(2)
    linear = nn.Linear(64, 48)
    options = {key: value for key, value in FAMILY[method].items() if key not in ('type', 'sites')}
    module = (DoRA if 'dora' in method else LoRA)(64, 48, **options)
    module.start_from(linear.weight.detach())
    with torch.no_grad():  # changes that bfloat16 could not add to the values themselves
        for p in module.parameters():
            p.mul_(1 + 5e-4 * torch.randn_like(p)).add_(1e-5 * torch.randn_like(p))
    x, direction, results = torch.randn(256, 64), torch.randn(256, 48), []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = linear(x)
            addition = module(x, out, StockLinear(linear, slice(None)))
            assert addition.dtype == out.dtype == dtype
            gradients = torch.autograd.grad((addition * direction).sum(), list(module.parameters()))
            delta = module.delta_weight(linear.weight)
        results.append([addition.float(), delta.float(), *gradients])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_frozen_weights_in_half_precision():
    """The norm is that of the rounded weights in float32, so that the change begins at nothing; what is merged is in
    float32."""
    host = dict(HOSTS['mmdet-swin'], drop_path_rate=0.0)
    half = dict(base=host, frozen_dtype='bfloat16')
    model = PeftBackbone(**half, peft=FAMILY['dora'])
    plain = PeftBackbone(**half, trainable='none')
    model.init_weights()
    load(plain, {name: t for name, t in model.state_dict().items() if '.peft.' not in name})
    x = torch.randn(1, 3, 64, 64)
    assert_equal(outputs(model.eval(), x), outputs(plain.eval(), x))
    before = merged_state_dict(model)
    with torch.no_grad():
        for module in method_modules(model):
            module.magnitude.mul_(1 + 1e-4)
    name = 'stages.0.blocks.0.attn.w_msa.qkv.weight'
    merged = merged_state_dict(model)[name]
    assert merged.dtype == torch.float32
    assert_near(merged, before[name] * (1 + 1e-4), 1e-6)
    assert not torch.equal(merged, before[name])


def test_half_precision_of_the_whole_model():
    """Every tensor in bfloat16, without autocast: outputs, and the weight of a host that reads it, stay in bfloat16."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=FAMILY['dora']).to(torch.bfloat16).eval()
    assert all(out.dtype == torch.bfloat16 for out in outputs(model, torch.randn(1, 3, 64, 64).bfloat16()))
    for module in method_modules(model):
        weight = torch.randn(module.up.out_features, module.down.in_features).bfloat16()
        assert module.delta_weight(weight).dtype == torch.bfloat16


def test_several_copies_of_the_start():
    """A delta holds the matrices that a model began with: on a machine with other singular vectors, the values are
    those of the training run."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=FAMILY['principal']).eval()
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    names = set(mona_mm.frozen.changes.changing(model))
    assert {name for name in names if name.endswith(('initial_down', 'initial_up'))}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in method_modules(other):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.neg_().mul_(2)
    other.load_state_dict({name: t for name, t in model.state_dict().items() if name in names}, strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert_equal(outputs(other, x), outputs(model, x))


@pytest.mark.parametrize('name', ['mmdet-swin', 'mmpretrain-swinv2'])
@pytest.mark.parametrize(
    ('options', 'magnitude'),
    [(dict(type='DoRA'), 1), (dict(type='LoRA', init='minor', use_rslora=True), 0)],
    ids=['dora', 'minor'],
)
def test_structured_modules(name, options, magnitude, tmp_path):
    """As structured modules of SPT they are counted exactly. Where the rows of a fused bias, and weights of the same
    matrix, train singly, DoRA changes the matrix that the layer has, and leaves its bias as it is: the model and the
    merged one compute the same."""
    architecture = Architecture.of(MODELS.build(HOSTS[name]))
    block = architecture.blocks[0]
    qkv = architecture.matrices[block, 'q'].name
    biases = [(part.name, part.rows) for part in architecture.parts if part.kind == 'vector' and 'bias' in part.name]
    structured = dict(**options, rank=2, dropout=0.0, drop_path=0.0)
    plan = Plan(architecture, structured, {block: ('q', 'fc1')}, tuple(biases), {qkv: torch.arange(0, 200, 7)})
    assert module_cost(structured, architecture, block, 'q') == 2 * (24 + 24) + 24 * magnitude
    assert plan.counts.structured == 2 * (24 + 24) + 2 * (24 + 96) + (24 + 96) * magnitude
    plan.save(tmp_path / 'plan.safetensors')
    model = PeftBackbone(base=HOSTS[name], peft=dict(type='SPT', plan=str(tmp_path / 'plan.safetensors')))
    assert count_trainable(model).backbone_trainable == plan.counts.total
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = outputs(model, x)
    assert_near(outputs(mona_mm.merge(model), x), expected, 1e-12)


# Beside any layer ----------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A layer of any class, at ``layer``."""

    def __init__(self, cls: type[nn.Module], **options) -> None:
        super().__init__()
        self.layer = cls(**options)

    def forward(self, *inputs):
        return self.layer(*inputs)


LAYERS = {
    '3x3 of stride 2': dict(cls=nn.Conv2d, kernel_size=3, stride=2, padding=1),
    'grouped': dict(cls=nn.Conv2d, kernel_size=3, groups=2, bias=False),
    'reflected': dict(cls=nn.Conv2d, kernel_size=3, padding=1, padding_mode='reflect'),
    '1x1 of stride 2': dict(cls=nn.Conv2d, kernel_size=1, stride=2),
    'attention': dict(cls=nn.MultiheadAttention, embed_dim=12, num_heads=2, batch_first=True),
}


@pytest.mark.parametrize('method', ['DoRA', 'LoRA'])
@pytest.mark.parametrize('kind', LAYERS)
def test_beside_any_layer(kind, method):
    """A convolution, and q and v of torch's attention: the layer with the changed weight, its gradients, the merged
    layer."""
    options, is_attention = dict(LAYERS[kind]), kind == 'attention'
    if not is_attention:
        options |= dict(in_channels=8, out_channels=12)
    target = dict(path='layer.**' if is_attention else 'layer', type=method, rank=RANK, alpha=ALPHA, init='principal')
    target |= dict(slices=['q', 'v']) if is_attention else {}
    torch.manual_seed(6)
    stock = OneLayer(**options)
    model = PeftModel(base=dict(type=OneLayer, **options), targets=[target])
    model.load_state_dict(stock.state_dict(), strict=False)
    stock.double()
    model.double()
    start_from_base(model)
    initial = {id(m): [b.clone() for b in m.buffers()] for m in method_modules(model)}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    weights = {name: p.detach() for name, p in stock.layer.named_parameters()}
    for holder in [m for m in model.modules() if isinstance(m, mona_mm.hosts.layers.PeftLayer)]:
        for site, module in holder.peft.items():
            name = {'out_proj': 'out_proj.weight', 'q': 'in_proj_weight', 'v': 'in_proj_weight'}.get(site, 'weight')
            rows = slice(24, 36) if site == 'v' else slice(0, 12)
            part = weights[name][rows]
            changed = plain_weight(module, part.flatten(1), ALPHA / RANK, initial[id(module)]).view_as(part)
            before, after = weights[name][: rows.start], weights[name][rows.stop :]
            weights[name] = torch.cat((before, changed, after))
    x = torch.randn(2, 5, 12) if is_attention else torch.randn(2, 8, 9, 11)
    inputs = (x.double(),) * (3 if is_attention else 1)
    actual, expected = model(*inputs), torch.func.functional_call(stock.layer, weights, inputs)
    actual, expected = (out[0] if is_attention else out for out in (actual, expected))
    assert_near(actual, expected, 1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == (3 if is_attention else 1) * (3 if method == 'DoRA' else 2)
    gradients = [torch.autograd.grad(out.cos().sum(), parameters) for out in (actual, expected)]
    assert_near(*gradients, 1e-11)
    merged = mona_mm.merge(model)(*inputs)
    assert_near(merged[0] if is_attention else merged, expected, 1e-12)


# Configs -------------------------------------------------------------------------------------------------------------

WIDTHS = {  # of the blocks of each backbone
    'swin_b': [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2,
    'swin_l': [192] * 2 + [384] * 2 + [768] * 18 + [1536] * 2,
    'dinov2_s': [384] * 12,
    'dinov2_b': [768] * 12,
}
OURS = sorted(
    name for name, path in CONFIGS.items() if path.parent.name == 'dora' or name.endswith(('_principal', '_minor'))
)
QUICK = ('dora_retinanet_dinov2_s_voc', 'lora_retinanet_swin_l_voc_minor')


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in OURS])
def test_configs(name, monkeypatch):
    """At full size: what trains, also by the model index, and no weight decay on what stands for a weight itself."""
    monkeypatch.setattr('torch.accelerator.is_available', lambda: False)
    cfg = load_config(str(CONFIGS[name]))
    adapt_to_device(cfg)
    model = build_on_meta(cfg)
    widths = next(widths for key, widths in WIDTHS.items() if key in name)
    of_width = (lambda m: 3 * (16 * 2 * m + m)) if 'dora' in name else (lambda m: 2 * 64 * 2 * m)
    count = count_trainable(model).backbone_trainable
    assert count == listed()[name]['Metadata'][COUNT] == sum(map(of_width, widths))
    names = {id(p): n for n, p in model.named_parameters()}
    free = set()
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        free |= {names[id(p)] for p in group['params'] if group['weight_decay'] == 0}
    ending = '.magnitude' if 'dora' in name else '.weight'
    assert {n for n in free if '.peft.' in n} == {n for n in method_names(model) if n.endswith(ending)}
    assert len(CONFIGS[name].read_text().splitlines()) <= 15


def test_all_configs_are_there():
    assert {name.removeprefix('dora_') for name in OURS if name.startswith('dora_')} == {
        *('cascade_swin_b_coco', 'retinanet_swin_l_voc', 'upernet_swin_l_ade20k'),
        *('cascade_dinov2_b_coco', 'upernet_dinov2_b_ade20k', 'retinanet_dinov2_s_voc'),
    }
