"""SPT's allocation and plan file: the published selection exactly, budgets kept exactly, damage noticed."""

import hashlib
import json
import math
import os
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from mona_mm import PeftBackbone
from mona_mm.compat.safe_globals import register_safe_globals
from mona_mm.errors import ConfigError, MissingFileError, PlanError
from mona_mm.nn.meta import meta_device
from mona_mm.spt import Plan, Sensitivity, allocate, load_published_plan
from mona_mm.spt.allocation import parse_budget
from mona_mm.spt.parts import Architecture, Part
from mona_mm.spt.plan import base_digest, module_cost
from mona_mm.spt.plot import plot_plan, plot_sensitivity
from mona_mm.spt.published import _read, published_names

SITES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')
KINDS = [
    *(dict(type='LoRA', rank=2), dict(type='Adapter', bottleneck=2), dict(type='Mona', bottleneck=4)),
    *(dict(type='AdapterPlus', bottleneck=2), None),
]
GROUPS = {
    'Mona': {'post_attn': SITES[:4], 'post_ffn': SITES[4:]},
    'AdapterPlus': {'post_ffn': SITES[4:]},
}
"""The matrices before a module in the stream, by its site."""
TINY = {
    'vit': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64),
        img_size=64,
    ),
    'swin': dict(type='mmdet.SwinTransformer', embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)),
}


def build(base):
    with meta_device():
        return PeftBackbone(base=base)


def random_sensitivity(name='vit', seed=0, ties=False) -> Sensitivity:
    """Numbers over many orders of magnitude, each tensor on a level of its own, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    architecture = Architecture.of(build(TINY[name]))
    squares = {}
    for part in architecture.parts:
        tensor = squares.setdefault(part.name, torch.zeros(architecture.shapes[part.name]))
        level = 3 * torch.randn(1, generator=generator)
        part.of(tensor)[:] = (2 * torch.randn(part.shape, generator=generator) + level).exp()
    if ties:  # a handful of different values, and weights that never had a gradient
        squares = {name: (t.log() / 4).round().exp().where(t > 0.1, torch.zeros(())) for name, t in squares.items()}
    return Sensitivity(architecture, squares, dict(config='random.py'))


def recount(plan: Plan) -> int:
    """What trains, counted without the plan's own counting."""
    total = sum(len(indices.unique()) for indices in plan.weights.values())
    for name, rows in plan.vectors:
        shape = plan.architecture.shapes[name]
        total += rows[1] - rows[0] if rows else math.prod(shape)
    for block, sites in plan.structured.items():
        total += sum(module_cost(plan.structured_config, plan.architecture, block, site) for site in sites)
    return total


# ---------------------------------------------------------------------------------------- the published selection


