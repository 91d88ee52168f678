"""SPT as a method: what a plan says is what trains, on every host; plans are found or made where they are needed."""

import copy
import json

import pytest
import torch
from conftest import HOSTS, ROOT, golden, part
from helpers import assert_near, in_processes, pairwise, run_tool, scores
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from suite import (
    CLONES,
    PRECISIONS,
    SIZES,
    STRUCTURED,
    check_copies,
    check_names,
    check_round_trip,
    check_size,
    freeze_alike,
    images,
    is_common_structured,
    load,
    plan_for,
    trains_in_mixed_precision,
)
from torch import nn

from mona_mm import PeftBackbone, count_trainable
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, find_last_checkpoint, load_config
from mona_mm.errors import ConfigError, MissingFileError, PlanError, UserError
from mona_mm.hosts import find_host, method_modules
from mona_mm.methods.base import start_from_base
from mona_mm.nn.meta import meta_device
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture
from mona_mm.spt.sparse import merge_sparse, sparse_deltas
from mona_mm.spt_plans.plans import make_plan, require_plan

on_every_host = pytest.mark.parametrize(
    ('host', 'kind'),
    pairwise(HOSTS, list(STRUCTURED), common=lambda host, kind: kind == 'lora' or is_common_structured(host, kind)),
)
"""Every kind of structured module on every host; in `make test` LoRA on every host, and the others where the suite has
them."""


@pytest.fixture
def spt(host, kind, tmp_path) -> dict:
    """An SPT method with a plan for the host."""
    plan = plan_for(host, STRUCTURED[kind])
    plan.save(tmp_path / 'plan.safetensors')
    return dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'), structured=STRUCTURED[kind])


