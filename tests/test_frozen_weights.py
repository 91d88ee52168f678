"""Frozen weights in half precision: rounded once, and from then on mixed precision bit for bit."""

import copy
from functools import partial

import pytest
import torch
from conftest import HOSTS, needs_gpu
from helpers import assert_equal, assert_near, pairwise
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from suite import (
    CLONES,
    METHOD_CONFIGS,
    STRUCTURED,
    check_copies,
    images,
    is_common_in,
    is_common_structured,
    load,
    plan_for,
    supports,
)
from torch import nn

from mona_mm import PeftBackbone, count_trainable
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules
from mona_mm.nn.meta import meta_device
from mona_mm.spt.sparse import merge_sparse, sparse_deltas

RULES = ('fixed', 'bitfit', 'norm_tuning', 'partial_1')
TUNINGS = {
    **{name: dict(peft=peft) for name, peft in METHOD_CONFIGS.items() if name not in ('mona-design-2', 'lora-ffn')},
    **{rule: dict(trainable=rule) for rule in RULES},
    **{f'spt-{kind}': kind for kind in STRUCTURED},
}
CASES = [
    pytest.param(
        (HOSTS[host], tuning),
        id=f'{host}-{name}',
        marks=[]
        if is_common_in(host, name)
        or (name == 'bitfit' and host in ('mmdet-swin', 'mmpretrain-vit-no-cls'))
        or (name.startswith('spt-') and host != 'mmdet-swin' and is_common_structured(host, name.removeprefix('spt-')))
        else [pytest.mark.slow],
    )
    for host in HOSTS
    for name, tuning in TUNINGS.items()
    if supports(host, name)
]
BF16 = dict(frozen_dtype='bfloat16')


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[dict, dict]:
    """A host's config, and what PeftBackbone is to do to it."""
    host, tuning = request.param
    if isinstance(tuning, str):
        plan_for(host, STRUCTURED[tuning]).save(tmp_path / 'plan.safetensors')
        tuning = dict(peft=dict(type='SPT', plan=str(tmp_path / 'plan.safetensors')))
    return dict(host), tuning