def gradients_of_integers(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The gradients that the published selection was run on: computed from integers by products that are exact or
    rounded alike everywhere, so that no file has to hold them."""
    gradients = {}
    for index, name in enumerate(names, start=1):
        i = np.arange(math.prod(shapes[name]), dtype=np.uint64) + np.uint64(index * 1_000_003)
        u = (i * np.uint64(2_654_435_761)) % np.uint64(2**32)
        u = (u ^ (u >> np.uint64(15))) * np.uint64(2_246_822_519) % np.uint64(2**32)
        v = (u >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
        scale = np.float32((1 + (index * 7919) % 61) / 32)
        gradients[name] = torch.from_numpy(v * v * v * scale).view(shapes[name])
    return gradients


@pytest.fixture(scope='module')
def published_sensitivity():
    base = dict(embed_dims=128, num_layers=12, num_heads=4, feedforward_channels=512)
    architecture = Architecture.of(build(dict(type='mmpretrain.VisionTransformer', arch=base, img_size=64)))
    names = published_names(architecture)
    squares = {part.name: torch.full(architecture.shapes[part.name], math.nan) for part in architecture.parts}
    order = ('norm1', 'attn.q', 'attn.k', 'attn.v', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
    listed = [f'blocks.{i}.{module}.{end}' for i in range(12) for module in order for end in ('weight', 'bias')]
    listed += ['norm.weight', 'norm.bias']
    assert set(listed) == set(names)
    for name, gradient in gradients_of_integers(listed, {n: part.shape for n, part in names.items()}).items():
        part = names[name]
        part.of(squares[part.name]).copy_(gradient**2)
    return Sensitivity(architecture, squares), names, json.loads((GOLDEN / 'spt_plan.json').read_text())


@pytest.mark.parametrize('key', ['lora', 'adapter', 'lora_alpha1_beta2'])
@pytest.mark.parametrize('budget', ['0.05', '0.1', '0.2', '0.4', '0.6', '0.8', '1.0'])
def test_published_selection(published_sensitivity, key, budget):
    """rule='published' on sensitivities that the published code was run on: the same structured matrices, whole vectors
    and single weights, one by one, and the same counts, for every budget and set of parameters of the golden file."""
    sensitivity, names, golden = published_sensitivity
    settings = golden[key]
    expected = settings['budgets'][budget]
    width = {'lora': ('LoRA', 'rank'), 'adapter': ('Adapter', 'bottleneck')}[settings['structured_type']]
    plan = allocate(
        sensitivity,
        f'{budget}M',
        {'type': width[0], width[1]: settings['rank']},
        rule='published',
        alpha=settings['alpha'],
        beta=settings['beta'],
        structured_vectors=settings['structured_vector'],
    )
    table = [[int(site in plan.structured.get(block, ())) for site in SITES] for block in plan.architecture.blocks]
    assert table == expected['tuned_matrices']
    assert plan.vectors[0] == ('cls_token', None)
    assert plan.vectors[1:] == tuple((names[n].name, names[n].rows) for n in expected['tuned_vectors'])
    indices = indices_end_to_end(plan, names, expected['unstructured_names'])
    assert hashlib.sha256(indices.astype('<i8').tobytes()).hexdigest() == expected['unstructured_sha256']
    assert len(indices) == plan.counts.weights

    token = 128  # counted as 768 there, whatever the width
    assert plan.counts.structured + plan.counts.vectors - token == expected['structured']
    assert plan.counts.weights == expected['unstructured']
    assert plan.counts.total == round(expected['params_m'] * 1e6) - 768 + token


def indices_end_to_end(plan: Plan, names: Mapping[str, Part], listed: Sequence[str]) -> np.ndarray:
    """The plan's single weights as the published code writes them: their indices into the listed tensors laid end to
    end, by its names."""
    masks = {name: torch.zeros(math.prod(shape), dtype=torch.bool) for name, shape in plan.architecture.shapes.items()}
    for name, chosen in plan.weights.items():
        masks[name][chosen] = True
    parts = [names[name] for name in listed]
    flat = [p.of(masks[p.name].view(plan.architecture.shapes[p.name])).flatten() for p in parts]
    return torch.cat(flat).nonzero().flatten().numpy()


@pytest.fixture(scope='module')
def vit_b():
    return build(dict(type='mmpretrain.VisionTransformer', arch='b'))


def published_file(kind: str, budget: str) -> Path:
    """A plan that was published for CIFAR-100 and a ViT-B/16."""
    return GOLDEN / f'spt_plans/{kind}_cifar_{budget}.pth'


KIND_OF_FILE = {'lora': dict(type='LoRA', rank=8), 'adapter': dict(type='Adapter', bottleneck=8)}


@pytest.mark.parametrize('kind', KIND_OF_FILE)
@pytest.mark.parametrize('budget', ['0.1', '0.4'])
def test_published_plans_load(vit_b, kind, budget, tmp_path):
    """The published files load for a ViT-B/16, have the totals they state, part by part, and survive our own file."""
    path = published_file(kind, budget)
    plan = load_published_plan(path, vit_b, KIND_OF_FILE[kind])
    plan.check(vit_b)
    stated = _read(path)
    assert plan.counts.structured + plan.counts.vectors - 768 == stated['structured_params']
    assert plan.counts.weights == int(stated['unstructured_params'])
    assert plan.counts.total == round(float(stated['params']) * 1e6) == recount(plan)
    plan.save(tmp_path / 'plan.safetensors')
    assert same(Plan.load(tmp_path / 'plan.safetensors'), plan)
    assert plan.info['stated_parameters'] == plan.counts.total
    assert (
        plan.info['stated_parameters_are']
        == f'those with {KIND_OF_FILE[kind]["type"]} modules and 768 for the class token'
    )
    with pytest.raises(PlanError, match='another structured module'):
        load_published_plan(path, vit_b, {**KIND_OF_FILE[kind], 'rank' if kind == 'lora' else 'bottleneck': 4})


@pytest.mark.parametrize('budget', ['0.1', '0.4'])
def test_adapters_on_a_plan_for_lora(vit_b, budget):
    """The published SPT-Adapter runs train adapters on the plans that were selected for LoRA: the same sites, vectors
    and single weights, and the file's number is that of LoRA; the other way round there were no runs."""
    path = published_file('lora', budget)
    lora, adapter = (load_published_plan(path, vit_b, kind) for kind in KIND_OF_FILE.values())
    assert adapter.structured_config == KIND_OF_FILE['adapter']
    assert (adapter.structured, adapter.vectors) == (lora.structured, lora.vectors)
    assert all(torch.equal(adapter.weights[name], indices) for name, indices in lora.weights.items())
    sites = [(block, site) for block, sites in lora.structured.items() for site in sites]
    outs = [3072 if site == 'fc1' else 768 for _, site in sites]
    assert (
        adapter.counts.structured
        == sum(2 * 8 * out + 8 + out for out in outs)
        == recount(adapter) - (adapter.counts.vectors + adapter.counts.weights)
    )
    assert adapter.info['stated_parameters'] == lora.counts.total
    assert adapter.info['stated_parameters_are'] == 'those with LoRA modules and 768 for the class token'
    path = published_file('adapter', budget)
    with pytest.raises(PlanError, match='another structured module'):
        load_published_plan(path, vit_b, KIND_OF_FILE['lora'])


@pytest.mark.parametrize('key', ['lora', 'adapter'])
def test_published_plans_of_another_width_count_768_for_the_class_token(published_sensitivity, key, tmp_path):
    """A published plan of a ViT that is 128 wide: its number has 768 for the class token, of which 128 train."""
    sensitivity, names, golden = published_sensitivity
    settings = golden[key]
    expected = settings['budgets']['0.2']
    width = {'lora': dict(type='LoRA', rank=8), 'adapter': dict(type='Adapter', bottleneck=8)}[key]
    ours = allocate(sensitivity, '0.2M', width, rule='published')
    indices = indices_end_to_end(ours, names, expected['unstructured_names'])
    file = dict(
        unstructured_name_shapes={name: tuple(names[name].shape) for name in expected['unstructured_names']},
        unstructured_indexes=torch.from_numpy(indices),
        tuned_matrices=expected['tuned_matrices'],
        tuned_vectors=expected['tuned_vectors'],
        params=expected['params_m'],
    )
    torch.save(file, tmp_path / 'plan.pth')
    base = dict(embed_dims=128, num_layers=12, num_heads=4, feedforward_channels=512)
    vit = build(dict(type='mmpretrain.VisionTransformer', arch=base, img_size=64))
    plan = load_published_plan(tmp_path / 'plan.pth', vit, width)
    assert plan.counts.structured + plan.counts.vectors - 128 == expected['structured']
    assert plan.counts.weights == expected['unstructured']
    stated = round(expected['params_m'] * 1e6)
    assert plan.info['stated_parameters'] == stated == plan.counts.total - 128 + 768
    assert plan.info['stated_parameters_are'].endswith('768 for the class token')
    plan.save(tmp_path / 'plan.safetensors')
    assert Plan.load(tmp_path / 'plan.safetensors').counts == plan.counts
    torch.save({**file, 'params': expected['params_m'] + 0.001}, tmp_path / 'plan.pth')
    with pytest.raises(PlanError, match='another structured module'):
        load_published_plan(tmp_path / 'plan.pth', vit, width)
    no_token = build(
        dict(type='mmpretrain.VisionTransformer', arch=base, img_size=64, with_cls_token=False, out_type='featmap')
    )
    with pytest.raises(PlanError, match='class token'):
        load_published_plan(tmp_path / 'plan.pth', no_token, width)


def test_published_plans_are_refused_elsewhere(vit_b, tmp_path):
    """For another ViT, a Swin, a file cut short, a file of something else, or one that would run code: one error."""
    path = published_file('lora', '0.1')
    lora = KIND_OF_FILE['lora']
    with pytest.raises(PlanError, match=r'is \(768, 768\) there'):
        small = {**TINY['vit']['arch'], 'num_layers': 12}
        load_published_plan(path, build({**TINY['vit'], 'arch': small}), lora)
    with pytest.raises(PlanError):
        load_published_plan(path, build(dict(type='mmpretrain.VisionTransformer', arch='l')), lora)
    with pytest.raises(PlanError, match='plain ViT'):
        load_published_plan(path, build(TINY['swin']), lora)
    with pytest.raises(MissingFileError):
        load_published_plan(tmp_path / 'nowhere.pth', vit_b, lora)
    (tmp_path / 'short.pth').write_bytes(path.read_bytes()[:5000])
    with pytest.raises(PlanError, match='cannot be read'):
        load_published_plan(tmp_path / 'short.pth', vit_b, lora)
    torch.save({'state_dict': {}}, tmp_path / 'other.pth')
    with pytest.raises(PlanError, match='is no published plan'):
        load_published_plan(tmp_path / 'other.pth', vit_b, lora)

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'attacked'),)

    torch.save({'params': Attack()}, tmp_path / 'attack.pth')
    with pytest.raises(PlanError, match='more than numbers'):
        load_published_plan(tmp_path / 'attack.pth', vit_b, lora)
    with open(tmp_path / 'raw.pth', 'wb') as file:
        pickle.dump(Attack(), file)
    with pytest.raises(PlanError):
        load_published_plan(tmp_path / 'raw.pth', vit_b, lora)
    assert not (tmp_path / 'attacked').exists()