@on_every_host
def test_what_the_plan_says_trains(host, spt):
    """Exactly the plan's count, by the plan's own parts; all of them get a gradient and nothing else does."""
    plan = Plan.load(spt['plan'])
    model = PeftBackbone(base=host, peft=spt)
    model.init_weights()
    count = count_trainable(model)
    assert (count.backbone_trainable, count.method) == (plan.counts.total, 'SPT')
    assert plan.structured and plan.vectors and plan.counts.weights, 'a plan that shows nothing'
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, rows in plan.vectors if rows is None} <= trainable
    deltas = sparse_deltas(model)
    fused = {name for name, rows in plan.vectors if rows is not None}
    assert deltas.keys() == plan.weights.keys() | fused
    for name in plan.weights.keys() - fused:
        assert torch.equal(deltas[name].indices.long(), plan.weights[name])
    model.eval()  # a dropped path would leave some without
    for module in method_modules(model):
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    sum(out.square().sum() for out in model(images())).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= {'ln1.weight', 'ln1.bias'}
    assert not [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize(
    ('host', 'kind', 'clone', 'dtype'),
    pairwise(
        HOSTS,
        list(STRUCTURED),
        CLONES,
        list(PRECISIONS),
        common=lambda host, kind, clone, dtype: (
            is_common_structured(host, kind)
            and (clone == 'deepcopy') == (host == 'mmdet-swin')
            and (dtype == 'torch.float16') == (host == 'mmpretrain-vit')
        ),
    ),
)
def test_the_suite(host, spt, clone, dtype):
    """What is promised of every method: keys, round trip, copies, any size, half precision."""
    check_names(host, spt)
    check_round_trip(host, spt)
    check_copies(PeftBackbone(base=host, peft=spt), clone)
    check_size(PeftBackbone(base=host, peft=spt), SIZES['50x70'])
    trains_in_mixed_precision(host, dict(peft=spt), dtype)


@on_every_host
def test_begins_as_the_stock_model(host, spt):
    """LoRA, DoRA, Adapter and single weights begin as the identity; Mona's own initial values do not, as published."""
    if spt['structured']['type'] == 'Mona':
        return
    stock = MODELS.build(host)
    stock.init_weights()
    model = PeftBackbone(base=host, peft=spt)
    model.init_weights()
    load(model, stock.state_dict())
    start_from_base(model)
    freeze_alike(stock, model)
    stock.eval()
    model.eval()
    x = images()
    for ours, theirs in zip(model(x), stock(x), strict=True):
        assert_near(ours, theirs)


def test_merged_equals_unmerged(host, tmp_path):
    """Plans of LoRA and single weights go into stock weights: single weights bit for bit, LoRA to rounding."""
    plan = plan_for(host, STRUCTURED['lora'])
    plan.save(tmp_path / 'plan.safetensors')
    peft = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'), structured=STRUCTURED['lora'])
    model = PeftBackbone(base=host, peft=peft)
    model.init_weights()
    for module in method_modules(model):
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    model.eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        merge_sparse(model)
        descriptor = find_host(model)
        for block in descriptor.blocks(model).values():
            for site, module in block.peft.items():
                weight = block.get_parameter(descriptor.linears[site].weight)
                rows = weight[descriptor.linears[site].rows(weight)]
                rows += module.delta_weight(rows).view_as(rows)
        stock = MODELS.build(host)
        stock.load_state_dict({n: t for n, t in model.state_dict().items() if '.peft.' not in n}, strict=False)
        stock.eval()
        for merged, unmerged in zip(stock(x), expected, strict=True):
            assert_near(merged, unmerged)


@pytest.mark.parametrize('kind', ['lora', 'adapter'])
def test_modules_know_their_sites(kind, tmp_path):
    """`proj` alone has no dropout, and an Adapter there alone is parallel to the linear, in an attached plan."""
    base = HOSTS['mmpretrain-vit']
    plan = plan_for(base, STRUCTURED[kind])
    plan.save(tmp_path / 'plan.safetensors')
    peft = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'), structured={**STRUCTURED[kind], 'dropout': 0.2})
    model = PeftBackbone(base=base, peft=peft)
    sites = set()
    for block in find_host(model).blocks(model).values():
        for site, module in block.peft.items():
            sites.add(site)
            assert module.dropout.p == (0.0 if site == 'proj' else 0.2), site
            if kind == 'adapter':
                assert module.parallel == (site == 'proj'), site
    assert 'proj' in sites and len(sites) > 2


def test_a_plan_of_everything_is_ordinary_training(tmp_path):
    """Every weight of two linears and a norm as single weights: AdamW takes the steps of ordinary training."""
    host = dict(HOSTS['mmdet-swin'], drop_path_rate=0.0)
    names = [f'stages.1.blocks.0.{n}' for n in ('attn.w_msa.qkv.weight', 'ffn.layers.1.weight', 'norm2.weight')]
    stock = MODELS.build(host)
    stock.init_weights()
    weights = {name: torch.arange(stock.get_parameter(name).numel()) for name in names}
    Plan(Architecture.of(stock), None, {}, (), weights).save(tmp_path / 'plan.safetensors')
    tuned = PeftBackbone(base=host, peft=dict(type='SPT', plan=str(tmp_path / 'plan.safetensors')))
    load(tuned, stock.state_dict())
    stock.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for name in names:
        stock.get_parameter(name).requires_grad = True
    for model in (stock, tuned):
        model.double().eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            sum(out.square().mean() for out in model(x)).backward()
            optimizer.step()
    before = MODELS.build(host).double()
    merge_sparse(tuned)
    for name in names:
        assert_near(tuned.get_parameter(name), stock.get_parameter(name), 1e-9)
        assert not torch.allclose(stock.get_parameter(name), before.get_parameter(name))


def test_a_plan_for_other_weights_or_another_network_is_refused(tmp_path):
    host = HOSTS['mmdet-swin']
    stock = MODELS.build(host)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'base.pth')
    plan = plan_for(host, STRUCTURED['lora'])
    file = str(tmp_path / 'plan.safetensors')
    plan.save(file)
    with pytest.raises(PlanError, match='of another architecture than this SwinTransformer'):
        PeftBackbone(base=HOSTS['mmdet-swin'] | dict(mlp_ratio=2), peft=dict(type='SPT', plan=file))
    with pytest.raises(ConfigError, match="structured={'type': 'LoRA', 'rank': 4} is not what the plan .* made for"):
        PeftBackbone(base=host, peft=dict(type='SPT', plan=file, structured=dict(type='LoRA', rank=4)))
    with pytest.raises(MissingFileError, match='/nowhere'):
        PeftBackbone(base=host, peft=dict(type='SPT', plan='/nowhere'))
    with pytest.raises(MissingFileError, match='SPT needs a plan.*tools/train.py makes it'):
        PeftBackbone(base=host, peft=dict(type='SPT', budget='1%'))

    other = Plan(*(getattr(plan, f) for f in ('architecture', 'structured_config', 'structured', 'vectors', 'weights')),
                 info=dict(base_digest='0' * 64, pretrained='imagenet.pth'))  # fmt: skip
    other.save(file)
    model = PeftBackbone(base=host, peft=dict(type='SPT', plan=file))
    with pytest.raises(PlanError, match='SwinTransformer.*imagenet.pth'):
        model.init_weights()