def disturb(model) -> None:
    """What trains, off its initial values, by as much as training does and half precision would lose."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 1e-3)


def step(model, autocast: torch.dtype | None = None, device: str = 'cpu', side: int = 64) -> tuple[list, dict]:
    """Outputs in train mode with drawn paths, as they come, and gradients."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    x = torch.randn(2, 3, side, side).to(device)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        outs = list(model(x))
    loss = sum((out.float() * torch.randn(out.shape).to(device)).sum() for out in outs) / 100
    if loss.requires_grad:
        loss.backward()
    return [out.detach() for out in outs], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_what_is_kept(model, single, dtype: torch.dtype) -> None:
    """Frozen matrices and kernels of linear layers, convolutions and torch's attention, and nothing else; what is
    counted stays the same."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            kept = isinstance(module, kinds) and name in ('weight', 'in_proj_weight') and not p.requires_grad
            assert p.dtype == (dtype if kept else torch.float32), f'{path}.{name}'
    assert all(p.dtype == torch.float32 for module in method_modules(model) for p in module.parameters())
    assert count_trainable(model) == count_trainable(single)


def check_against_autocast(host, tuning, dtype, device='cpu') -> None:
    """A backbone with ``frozen_dtype`` equals the same one in float32 under autocast, whose weights are those after
    rounding; bit for bit, outputs and gradients, in and out of autocast."""
    of = getattr(torch, dtype)
    torch.manual_seed(0)
    model = PeftBackbone(base=host, frozen_dtype=dtype, **tuning)
    torch.manual_seed(0)
    single = PeftBackbone(base=host, **tuning)
    check_what_is_kept(model, single, of)
    for each in (model, single):
        torch.manual_seed(1)
        each.init_weights()
    state = model.state_dict()
    for name, tensor in single.state_dict().items():  # the same random numbers, rounded where they are kept so
        if name.endswith('.magnitude'):  # DoRA's, the norms of the weights that the model has
            assert_near(state[name], tensor, torch.finfo(of).eps)
        else:
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    for each in (model, single):
        torch.manual_seed(2)
        disturb(each)
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()}, strict=False)
    model, single = model.to(device), single.to(device)
    side = host.get('img_size', 32)  # half precision takes long on a CPU that has none
    expected, gradients = step(single, of, device, side)
    for autocast in (None, of):
        outs, grads = step(model, autocast, device, side)
        for out, reference in zip(outs, expected, strict=True):
            assert out.dtype == (torch.float32 if autocast is None else reference.dtype)
            assert torch.equal(out, reference.to(out.dtype))
        assert grads.keys() == gradients.keys()
        wrong = [name for name, grad in grads.items() if not torch.equal(grad, gradients[name])]
        assert not wrong, wrong[:5]
    assert all(grad.dtype == torch.float32 for grad in gradients.values())


def test_equals_autocast(case):
    """Every method and rule on every host, where the frozen weights are in bfloat16; in `make test` every method and
    every host, BitFit of the rules, and SPT with each of its modules."""
    check_against_autocast(*case, 'bfloat16')


@pytest.mark.parametrize(
    ('host', 'dtype', 'fast'),
    pairwise(['mmdet-swin', 'mmpretrain-vit'], ['bfloat16', 'float16'], dict(fast=True, plain=False)),
)
def test_equals_autocast_in_both_types_and_forms(host, dtype, fast):
    check_against_autocast(HOSTS[host], dict(peft=dict(type='Mona', bottleneck=8), fast=fast), dtype)


@needs_gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_trains_on_a_gpu(dtype):
    """On a GPU the outputs are those of autocast, within half precision."""
    tuning = dict(peft=dict(type='Mona', bottleneck=8))
    model, single = (PeftBackbone(base=HOSTS['mmdet-swin'], **tuning, **kw) for kw in (dict(frozen_dtype=dtype), {}))
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    for a, b in zip(step(model.cuda(), None, 'cuda')[0], step(single.cuda(), getattr(torch, dtype), 'cuda')[0],
                    strict=True):  # fmt: skip
        assert_near(a, b.float(), 3e-2)


def test_most_of_the_bytes():
    """Of a frozen Swin of Swin-B's width under Mona nine tenths of half the bytes go, what Mona adds included."""
    host = dict(type='mmdet.SwinTransformer', embed_dims=128, depths=(1, 1, 3, 1), num_heads=(4, 8, 16, 32))
    with meta_device():
        half, single = (PeftBackbone(base=host, peft=dict(type='Mona'), **kw) for kw in (BF16, {}))
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (half, single)]
    assert 0.5 < sizes[0] / sizes[1] < 0.55