def test_reading_a_published_plan_leaves_no_trace(vit_b):
    """What weights-only loading allows is afterwards as before: a checkpoint of mmengine can still be resumed."""
    register_safe_globals()
    before = set(map(str, torch.serialization.get_safe_globals()))
    load_published_plan(published_file('lora', '0.1'), vit_b, KIND_OF_FILE['lora'])
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# ------------------------------------------------------------------------------------------------- our own rule


def walk(sensitivity, budget, kind, alpha, beta):
    """The rule of allocate's docstring, weight by weight."""
    architecture = sensitivity.architecture
    groups = GROUPS.get((kind or {}).get('type'), {site: (site,) for site in SITES})
    key, cost, need, values = [], {}, {}, []
    for part in architecture.parts:
        own = None
        site = next((site for site, members in groups.items() if part.op in members), None)
        if part.kind == 'matrix' and kind and site:
            own = (part.block, site)
            cost[own] = module_cost(kind, architecture, *own)
            need[own] = cost[own] / alpha
        elif part.kind == 'vector':
            own = (part.name, part.rows)
            cost[own], need[own] = part.numel, part.numel / beta
        squares = part.of(sensitivity.squares[part.name]).flatten()
        values += squares.tolist()
        key += [(own, part.name, part.offset + i) for i in range(part.numel)]
    token = architecture.class_token
    total = math.prod(architecture.shapes[token]) if token else 0
    whole, taken = set(), {}
    for position in np.argsort(-np.array(values), kind='stable'):
        own, name, index = key[position]
        if own in whole:
            continue
        # The weight joins the single ones of its group, or is the one that makes it whole.
        count = len(taken.get(own, ())) if own else 0
        if own and own not in whole and count + 1 >= need[own] and total - count + cost[own] <= budget:
            total += cost[own] - count
            whole.add(own)
            taken.pop(own, None)
        elif total < budget:
            total += 1
            taken.setdefault(own, []).append((name, index))
        else:
            break
    weights = {}
    for found in taken.values():
        for name, index in found:
            weights.setdefault(name, []).append(index)
    return whole, {name: sorted(indices) for name, indices in weights.items()}


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['type'] if kind else 'none')
@pytest.mark.parametrize('name', TINY)
def test_the_rule_is_what_it_says(name, kind):
    """allocate equals the walk that its docstring describes, weight by weight."""
    sensitivity = random_sensitivity(name, seed=3)
    for budget, alpha, beta in ((700, 10, 5), (3000, 4, 2), (9000, 30, 5)):
        plan = allocate(sensitivity, budget, kind, alpha=alpha, beta=beta)
        whole, weights = walk(sensitivity, budget, kind, alpha, beta)
        assert {name: indices.tolist() for name, indices in plan.weights.items()} == weights
        chosen = {(block, site) for block, sites in plan.structured.items() for site in sites}
        assert chosen | {v for v in plan.vectors if v[0] != 'cls_token'} == whole


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['type'] if kind else 'none')
def test_budget_is_never_exceeded(kind, ties):
    """Random sensitivities, budgets and rules: what trains is counted exactly, never above the budget, and is the
    whole budget as long as there is a weight with a gradient that could still train."""
    draw = random.Random(0)
    filled = 0
    for seed in range(12):
        sensitivity = random_sensitivity(draw.choice(list(TINY)), seed, ties)
        architecture = sensitivity.architecture
        budget = int(10 ** draw.uniform(1.6, math.log10(architecture.parameters)))
        plan = allocate(
            sensitivity,
            budget,
            kind,
            alpha=draw.choice([0.5, 1, 10, 100]),
            beta=draw.choice([1, 5, 50]),
            structured_vectors=draw.random() < 0.7,
        )
        assert recount(plan) == plan.counts.total <= budget
        trains = {n: torch.zeros(s, dtype=torch.bool) for n, s in architecture.shapes.items()}
        for n, indices in plan.weights.items():
            trains[n].view(-1)[indices] = True
        members = {
            (m.name, m.rows) for b, sites in plan.structured.items() for s in sites for m in plan._members(b, s)
        } | set(plan.vectors)
        gone = [p for p in architecture.parts if (p.name, p.rows) in members]
        assert not any(p.of(trains[p.name]).any() for p in gone), 'a single weight where something else trains'
        could = sum(
            int(((p.of(sensitivity.squares[p.name]) > 0) & ~p.of(trains[p.name])).sum())
            for p in architecture.parts
            if p not in gone
        )
        assert plan.counts.total == budget or could == 0
        filled += plan.counts.total == budget
    assert filled >= 3