@pytest.mark.parametrize('kind', ['lora', 'adapter'])
def test_golden_blocks(kind, tmp_path):
    """Two ViT blocks of the published code, structured modules on some of their matrices, through a plan: output, the
    input's gradient and every gradient of the modules, each within 1e-11 of its largest value."""
    tensors, metadata = golden(f'spt_block_{kind}', torch.float64)
    dim, rank = int(metadata['dim']), int(metadata['rank'])
    sites = metadata['order'].split(',')
    host = dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=dim, num_layers=2, num_heads=int(metadata['heads']), feedforward_channels=4 * dim),
        img_size=32,
        norm_cfg=dict(type='LN', eps=float(metadata['norm_eps'])),
    )
    architecture = Architecture.of(MODELS.build(host))
    rows = json.loads(metadata['structured_matrices'])
    structured = {f'layers.{i}': tuple(s for s, there in zip(sites, row, strict=True) if there)
                  for i, row in enumerate(rows)}  # fmt: skip
    config = dict(type='LoRA', rank=rank) if kind == 'lora' else dict(type='Adapter', bottleneck=rank)
    file = str(tmp_path / 'plan.safetensors')
    Plan(architecture, config, structured, (), {}).save(file)
    model = PeftBackbone(base=host, peft=dict(type='SPT', plan=file)).double()
    model.eval()
    stock = dict(norm1='ln1', norm2='ln2') | {'attn.proj': 'attn.proj', 'mlp.fc1': 'ffn.layers.0.0'}
    stock |= {'mlp.fc2': 'ffn.layers.1'}
    modules = {}
    with torch.no_grad():
        for i, row in structured.items():
            block, own = model.get_submodule(i), part(tensors, f'state/blocks.{i[-1]}.')
            for end in ('weight', 'bias'):
                block.get_parameter(f'attn.qkv.{end}').copy_(torch.cat([own[f'attn.{s}.{end}'] for s in 'qkv']))
                for published, ours in stock.items():
                    block.get_parameter(f'{ours}.{end}').copy_(own[f'{published}.{end}'])
            for site in row:
                for name, p in block.peft[site].named_parameters():
                    layer, _, end = name.partition('.')
                    path = f'{"mlp" if site[:2] == "fc" else "attn"}.structured_{site}.learnable'
                    found = [n for n in own if n.startswith(path) and n.endswith(end)]
                    modules[f'blocks.{i[-1]}.{sorted(found)[layer == "up"]}'] = p
    for name, p in modules.items():
        p.data.copy_(tensors[f'state/{name}'])
    x = tensors['input'].requires_grad_()
    out = x
    for block in model.layers:
        out = block(out)
    out.backward(tensors['cotangent'])
    assert_near(out, tensors['output'], 1e-11)
    assert_near(x.grad, tensors['grad_input'], 1e-11)
    gradients = {name: g for name, g in part(tensors, 'grad/').items() if name in modules}
    # The gradient of a key's bias is zero but for rounding: a constant added to all scores changes no softmax.
    assert_near({name: p.grad for name, p in modules.items()}, gradients, 1e-11, least=1.0)


