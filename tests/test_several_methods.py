"""Several methods in one backbone: each counted, all trained, saved and merged together."""

import json
import re

import pytest
import torch
from conftest import HOSTS, SMALL_SWIN
from helpers import assert_equal, assert_near
from mmengine.registry import MODELS
from safetensors import safe_open
from suite import images, load, off_initial_values, plan_for
from torch.utils.data import DataLoader
from toy_runs import Images

import mona_mm
from mona_mm import PeftBackbone, count_trainable
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.merge import merged_state_dict, set_deploy, unmergeable
from mona_mm.errors import CheckpointMismatchError, ConfigError, UserError
from mona_mm.hosts import method_names
from mona_mm.methods import LinearModule, build_method
from mona_mm.record import record_of
from mona_mm.registry import METHODS
from mona_mm.reproduce.cells import method_of
from mona_mm.reproduce.logs import Log
from mona_mm.spt_plans.plans import put_plan_in, spt_config

LORA, MONA = dict(type='LoRA', rank=4, sites=['q', 'v']), dict(type='Mona', bottleneck=8)
FFN = dict(type='LoRA', rank=2, sites=['fc1', 'fc2'], name='ffn')
BACKBONES = {'mmdet-swin': dict(SMALL_SWIN, depths=(2, 1)), 'mmpretrain-vit': HOSTS['mmpretrain-vit']}


@pytest.fixture(params=BACKBONES)
def base(request):
    return BACKBONES[request.param]


def build(base, *methods, **options):
    model = PeftBackbone(base=base, peft=list(methods), **options)
    model.init_weights()
    off_initial_values(model)
    return model


def lines_of(model) -> dict[str, int]:
    """What trains in each method, from the printed table."""
    rows = re.findall(r'^method \((.*)\) +([\d,]+) ', count_trainable(model).table(), re.MULTILINE)
    return {name: int(number.replace(',', '')) for name, number in rows}