def test_single_weights_are_the_most_sensitive():
    """No weight outside the plan is more sensitive than a single weight in it."""
    sensitivity = random_sensitivity('swin')
    plan = allocate(sensitivity, 2000, None, structured_vectors=False)
    values = torch.cat([sensitivity.squares[n].flatten() for n in plan.architecture.shapes])
    chosen = torch.cat([sensitivity.squares[n].flatten()[i] for n, i in plan.weights.items()])
    assert len(chosen) == plan.counts.total == 2000
    assert torch.equal(chosen.sort().values, values.topk(2000).values.sort().values)


def test_published_rule_counts_what_is_there():
    """The published rule on a Swin, which has no class token: the plan counts its own parameters, not the 768."""
    plan = allocate(random_sensitivity('swin'), 9000, rule='published')
    assert plan.counts.total == recount(plan) and plan.info['rule'] == 'published'
    assert not any(name == 'cls_token' for name, _ in plan.vectors)


def test_switches():
    """structured_only leaves out single weights; structured_vectors=False keeps vectors from training whole."""
    sensitivity = random_sensitivity()
    for rule in ('budget', 'published'):
        only = allocate(sensitivity, 4000, rule=rule, structured_only=True)
        assert not only.weights and only.structured
        loose = allocate(sensitivity, 4000, dict(type='LoRA', rank=1), rule=rule, structured_vectors=False)
        assert loose.vectors == (('cls_token', None),)