@pytest.mark.parametrize(
    ('host', 'clone'),
    pairwise(
        ['mmdet-swin', 'mmpretrain-vit'],
        CLONES,
        common=lambda host, clone: (host == 'mmdet-swin') == (clone == 'deepcopy'),
    ),
)
def test_the_suite(host, clone, tmp_path):
    """What is promised of every method: copies, round trip, initial values from any source."""
    method = dict(type='Mona', bottleneck=8)
    check_copies(PeftBackbone(base=HOSTS[host], peft=method, **BF16), clone)
    source, target = (PeftBackbone(base=HOSTS[host], peft=method, **BF16) for _ in range(2))
    source.init_weights()
    torch.save(source.state_dict(), tmp_path / 'whole.pth')
    target.load_state_dict(torch.load(tmp_path / 'whole.pth', weights_only=True))
    for model in (source, target):
        model.eval()
    x = images()
    assert_equal(source(x), target(x))
    assert_equal(clone(source)(x), target(x))


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmdet-pvtv2'])
def test_a_pretrained_file(host, tmp_path):
    """A float32 file loads, through `init_weights` and through a whole checkpoint, and is rounded; views of the weights
    that others hold (a state dict, an optimizer) see what was loaded."""
    stock = MODELS.build(HOSTS[host])
    stock.init_weights()
    torch.save(stock.state_dict(), tmp_path / 'base.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    model = PeftBackbone(base=dict(HOSTS[host], init_cfg=init_cfg), peft=dict(type='Mona', bottleneck=8), **BF16)
    held = model.state_dict()
    model.init_weights()
    again = PeftBackbone(base=HOSTS[host], peft=dict(type='Mona', bottleneck=8), **BF16)
    load(again, stock.state_dict())
    for name, tensor in stock.state_dict().items():
        for state in (held, model.state_dict(), again.state_dict()):
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert held['patch_embed.projection.weight' if 'swin' in host else 'layers.0.0.projection.weight'].dtype == (
        torch.bfloat16
    )


def test_a_plan_knows_its_base(tmp_path):
    """A plan of SPT made for float32 weights fits them rounded, and no others; changes that are far below what
    bfloat16 can add to a weight are in what the forward computes with."""
    from mona_mm.errors import PlanError
    from mona_mm.spt.parts import Architecture
    from mona_mm.spt.plan import base_digest

    host = HOSTS['mmdet-swin']
    stock = MODELS.build(host)
    stock.init_weights()
    torch.save(stock.state_dict(), tmp_path / 'base.pth')
    plan = plan_for(host, STRUCTURED['lora'])
    plan.info['base_digest'] = base_digest(stock, Architecture.of(stock))
    plan.save(tmp_path / 'plan.safetensors')
    base = dict(host, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    peft = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'))
    model = PeftBackbone(base=base, peft=peft, **BF16)
    model.init_weights()
    with pytest.raises(PlanError, match='other weights'):
        PeftBackbone(base=host, peft=peft, **BF16).init_weights()

    name, delta = next((n, d) for n, d in sparse_deltas(model).items() if n.endswith('.weight') and 'ffn' in n)
    nn.init.constant_(delta.values, 1e-6)
    weight = model.get_parameter(name)
    assert weight.dtype == torch.bfloat16 and delta(weight).dtype == torch.float32
    changed = (delta(weight) != weight.float()).flatten().nonzero()[:, 0]
    assert torch.equal(changed, delta.indices.long())
    effective = {n: d(model.get_parameter(n)) for n, d in sparse_deltas(model).items()}
    state = merged_state_dict(model)
    assert torch.equal(state[name], effective[name])
    merge_sparse(model)
    assert all(torch.equal(model.get_parameter(n), tensor) for n, tensor in effective.items())


def test_merging_rounds_no_addition_away():
    """An addition of LoRA that is 1e-4 of the weights, which bfloat16 could not hold beside them, is in what is merged;
    the stock model in float32 computes with it."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=4, sites=['q', 'fc1']), **BF16)
    model.init_weights()
    for module in method_modules(model):
        nn.init.normal_(module.up.weight, std=1e-5)
    state = merged_state_dict(model)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    block, merged = model.stages[2].blocks[0], state['stages.2.blocks.0.ffn.layers.0.0.weight']
    weight = block.ffn.layers[0][0].weight.float()
    delta = block.peft['fc1'].delta_weight(weight)
    assert 0 < delta.abs().max() < 1e-3 * weight.abs().max()
    assert_near(merged - weight, delta, 1e-2)
    stock = MODELS.build(HOSTS['mmdet-swin'])
    stock.load_state_dict(state)
    stock.eval()
    model.eval()
    x = images()
    for a, b in zip(stock(x), model(x), strict=True):
        assert (a - b).norm() < 0.05 * a.norm()


def test_in_ddp():
    """Wrapped for distributed training, whose start sends every weight around, it gives the same gradients."""
    model = PeftBackbone(base=dict(HOSTS['mmdet-swin'], drop_path_rate=0.0), peft=dict(type='LoRA', rank=4), **BF16)
    model.init_weights()
    disturb(model)
    expected, gradients = step(model)
    twin = copy.deepcopy(model)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        outs, grads = step(MMDistributedDataParallel(twin))
        assert_equal(outs, expected)
        assert all(torch.equal(grads[f'module.{name}'], grad) for name, grad in gradients.items())
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_leaves_no_autocast_on():
    """Whatever happens in the backbone, the caller's precision is what it was."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], trainable='fixed', **BF16)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 4, 64, 64))
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('dtype', ['half', 'float32', torch.bfloat16, 16, ['bfloat16']])
def test_other_types_are_refused(dtype):
    with pytest.raises(ConfigError, match=r"frozen_dtype=.* must be 'bfloat16', 'float16' or None"):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'), frozen_dtype=dtype)


def test_nothing_frozen_is_refused():
    """Full tuning freezes nothing that could be kept so; the error says so."""
    build = partial(PeftBackbone, base=HOSTS['mmdet-swin'], **BF16)
    for tuning in (dict(), dict(trainable='full'), dict(peft=dict(type='Mona'), trainable='full')):
        with pytest.raises(ConfigError, match=r"every linear layer .* trains \(trainable=\['(all|full)'\]\).*Leave"):
            build(**tuning)