def test_each_is_counted(base):
    model = PeftBackbone(base=base, peft=[LORA, MONA, FFN, dict(LORA, sites='proj')])
    methods = {'LoRA': LORA, 'Mona': MONA, 'ffn': [FFN], 'LoRA 2': dict(LORA, sites='proj')}
    lines = lines_of(model)
    assert lines == {
        name: count_trainable(PeftBackbone(base=base, peft=peft)).trainable for name, peft in methods.items()
    }
    count = count_trainable(model)
    assert count.method == record_of(model).method == 'LoRA+Mona+ffn+LoRA 2'
    assert count.trainable == sum(lines.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.parts[0].part == 'backbone base' and len(count.parts) == 5


def test_a_name_may_be_the_default_of_another(base):
    lines = lines_of(PeftBackbone(base=base, peft=[LORA, dict(FFN, name='LoRA')]))
    assert lines == {
        name: count_trainable(PeftBackbone(base=base, peft=[peft])).trainable
        for name, peft in {'LoRA 2': LORA, 'LoRA': FFN}.items()
    }


def test_they_compute_what_each_computes(base):
    """With the last layer of one at zero, the other is left alone."""
    x = images()
    for alone in (LORA, MONA):
        both, one = build(base, LORA, MONA), PeftBackbone(base=base, peft=alone)
        names = method_names(one)
        with torch.no_grad():
            for name, p in both.named_parameters():
                if '.peft.' in name and name not in names and '.up.' in name:
                    p.zero_()
        assert load(one, {n: t for n, t in both.state_dict().items() if n in one.state_dict()}) == set()
        assert_near(list(both.eval()(x)), list(one.eval()(x)))


def test_a_step_trains_all_of_them_and_nothing_else(base):
    model = build(base, LORA, MONA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum((out * torch.randn_like(out)).sum() for out in model(images())).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == method_names(model)


def test_a_delta_holds_all_of_them(base, tmp_path):
    file = tmp_path / 'a.delta.safetensors'
    torch.save(MODELS.build(base).state_dict(), tmp_path / 'base.pth')
    base = dict(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    source = build(base, LORA, MONA).eval()
    mona_mm.save_delta(source, file)
    delta = read_delta(file)
    assert set(delta.tensors) == method_names(source)
    assert delta.header.methods['']['type'] == 'LoRA+Mona'
    assert delta.header.methods['']['options'] == dict(methods=[LORA, MONA])
    # in another order, with a default written out, by another name
    same = [dict(MONA, name='stream', average=True), dict(LORA, alpha=1.0)]
    target = PeftBackbone(base=base, peft=same).eval()
    mona_mm.load_delta(target, file)
    x = images()
    assert_equal(list(target(x)), list(source(x)))
    for other in (LORA, MONA, [LORA], [dict(LORA, alpha=2.0), MONA], [LORA, dict(type='Adapter', bottleneck=8)]):
        with pytest.raises(CheckpointMismatchError, match=r"another method .*LoRA\+Mona \(methods=\[\{'type': 'LoRA'"):
            mona_mm.load_delta(PeftBackbone(base=base, peft=other), file)
    with pytest.raises(CheckpointMismatchError, match='another method'):
        mona_mm.load_delta(PeftBackbone(base=base, peft=[LORA, dict(MONA, blocks='last 2')]), file)


@pytest.mark.parametrize(
    'written, again, other',
    [
        pytest.param(
            [dict(MONA, blocks=[0, 1]), dict(MONA, blocks='2:', kernel_sizes=[3, 5])],
            [dict(MONA, blocks=['2:'], kernel_sizes=[3, 5]), dict(MONA, blocks=':2')],
            [dict(MONA, blocks=[0, 1], kernel_sizes=[3, 5]), dict(MONA, blocks='2:')],
            id='blocks',
        ),
        pytest.param(
            [dict(LORA, blocks=[0, 1], alpha=3.0), dict(LORA, blocks='2:')],
            [dict(LORA, blocks=['2:']), dict(LORA, blocks=':2', alpha=3.0)],
            [dict(LORA, blocks=[0, 1]), dict(LORA, blocks='2:', alpha=3.0)],
            id='exchanged',
        ),
        pytest.param(
            dict(MONA, bottleneck=8),
            dict(MONA, bottleneck={'*.0': 8, 'default': 8}),
            dict(MONA, bottleneck={'*.0': 4, 'default': 8}),
            id='widths',
        ),
    ],
)
def test_a_delta_fits_whatever_the_spelling(written, again, other, base, tmp_path):
    """Blocks and widths by pattern are compared by what they select, not by how they are written."""
    torch.save(MODELS.build(base).state_dict(), tmp_path / 'base.pth')
    base = dict(base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    source = PeftBackbone(base=base, peft=written).eval()
    source.init_weights()
    mona_mm.save_delta(source, tmp_path / 'a.delta.safetensors')
    target = PeftBackbone(base=base, peft=again).eval()
    mona_mm.load_delta(target, tmp_path / 'a.delta.safetensors')
    x = images()
    assert_equal(list(target(x)), list(source(x)))
    with pytest.raises(CheckpointMismatchError):
        mona_mm.load_delta(PeftBackbone(base=base, peft=other), tmp_path / 'a.delta.safetensors')


def test_a_list_of_one_is_that_method(tmp_path):
    torch.save(MODELS.build(HOSTS['mmdet-swin']).state_dict(), tmp_path / 'base.pth')
    base = dict(HOSTS['mmdet-swin'], init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    source = build(base, MONA).eval()
    mona_mm.save_delta(source, tmp_path / 'a.delta.safetensors')
    target = PeftBackbone(base=base, peft=MONA).eval()
    mona_mm.load_delta(target, tmp_path / 'a.delta.safetensors')
    x = images()
    assert_equal(list(target(x)), list(source(x)))


def test_a_delta_never_looks_up_types_that_the_model_does_not_have(tmp_path, monkeypatch):
    """A registry imports the module that a name starts with: a file must not choose it."""
    file = tmp_path / 'a.delta.safetensors'
    model = build(HOSTS['mmdet-swin'], LORA, MONA)
    described = dict(type='LoRA+Mona', options=dict(methods=[dict(type='evil.LoRA'), dict(type='Mona')]), trainable=[])
    monkeypatch.setattr('mona_mm.checkpoint.delta.describe_methods', lambda model: {'': described})
    mona_mm.save_delta(model, file)
    monkeypatch.undo()
    with safe_open(file, 'pt') as opened:
        assert 'evil.LoRA' in json.dumps(opened.metadata())
    looked_up = []
    monkeypatch.setattr(METHODS, 'get', lambda name: looked_up.append(name))
    with pytest.raises(CheckpointMismatchError, match='another method'):
        mona_mm.load_delta(model, file)
    assert not any('evil' in name for name in looked_up)


def test_a_resumed_run_equals_an_undisturbed_one(make_runner, tmp_path):
    """Through mmengine's Runner, with its checkpoint of the optimizer; the delta of the end is that of both."""
    hooks = [
        dict(type='mona_mm.ParamFreezeHook'),
        dict(type='mona_mm.IterationSeedHook'),
        dict(type='mona_mm.DeltaCheckpointHook'),
    ]

    def run(epochs, folder, **options):
        torch.manual_seed(0)
        model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=[LORA, dict(MONA, blocks='last 2')])
        options |= dict(work_dir=str(tmp_path / folder), train_dataloader=DataLoader(Images(), batch_size=2))
        runner = make_runner(model, hooks, epochs=epochs, **options)
        runner.train()
        return runner.model.state_dict()

    whole = run(2, 'whole')
    run(1, 'first')
    resumed = run(2, 'second', resume=True, load_from=str(tmp_path / 'first/epoch_1.pth'))
    assert_equal(resumed, whole)
    deltas = [read_delta(tmp_path / folder / 'epoch_2.delta.safetensors') for folder in ('whole', 'second')]
    assert deltas[0].header.methods == deltas[1].header.methods
    assert deltas[0].header.methods['backbone']['type'] == 'LoRA+Mona'
    assert_equal(deltas[0].tensors, deltas[1].tensors)


def test_they_merge_if_each_does(base):
    model = build(base, LORA, FFN).eval()
    assert unmergeable(model) == []
    x = images()
    expected = [out.detach() for out in model(x)]
    stock = MODELS.build(base)
    assert not load(stock, merged_state_dict(model))
    stock.eval()  # mmdet's returns nothing
    assert_near([out.detach() for out in stock(x)], expected)
    assert_near([out.detach() for out in mona_mm.merge(model)(x)], expected)
    assert type(model) is type(stock) and not method_names(model)


def test_one_that_does_not_merge_is_named(base):
    model = build(base, LORA, MONA)
    with pytest.raises(ConfigError, match='^Mona cannot be merged'):
        mona_mm.merge(model)
    config = dict(model=dict(backbone=dict(type='mona_mm.PeftBackbone', base=base, peft=[LORA, MONA])))
    cfg = mona_mm.config.load.Config(config)
    set_deploy(cfg)
    assert cfg.model.backbone.deploy
    deployed = PeftBackbone(base=base, peft=[LORA, MONA], deploy=True)
    assert lines_of(deployed).keys() == {'LoRA', 'Mona'}


WRONG = {
    'one-site': ([MONA, dict(MONA, sites='post_ffn')], "Mona and Mona 2 are both at 'post_ffn' of the block stages"),
    'names': ([dict(MONA, name='a'), dict(LORA, name='a')], "name='a' must be a string that no other method"),
    'no-string': ([dict(MONA, name=3), LORA], 'name=3 must be a string'),
    'empty': ([], 'must be a dict, such as .* or a list of such dicts'),
    'no-dict': ([MONA, 'LoRA'], 'must be'),
    'a-list-in-it': ([[MONA]], 'must be'),
    'a-name-alone': (dict(MONA, name='a'), "Mona has no argument 'name'"),
    'unknown': ([MONA, dict(type='Nome')], 'unknown method'),
    'elsewhere': ([MONA, dict(LORA, rank=200)], 'rank=200 must be at most'),
}


@pytest.mark.parametrize(('peft', 'message'), WRONG.values(), ids=WRONG)
def test_wrong_lists_are_refused(peft, message):
    with pytest.raises(UserError, match=message):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)


def test_two_may_share_a_site_in_different_blocks():
    model = PeftBackbone(
        base=HOSTS['mmdet-swin'], peft=[dict(MONA, blocks=':2'), dict(MONA, blocks='2:', bottleneck=4)]
    )
    assert lines_of(model).keys() == {'Mona', 'Mona 2'}
    assert len(lines_of(PeftBackbone(base=HOSTS['mmdet-swin'], peft=MONA))) == 1


@pytest.fixture
def spt_plan(tmp_path):
    plan = plan_for(HOSTS['mmdet-swin'], dict(type='LoRA', rank=2))
    plan.save(tmp_path / 'plan.safetensors')
    return plan, str(tmp_path / 'plan.safetensors')


def test_spt_may_be_one_of_them(spt_plan, tmp_path):
    """What its plan says trains as well: modules, single weights and whole vectors of the base."""
    plan, file = spt_plan
    base = HOSTS['mmdet-swin']
    spt = dict(type='SPT', plan=file)
    model, alone = build(base, spt, MONA), PeftBackbone(base=base, peft=spt)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in alone.named_parameters() if p.requires_grad} | method_names(
        PeftBackbone(base=base, peft=MONA)
    )
    counts = plan.counts
    in_vectors = sum(len(alone.get_parameter(name)) for name, rows in plan.vectors if rows is None)
    assert lines_of(model)['SPT'] == counts.total - in_vectors
    assert count_trainable(model).trainable == counts.total + lines_of(model)['Mona']
    assert unmergeable(model) == ['Mona']
    cfg = mona_mm.config.load.Config(
        dict(model=dict(backbone=dict(type='mona_mm.PeftBackbone', base=base, peft=[dict(spt, name='s'), MONA])))
    )
    assert spt_config(cfg) == dict(spt, name='s')
    put_plan_in(cfg)
    described = spt_config(cfg)
    assert described['name'] == 's' and described['plan'] == {b: list(s) for b, s in plan.structured.items()}
    again = PeftBackbone(base=base, peft=cfg.model.backbone.peft)
    assert lines_of(again) == {'s': counts.structured, 'Mona': lines_of(model)['Mona']}


def test_several_are_no_published_method():
    config = dict(
        model=dict(backbone=dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=[LORA, MONA])),
        optim_wrapper={},
    )
    assert method_of(config, Log(), {}) is None


def test_rules_are_united():
    """Those of each method, which a Method of a third party may have as well."""

    class Rules(mona_mm.methods.Method):
        def __init__(self, rule):
            self.rule = rule

        trainable = property(lambda self: (self.rule,))

        def modules(self, host, sites):
            return {}

    METHODS.register_module(module=Rules)
    try:
        peft = [dict(type='Rules', rule='norm'), LORA, dict(type='Rules', rule='patch_embed')]
        assert build_method(peft).trainable == ('norm', 'patch_embed')
        model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)
    finally:
        METHODS.module_dict.pop('Rules')
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains > method_names(model) and 'patch_embed.projection.weight' in trains and 'norm0.weight' in trains
    assert issubclass(type(model.stages[0].blocks[0].peft['q']), LinearModule)