def test_mona_goes_where_the_sensitivity_is():
    """SPT-Mona: the block whose FFN is the most sensitive gets the first module, after its FFN and nowhere else."""
    sensitivity = random_sensitivity('vit')
    for part in sensitivity.architecture.parts:
        hot = part.block == 'layers.1' and part.op in ('fc1', 'fc2')
        part.of(sensitivity.squares[part.name])[:] = torch.rand(part.shape) + (10 if hot else 0)
    kind = dict(type='Mona', bottleneck=2)
    cost = module_cost(kind, sensitivity.architecture, 'layers.1', 'post_ffn')
    plan = allocate(sensitivity, cost + 32 + 5, kind)
    assert plan.structured == {'layers.1': ('post_ffn',)}
    assert plan.counts.structured == cost and plan.counts.weights == 5


def test_adapter_plus_alone_is_a_plan_of_its_own_budget():
    """As many parameters as Adapter+ trains alone put one module into every block, and nothing at the attention."""
    kind = dict(type='AdapterPlus', bottleneck=4)
    sensitivity = random_sensitivity('vit')
    alone = 3 * (2 * 32 * 4 + 4 + 2 * 32)
    plan = allocate(sensitivity, alone + 32, kind, alpha=1e6, structured_only=True, structured_vectors=False)
    assert plan.structured == {f'layers.{i}': ('post_ffn',) for i in range(3)}
    assert plan.counts.structured == alone and plan.counts.weights == 0
    with pytest.raises(PlanError, match="AdapterPlus has no site 'post_attn'"):
        replace(plan, structured={'layers.0': ('post_attn',)})


STRUCTURED = {
    'lora': dict(type='LoRA', rank=3, dropout=0.0),
    'adapter': dict(type='Adapter', bottleneck=3, init='trunc_normal'),
    'mona': dict(type='Mona', bottleneck=5),
    'mona-kernels': dict(type='Mona', bottleneck=3, kernel_sizes=[3, 9], scaled_norm=['down', 'pointwise']),
    'mona-plain': dict(type='Mona', bottleneck=3, kernel_sizes=[5], scaled_norm=[], average=False),
    'mona-all-norms': dict(type='Mona', bottleneck=2, scaled_norm=['pointwise']),
    'adapter-plus': dict(type='AdapterPlus', bottleneck=3, drop_path=0.0),
}


@pytest.mark.parametrize('kind', STRUCTURED)
@pytest.mark.parametrize('name', TINY)
def test_no_plan_exceeds_its_budget(name, kind):
    """Whatever the structured module and its options: what really trains in a backbone with the plan is what the plan
    counts, and within the budget."""
    sensitivity, budget = random_sensitivity(name), 6000
    plan = allocate(sensitivity, budget, STRUCTURED[kind], alpha=1e3, structured_only=kind != 'lora')
    assert plan.structured, 'the test would count no module'
    modules = dict(type='SPT', structured=plan.structured_config, plan={k: list(s) for k, s in plan.structured.items()})
    backbone = PeftBackbone(base=TINY[name], peft=modules)
    trains = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert trains == plan.counts.structured and plan.counts.total <= budget
    assert recount(plan) == plan.counts.total