def spt_detector(config, **options):
    config.model.backbone.peft = dict(type='SPT', structured=dict(type='LoRA', rank=2), num_batches=3, **options)
    config.train_cfg.max_epochs = config.train_cfg.val_interval = 1
    return config


@pytest.mark.slow
def test_a_missing_plan_is_made_in_two_processes_and_found_again(detector_config, tmp_path, tool):
    """`tools/train.py` says that it makes the plan, stores it in the work dir, and trains exactly that under DDP;
    `tools/test.py` finds it there and repeats the scores."""
    spt_detector(detector_config, budget='2%').dump(tmp_path / 'config.py')
    arguments = str(tmp_path / 'config.py'), '--launcher', 'pytorch', '--work-dir', str(tmp_path / 'work')
    log = in_processes(2, tmp_path, run_tool, 'train.py', *arguments)
    assert log.count('There is no plan yet: measuring the sensitivity of the backbone on 3 batches') == 1
    assert f'Plan: {tmp_path}/work/plan.safetensors' in log
    plan = Plan.load(tmp_path / 'work/plan.safetensors')
    assert plan.counts.total <= plan.info['budget_parameters'] and plan.info['num_batches'] == 3
    assert f'trainable in the backbone: {plan.counts.total:,} ' in log
    assert 'frozen parameters are unchanged' in log

    checkpoint = find_last_checkpoint(tmp_path / 'work')
    arguments = 'test.py', str(tmp_path / 'config.py'), checkpoint, '--work-dir', str(tmp_path / 'elsewhere')
    status, out, err = tool(*arguments)
    assert status == 0, err
    assert scores(out + err) == scores(log)