def test_the_budget_that_was_exceeded():
    """20,000 of a ViT with Mona of other filters and two norms: it was 20,320."""
    kind = dict(type='Mona', bottleneck=8, kernel_sizes=[3, 9], scaled_norm=['down', 'pointwise'])
    channels, n = 32, 8
    cost = 2 * channels * n + channels + n + n * (3 * 3 + 9 * 9 + 2) + n * n + n + 4 * (channels + n)
    sensitivity = random_sensitivity('vit')
    assert module_cost(kind, sensitivity.architecture, 'layers.0', 'post_attn') == cost
    assert allocate(sensitivity, 20000, kind, alpha=1e3).counts.total <= 20000


def test_what_is_selected_from():
    """On ViT everything of the blocks and the final norm; on Swin the blocks without their position tables."""
    vit, swin = build(TINY['vit']), build(TINY['swin'])
    outside = {name for name, _ in vit.named_parameters()} - set(Architecture.of(vit).shapes)
    assert outside == {'pos_embed', 'patch_embed.projection.weight', 'patch_embed.projection.bias'}
    assert {p.name for p in Architecture.of(vit).parts if not p.block} == {'ln1.weight', 'ln1.bias'}
    outside = {name for name, _ in swin.named_parameters()} - set(Architecture.of(swin).shapes)
    kinds = ('patch_embed.', 'norm', 'relative_position_bias_table', 'downsample')
    assert all(name.startswith(kinds[:2]) or kinds[2] in name or kinds[3] in name for name in outside)
    architecture = Architecture.of(swin)
    assert sum(p.numel for p in architecture.parts) == sum(map(math.prod, architecture.shapes.values()))
    assert [p.op for p in architecture.parts if p.name == 'stages.0.blocks.0.attn.w_msa.qkv.bias'] == ['q', 'k', 'v']


def test_a_method_in_the_backbone_changes_nothing():
    """The plan's check accepts a backbone that already carries the method."""
    architecture = Architecture.of(build(TINY['vit']))
    with meta_device():
        adapted = PeftBackbone(base=TINY['vit'], peft=dict(type='Mona', bottleneck=2))
    assert Architecture.of(adapted) == architecture


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('budget', 'count'),
    [
        ('0.4M', 400000),
        ('400k', 400000),
        (400000, 400000),
        ('0.29M', 290000),
        ('.5%', 5000),
        (' 1m ', 1000000),
    ],
)
def test_budget_forms(budget, count):
    """Megas, kilos, whole numbers and shares of the backbone."""
    assert parse_budget(budget, 1000000) == count
    with pytest.raises(ConfigError, match='above the backbone, which has 4,000 parameters'):
        parse_budget('4001', 4000)


@pytest.mark.parametrize('budget', ['', 'lots', '0.4G', '-1', '-5%', '1e6', 0.4, True, None, '5 %%', '120%'])
def test_bad_budgets(budget):
    """What is no budget is refused, with the accepted forms, as is more than the backbone has."""
    with pytest.raises(ConfigError, match='budget='):
        allocate(random_sensitivity(), budget)


def test_budget_below_the_smallest_plan():
    """Nothing, less than the class token, or less than the smallest structured module alone: one error with the
    number that would do, and that number does."""
    vit, swin = random_sensitivity('vit'), random_sensitivity('swin')
    for sensitivity, budget in ((vit, 0), (vit, 32), (swin, 0)):
        with pytest.raises(ConfigError, match='below the smallest possible plan'):
            allocate(sensitivity, budget)
    assert allocate(vit, 33).counts.weights == 1
    assert allocate(swin, 1).counts.total == 1
    only = dict(structured=dict(type='LoRA', rank=8), structured_only=True, beta=1e9)
    with pytest.raises(ConfigError, match='which has 64 parameters .32 of them the class token'):
        allocate(vit, 63, **only)
    assert allocate(vit, 64, **only).counts.total == 64


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rule='best'), "rule='best' must be one of 'budget', 'published'"),
        (dict(structured=dict(type='LoRand')), "dict.type='LoRA', rank=8"),
        (dict(structured='LoRA'), "dict.type='LoRA', rank=8"),
        (dict(structured=dict(type='LoRA', rank=0)), 'rank=0 of LoRA'),
        (dict(structured=dict(type='Mona', bottleneck=1.5)), 'bottleneck=1.5 of Mona'),
        (dict(alpha=0), 'alpha=0'),
        (dict(beta=-1), 'beta=-1'),
    ],
)
def test_bad_options(options, message):
    """A wrong option is named together with what is accepted."""
    with pytest.raises(ConfigError, match=message):
        allocate(random_sensitivity(), 4000, **options)