def test_plans_found_and_missing(detector_config, tmp_path):
    """A plan in the work dir is used again if it was made for the same request, and only then; where none can be made
    the error says how to have one."""
    cfg = spt_detector(detector_config, budget='2%')
    cfg.work_dir = str(tmp_path / 'work')
    with pytest.raises(MissingFileError, match=r'no plan.safetensors in .*work or /nowhere.*backbone.peft.plan='):
        require_plan(cfg, (cfg.work_dir, '/nowhere'))
    no_budget = copy.deepcopy(cfg)
    del no_budget.model.backbone.peft['budget']
    no_budget.work_dir = str(tmp_path / 'no_budget')
    with pytest.raises(ConfigError, match='names no plan, and no budget.*peft.budget=0.5%'):
        make_plan(no_budget)
    cfg.model.backbone.peft.budget = '2%'
    make_plan(cfg)
    file = tmp_path / 'work/plan.safetensors'
    assert cfg.model.backbone.peft.plan == str(file)
    before = file.stat().st_mtime_ns
    for key, value, message in (
        ('budget', '3%', 'budget=2%.* 3%.*--work-dir'),
        ('structured', dict(type='LoRA', rank=3), "is a plan for structured={'type': 'LoRA', 'rank': 2}"),
        ('alpha', 4.0, 'alpha=10.0.* 4.0'),
        ('num_batches', 2, 'num_batches=3.* 2'),
        ('per_sample', True, 'is a plan for per_sample=False'),
        ('alpha', 10, None),
        ('plan', None, None),
    ):
        again = copy.deepcopy(cfg)
        again.model.backbone.peft.plan = None
        again.model.backbone.peft[key] = value
        if message is None:
            make_plan(again)
            assert again.model.backbone.peft.plan == str(file)
        else:
            with pytest.raises(ConfigError, match=message):
                make_plan(again)
    again = copy.deepcopy(cfg)
    again.model.backbone.peft.plan = None
    again.randomness = dict(seed=7)
    with pytest.raises(ConfigError, match='seed=0.* 7'):
        make_plan(again)
    again.randomness = dict(seed=0)
    again.train_dataloader.dataset.data_root = '/elsewhere'
    with pytest.raises(ConfigError, match='was measured with another model'):
        make_plan(again)
    again.resume, again.load_from = True, str(tmp_path / 'work/epoch_1.pth')
    make_plan(again)  # what is resumed has its plan
    assert again.model.backbone.peft.plan == str(file)
    assert file.stat().st_mtime_ns == before
    file.write_bytes(file.read_bytes()[:-100])
    cfg.model.backbone.peft.plan = None
    with pytest.raises(PlanError, match='plan.safetensors'):
        make_plan(cfg)


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('aplha', 3, "SPT has no argument 'aplha'.*Did you mean 'alpha'"),
        ('structured', dict(type='LoRA', rnak=4), "structured LoRA has no argument 'rnak'"),
        ('structured', dict(type='Adapter', dropout=2), 'dropout=2 must be a probability'),
        ('structured', dict(type='LoRa'), "structured={'type': 'LoRa'} must be"),
        ('alpha', 'x', "alpha='x' must be a number above 0"),
        ('rule', 'best', "rule='best' must be 'budget' or 'published'"),
        ('budget', '2Q', "budget='2Q' must be"),
    ],
)
def test_a_request_is_checked_before_the_measuring(detector_config, tmp_path, monkeypatch, option, value, message):
    cfg = spt_detector(detector_config, budget='2%')
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.peft[option] = value
    monkeypatch.setattr('mona_mm.spt_plans.plans.measure', lambda *args: pytest.fail('it was measured'))
    with pytest.raises(UserError, match=message):
        make_plan(cfg)


SPT_CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('spt_*/*swin_[bl]*.py'))


@pytest.mark.parametrize(  # one task or two for each kind of module; only the sizes of the others differ
    'name', [pytest.param(name, marks=[pytest.mark.slow] * (i % 5 > 0)) for i, name in enumerate(SPT_CONFIGS)]
)
def test_shipped_configs_at_full_size(name, tmp_path):
    """Every SPT config over the Mona paper's tasks builds with a plan for its base, trains exactly the plan, decays no
    single weight, and gives the optimizer exactly what trains."""
    path = next((ROOT / 'configs').rglob(f'{name}.py'))
    cfg = load_config(str(path))
    peft = cfg.model.backbone.peft
    assert path.parent.name == f'spt_{peft.structured["type"].lower()}'
    with meta_device():
        init_default_scope(cfg.default_scope)
        architecture = Architecture.of(MODELS.build(dict(type='mona_mm.PeftBackbone', base=cfg.model.backbone.base)))
    block = architecture.blocks[-1]
    site = 'post_ffn' if peft.structured['type'] == 'Mona' else 'v'
    weights = {f'{block}.norm2.weight': torch.tensor([3]), f'{block}.attn.w_msa.qkv.weight': torch.tensor([5, 700])}
    plan = Plan(architecture, dict(peft.structured), {block: (site,)}, ((f'{block}.norm2.bias', None),), weights)
    peft.plan = str(tmp_path / 'plan.safetensors')
    plan.save(peft.plan)
    cfg.model.backbone.base.init_cfg = None
    model = build_on_meta(cfg)
    assert count_trainable(model).backbone_trainable == plan.counts.total
    adapt_to_device(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    assert groups.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    deltas = sparse_deltas(model.backbone).values()
    assert len(deltas) == 2 and all(groups[id(delta.values)]['weight_decay'] == 0 for delta in deltas)