def test_a_sensitivity_that_is_not_finite_is_refused():
    """NaN, infinity and negative numbers are no sums of squares."""
    for value in (math.nan, math.inf, -1.0):
        sensitivity = random_sensitivity()
        next(iter(sensitivity.squares.values())).view(-1)[3] = value
        with pytest.raises(ConfigError, match='not finite'):
            allocate(sensitivity, 4000)


# ------------------------------------------------------------------------------------------------- the file


def same(a: Plan, b: Plan) -> bool:
    fields = ('architecture', 'structured_config', 'structured', 'vectors')
    infos = [{k: v for k, v in plan.info.items() if k != 'file'} for plan in (a, b)]
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and infos[0] == infos[1]
        and a.weights.keys() == b.weights.keys()
        and all(torch.equal(t, b.weights[name]) and t.dtype == torch.int64 for name, t in a.weights.items())
    )


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['type'] if kind else 'none')
def test_round_trip(kind, tmp_path):
    """Saved and loaded, a plan is the same; its metadata can be read without this package, its indices take 4 bytes,
    and nothing but the file is left."""
    plan = allocate(random_sensitivity('swin'), 3000, kind)
    plan.save(tmp_path / 'new' / 'plan.safetensors')
    assert os.listdir(tmp_path / 'new') == ['plan.safetensors']
    assert same(Plan.load(tmp_path / 'new' / 'plan.safetensors'), plan)
    from safetensors import safe_open

    with safe_open(tmp_path / 'new' / 'plan.safetensors', 'pt') as file:
        metadata = file.metadata()
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} <= {'torch.int32'}  # noqa: SIM118
    assert json.loads(metadata['counts'])['total'] == plan.counts.total
    assert json.loads(metadata['info'])['budget'] == '3000'
    assert metadata['mona_mm_version']


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A save that fails half-way leaves the plan that was there, and no rest of its own."""
    path = tmp_path / 'plan.safetensors'
    plan = allocate(random_sensitivity(), 3000)
    plan.save(path)

    def fail(file):  # what was written before this is beside the plan now
        assert len(os.listdir(tmp_path)) == 2
        raise OSError('disk full')

    monkeypatch.setattr('mona_mm.checkpoint.atomic.os.fsync', fail)
    with pytest.raises(OSError, match='disk full'):
        allocate(random_sensitivity(), 4000).save(path)
    assert os.listdir(tmp_path) == ['plan.safetensors']
    assert same(Plan.load(path), plan)


def test_damage_is_noticed(tmp_path):
    """Cut anywhere, or with any byte changed: a PlanError that names the file, or the very same plan (where the byte
    meant nothing); never another plan, never another exception."""
    path, damaged = tmp_path / 'plan.safetensors', tmp_path / 'damaged.safetensors'
    plan = allocate(random_sensitivity(), 2000)
    plan.save(path)
    content = path.read_bytes()
    draw = random.Random(0)
    header = 8 + int.from_bytes(content[:8], 'little')
    places = [*range(12), *(draw.randrange(8, header) for _ in range(150))]
    places += [draw.randrange(header, len(content)) for _ in range(150)]
    cases = [content[: draw.randrange(len(content))] for _ in range(40)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        cases.append(bytes(changed))
    refused = 0
    for case in cases:
        damaged.write_bytes(case)
        try:
            loaded = Plan.load(damaged)
        except PlanError as error:
            assert 'damaged.safetensors' in str(error)
            refused += 1
        else:
            assert same(loaded, plan)
    assert refused >= len(cases) - 2


def test_other_files_are_refused(tmp_path):
    """No file, another safetensors file, a sensitivity, a consistent file with a wrong plan in it."""
    from safetensors.torch import save_file

    path = tmp_path / 'x.safetensors'
    with pytest.raises(MissingFileError, match=str(path)):
        Plan.load(path)
    save_file({'a': torch.zeros(2)}, path)
    with pytest.raises(PlanError, match='plan'):
        Plan.load(path)
    random_sensitivity().save(path)
    with pytest.raises(PlanError, match='plan'):
        Plan.load(path)
    plan = allocate(random_sensitivity(), 3000)
    with pytest.raises(PlanError, match='sensitivity'):
        plan.save(path)
        Sensitivity.load(path)
    name, indices = next(iter(plan.weights.items()))
    wrong = [
        dict(weights={name: indices.flip(0)} if len(indices) > 1 else {name: indices - 1 - indices}),
        dict(weights={name: torch.tensor([10**9])}),
        dict(weights={'nowhere': indices}),
        dict(weights={name: indices.float()}),
        dict(vectors=(('pos_embed', None),)),
        dict(vectors=(*plan.vectors, plan.vectors[0])),
        dict(structured={'layers.0': ('qkv',)}),
        dict(structured={'layers.9': ('q',)}),
        dict(structured={'layers.0': ('post_ffn',)}),
        dict(structured_config=dict(type='Mona', bottleneck=4), structured={'layers.0': ('q',)}),
        dict(vectors=(('layers.0.attn.qkv.bias', (32, 64)),), weights={'layers.0.attn.qkv.bias': torch.tensor([40])}),
        dict(structured_config=None, structured={'layers.0': ('q',)}),
    ]
    for change in wrong:
        with pytest.raises(PlanError, match='plan for a VisionTransformer'):
            replace(plan, **change)
    with pytest.raises(ConfigError, match='structured='):
        replace(plan, structured_config=dict(type='LoRand'))


def test_a_plan_for_another_architecture_is_refused(tmp_path):
    """Another depth, width or kind of backbone: an error that names the first parameter that differs."""
    plan = allocate(random_sensitivity('vit'), 3000)
    plan.check(build(TINY['vit']))
    plan.check(build({**TINY['vit'], 'img_size': 96}))  # position embeddings are no part of it
    arch = TINY['vit']['arch']
    for base, message in (
        ({**TINY['vit'], 'arch': {**arch, 'num_layers': 4}}, r'layers.3.ln1.weight is \(32,\) instead of absent'),
        ({**TINY['vit'], 'arch': {**arch, 'feedforward_channels': 96}}, r'is \(96, 32\) instead of \(64, 32\)'),
        ({**TINY['vit'], 'with_cls_token': False, 'out_type': 'featmap'}, 'cls_token is absent instead of'),
        (TINY['swin'], 'layers.0.ln1.weight is absent instead of'),
    ):
        with pytest.raises(PlanError, match=message):
            plan.check(build(base))


def test_a_plan_for_other_weights_is_refused():
    """With the digest of the weights it was made for, a plan tells others; without one it has nothing to check."""
    model = PeftBackbone(base=TINY['vit'])
    sensitivity = random_sensitivity('vit')
    allocate(sensitivity, 3000).check_weights(model)
    sensitivity.info.update(base_digest=base_digest(model, sensitivity.architecture), pretrained='mae.pth')
    plan = allocate(sensitivity, 3000)
    plan.check_weights(model)
    with torch.no_grad():
        model.pos_embed.add_(1)
        plan.check_weights(model)
        model.layers[1].attn.qkv.weight[3, 5] += 1e-6
    with pytest.raises(PlanError, match='made for other weights.*mae.pth'):
        plan.check_weights(model)


def test_sensitivity_round_trip(tmp_path):
    """A kept sensitivity gives the same plans."""
    sensitivity = random_sensitivity('swin')
    sensitivity.save(tmp_path / 's.safetensors')
    loaded = Sensitivity.load(tmp_path / 's.safetensors')
    assert loaded.info == sensitivity.info
    assert same(allocate(loaded, 2500), allocate(sensitivity, 2500))
    content = bytearray((tmp_path / 's.safetensors').read_bytes())
    content[-100] ^= 4
    (tmp_path / 's.safetensors').write_bytes(content)
    with pytest.raises(PlanError, match='digest'):
        Sensitivity.load(tmp_path / 's.safetensors')


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        pytest.param(list(TINY)[i % len(TINY)], kind, marks=[pytest.mark.slow] * (i not in (0, len(KINDS) - 1)))
        for i, kind in enumerate(KINDS)
    ],
    ids=lambda value: value if isinstance(value, str) else value['type'] if value else 'none',
)
def test_pictures(drawn_charts, name, kind, tmp_path):
    """Every kind of plan can be drawn; the pictures are PNGs of a readable size."""
    import cv2

    sensitivity = random_sensitivity(name)
    paths = [
        *plot_sensitivity(sensitivity, tmp_path),
        plot_plan(allocate(sensitivity, 4000, kind), tmp_path),
    ]
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(path) for path in paths)
    for path in paths:
        height, width, _ = cv2.imread(path).shape
        assert min(height, width) > 300
