"""Deltas: small, whole, only on their own base, and everywhere that a checkpoint can go."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import HOSTS, ROOT, SMALL_SWIN
from helpers import assert_near
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from small_models import IN_BFLOAT16, METHODS, RULES, build, predict, small_config, trained
from suite import METHOD_CONFIGS, plan_for
from torch import nn

import mona_mm
from mona_mm import load_delta, save_delta
from mona_mm.checkpoint.base import whole_model_base
from mona_mm.checkpoint.delta import changing
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.merge import stock_config, types_left
from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, find_last_checkpoint, load_config, resume_from
from mona_mm.errors import CheckpointMismatchError, ConfigError, MissingFileError
from mona_mm.record import record_of
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture

# With averages everything is checked that is without, and more; the others are like one of these in all that a delta
# knows of them.
WITH_AVERAGES = ('mona', 'bitfit', 'partial_1', 'full', 'lora-bfloat16')


@pytest.mark.parametrize(
    ('method', 'ema'),
    [
        pytest.param(
            method,
            ema,
            id=f'{method}-{"ema" if ema else "plain"}',
            marks=[]
            if ema and method in WITH_AVERAGES or method in ('mona', 'bitfit', 'lora-and-mona')
            else [pytest.mark.slow],
        )
        for method in METHODS
        for ema in (False, True)
    ],
)
def test_train_save_load_is_bit_identical(method, ema, base_file, tmp_path):
    """A run of mmengine's Runner writes a whole checkpoint and a delta; on a fresh model that was never initialised
    the delta gives the predictions of the whole checkpoint, bit for bit, averaged weights and BatchNorm included; it
    holds what trains and the BatchNorm's statistics, and no frozen tensor."""
    hooks = [dict(type='mona_mm.DeltaCheckpointHook'), dict(type='EMAHook', momentum=0.3)]
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='Images'), sampler=dict(type='DefaultSampler'))
    config = dict(
        model=small_config(base_file, METHODS[method]),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(constructor='mona_mm.PeftOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-2)),
        default_hooks=dict(checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1, max_keep_ckpts=1)),
        custom_hooks=hooks if ema else hooks[:1],
        experiment_name=f'{method}-{ema}',
        log_level='ERROR',
        randomness=dict(seed=3),
    )
    runner = build_runner(Config(config))
    runner.train()
    whole = build(base_file, METHODS[method])
    load_checkpoint(whole, str(tmp_path / 'epoch_2.pth'))
    assert not (tmp_path / 'epoch_1.delta.safetensors').exists()
    file = tmp_path / 'epoch_2.delta.safetensors'
    if method == 'full':
        assert not file.exists(), 'a delta of everything is the whole model'
        save_delta(whole, file)
    fresh = build(base_file, METHODS[method])
    if method != 'full':
        assert not torch.equal(predict(fresh), predict(whole)), 'the test would not see a delta that does nothing'
    load_delta(fresh, file)
    assert torch.equal(predict(fresh), predict(whole))
    if ema:
        assert not torch.equal(predict(runner.model), predict(whole)), 'the averaged weights are others'
    expected, actual = whole.state_dict(), fresh.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    held = read_delta(file).tensors
    assert {t.dtype for t in held.values() if t.is_floating_point()} == {torch.float32}
    names = set(held)
    statistics = {f'head.1.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')}
    named = whole.named_parameters(remove_duplicate=False)  # what modules share has several names
    start = {name for name, _ in whole.named_buffers() if '.initial_' in name}  # of a LoRA from a part of the base
    assert names == {name for name, p in named if p.requires_grad} | statistics | start


def test_header_says_what_it_is(base_file, tmp_path):
    """Method, parts, versions, classes and metrics come back; the table by part adds up."""
    model = trained(base_file, METHODS['mona'])
    said = dict(config='x = 1', metrics=dict(mAP=0.5), dataset_meta=dict(classes=('a',)))
    save_delta(model, tmp_path / 'a.delta.safetensors', **said)
    delta = read_delta(tmp_path / 'a.delta.safetensors')
    header = delta.header
    assert header.methods == {'backbone': dict(type='Mona', options=dict(bottleneck=8), trainable=['none'])}
    assert (header.config, header.metrics, header.dataset_meta) == ('x = 1', dict(mAP=0.5), dict(classes=['a']))
    assert header.versions['mona_mm'] == mona_mm.__version__ and header.versions['torch'] == torch.__version__
    loaded = load_delta(model, tmp_path / 'a.delta.safetensors')
    count = mona_mm.count_trainable(model)
    statistics = 2 * 16 + 1
    assert loaded.parts == dict(
        method=count.backbone_trainable, head=count.trainable - count.backbone_trainable + statistics
    )
    assert list(loaded.parts) == ['method', 'head']


SIZED = ('mona', 'adapter', 'adaptformer', 'lora', 'lorand', 'spt', *list(RULES)[:-1])
MOST_NAMES = ('mona', 'norm_tuning')  # for their values


@pytest.mark.parametrize(
    'method', [pytest.param(method, marks=[pytest.mark.slow] * (method not in MOST_NAMES)) for method in SIZED]
)
def test_size(method, tmp_path):
    """Every method in a classifier with Swin-B, whose own head is small: beyond 4 bytes for each trained value (2 in
    half precision), at most 160 bytes for each tensor's name, type and place, and the text of the config; that is 2% of
    what has a million values or more. Of BitFit, with its many small tensors, it is 2% to 4%: the price of a file that
    every viewer of safetensors shows. It comes back bit for bit."""
    like = 'mona' if method == 'spt' else method
    folder = '' if like == 'mona' else f'{method}_'
    cfg = load_config(str(ROOT / f'configs/{like}/{folder}swin_l_flowers102.py'))
    cfg.model.backbone.base.arch = 'base'
    if method == 'spt':
        host = {**cfg.model.backbone.base, 'type': 'mmpretrain.SwinTransformer', 'init_cfg': None}
        plan_for(host, dict(type='LoRA', rank=8)).save(tmp_path / 'plan.safetensors')
        cfg.model.backbone.peft = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'))
    cfg.model.head.in_channels = 1024
    adapt_to_device(cfg)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    values = mona_mm.count_trainable(model).trainable
    for half in (True, False):
        file = tmp_path / 'a.delta.safetensors'
        save_delta(model, file, half=half, config=cfg.pretty_text)
        beyond = file.stat().st_size - (2 if half else 4) * values
        assert 0 < beyond < 160 * len(read_delta(file).tensors) + 2 * len(cfg.pretty_text) + 4000
        assert values < 1e6 or beyond < 0.02 * (2 if half else 4) * values
    state, delta = model.state_dict(), read_delta(file)
    assert sum(t.numel() for t in delta.tensors.values()) == values
    assert all(torch.equal(t, state[name]) for name, t in delta.tensors.items())


OTHERS = {
    'method': (dict(method=METHODS['adapter']), r'another method.*Mona \(bottleneck=8.*Adapter \(bottleneck=8'),
    'bottleneck': (
        dict(method=dict(peft=dict(type='Mona', bottleneck=4))), r'another method.*bottleneck=8.*bottleneck=4'
    ),
    'option': (
        dict(method=dict(peft=dict(type='Mona', bottleneck=8, average=False))), r'another method.*average=False'
    ),
    'rules': (dict(method=dict(**METHODS['mona'], trainable='norm')), r"another method.*trainable=\['norm'\]"),
    'classes': (dict(method=METHODS['mona'], classes=7), r'other shapes: head\.2\.weight \(5, 16, 1, 1\) instead'),
    'width': (dict(method=METHODS['mona'], width=8), r'other shapes: head\.0\.weight \(16, 48'),
}  # fmt: skip


@pytest.mark.parametrize('other', OTHERS)
def test_another_model_is_refused(other, base_file, tmp_path):
    """Another method, option, rule, width or number of classes: refused, saying which, and nothing is changed."""
    kwargs, message = OTHERS[other]
    save_delta(trained(base_file, METHODS['mona']), tmp_path / 'a.delta.safetensors')
    model = build(base_file, **kwargs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (load_delta, load_checkpoint):
        with pytest.raises(CheckpointMismatchError, match=message):
            load(model, str(tmp_path / 'a.delta.safetensors'))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saying_a_default_is_no_difference(base_file, tmp_path):
    """Dropout, and a default that is written out, do not make another method."""
    save_delta(trained(base_file, METHODS['mona']), tmp_path / 'a.delta.safetensors')
    peft = dict(type='Mona', bottleneck=8, kernel_sizes=(3, 5, 7), dropout=0.5, sites=['post_ffn', 'post_attn'])
    load_delta(build(base_file, dict(peft=peft)), tmp_path / 'a.delta.safetensors')


def test_another_base_is_refused(base_file, tmp_path, caplog):
    """One changed value of one frozen tensor, or two that changed places, refuses the delta, naming the tensor; the
    model keeps its own; with allow_other_base it loads and says so."""
    file = tmp_path / 'a.delta.safetensors'
    source = trained(base_file, METHODS['mona'])
    save_delta(source, file)
    name = 'backbone.stages.1.blocks.0.ffn.layers.1.weight'
    for change in ('value', 'order'):
        model = build(base_file, METHODS['mona'])
        model.init_weights()
        weight = model.state_dict()[name]
        if change == 'value':
            weight[3, 3] += 1e-6
        else:
            weight.copy_(weight.flip(0))
        other = weight.clone()
        with pytest.raises(CheckpointMismatchError, match=rf'(?s)1 of \d+ .*{name}.*--allow-other-base'):
            load_delta(model, file)
        assert torch.equal(model.state_dict()[name], other)
    load_delta(model, file, allow_other_base=True)
    assert torch.equal(model.state_dict()[name], other)
    assert torch.equal(model.head[0].weight, source.head[0].weight)


@pytest.mark.parametrize('trained_on', ['bfloat16', None])
def test_frozen_weights_of_another_type_are_refused(trained_on, base_file, tmp_path, monkeypatch):
    """A delta trained on frozen weights in bfloat16 is refused where they are in float32, and the other way round, with
    both types and the option; it loads where that is meant."""
    file, other = tmp_path / 'a.delta.safetensors', None if trained_on else 'bfloat16'
    methods = {of: dict(**METHODS['lora'], frozen_dtype=of) for of in (trained_on, other)}
    source = trained(base_file, methods[trained_on])
    save_delta(source, file)
    said = [str(of or 'float32') for of in (trained_on, other)]
    message = rf'backbone were in {said[0]} .* {said[1]} .*frozen_dtype={trained_on!r}'
    for load in (load_delta, load_checkpoint):
        with pytest.raises(CheckpointMismatchError, match=rf'(?s)tensors differ.*{message}.*--allow-other-base'):
            load(build(base_file, methods[other]), str(file))
    model = build(base_file, methods[other])
    load_delta(model, file, allow_other_base=True)
    assert torch.equal(model.head[0].weight, source.head[0].weight)
    near, exact = predict(model), predict(source)
    assert not torch.equal(near, exact) and (near - exact).norm() < 0.1 * exact.norm()


def test_the_base_is_loaded_where_nobody_did(base_file, tmp_path):
    """A model that was never initialised gets the base of its config; with another file there, it is refused."""
    source = trained(base_file, METHODS['lora'])
    save_delta(source, tmp_path / 'a.delta.safetensors')
    for load in (load_delta, load_checkpoint):
        model = build(base_file, METHODS['lora'])
        load(model, str(tmp_path / 'a.delta.safetensors'))
        assert torch.equal(predict(model), predict(source))
    state = torch.load(base_file, weights_only=True)
    torch.save({name: t + 1e-3 if t.is_floating_point() else t for name, t in state.items()}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointMismatchError, match='trained on another frozen base'):
        load_delta(build(tmp_path / 'other.pth', METHODS['lora']), tmp_path / 'a.delta.safetensors')


@pytest.mark.slow
def test_the_whole_model_that_a_run_started_from(base_file, tmp_path):
    """A delta names the whole model below it, itself on a delta or not. It is found at its place or beside the delta,
    and loaded into a fresh model; where it is gone or another one, the refusal names it and the model stays as it was.
    """
    frozen = dict(METHODS['mona'], trainable='stages.1')
    start, whole, delta, second = (
        tmp_path / name for name in ('start/whole.pth', 'start/moved.pth', 'a.delta.safetensors', 'b.delta.safetensors')
    )
    start.parent.mkdir()
    model = trained(base_file, dict(trainable='full'))  # no frozen tensor in it is that of init_cfg
    torch.save(dict(state_dict=model.state_dict(), meta={}), start)
    tuned = trained(base_file, frozen)
    tuned.load_state_dict(torch.load(start)['state_dict'], strict=False)
    save_delta(tuned, delta, base_file=str(start))
    with torch.no_grad():
        for name in changing(tuned):
            tuned.state_dict()[name].mul_(2)
    save_delta(tuned, second, base_file=str(delta))  # a run from load_from=a.delta.safetensors

    def same(model):
        return all(torch.equal(t, tuned.state_dict()[name]) for name, t in model.state_dict().items())

    loaded = build(base_file, frozen)
    load_delta(loaded, second)
    assert same(loaded)
    start.rename(tmp_path / start.name)  # beside the deltas
    loaded = build(base_file, frozen)
    load_delta(loaded, second)
    assert same(loaded)

    torch.save(build(base_file, frozen).state_dict(), tmp_path / start.name)
    for _ in ('another one', 'gone'):
        loaded = build(base_file, frozen)
        loaded.init_weights()
        before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        with pytest.raises(CheckpointMismatchError, match='Its run started from .*whole.pth: put that file there, or'):
            load_delta(loaded, delta)
        assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
        load_delta(loaded, delta, allow_other_base=True)  # on its own base
        own = loaded.state_dict().keys() - changing(loaded)
        assert own and all(torch.equal(loaded.state_dict()[name], before[name]) for name in own)
        (tmp_path / start.name).unlink(missing_ok=True)


@pytest.mark.parametrize('top', [False, True], ids=['of the backbone', 'of the model'])
def test_after_a_refusal(top, base_file, tmp_path):
    """A delta for another base is refused and leaves the model as it was, so that the right one loads; of an earlier
    delta, or of what was loaded whole, nothing is lost by it."""
    method = METHODS['mona']
    other = build(base_file, method)
    other.init_weights()
    with torch.no_grad():
        other.backbone.patch_embed.projection.weight.add_(1)
    save_delta(other, tmp_path / 'other.delta.safetensors')
    source = trained(base_file, method)
    save_delta(source, tmp_path / 'right.delta.safetensors')
    model = build(base_file, method, **dict(init_cfg=dict(type='Normal', layer='Conv2d', std=0.01)) if top else {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(CheckpointMismatchError, match='1 of .* tensors differ'):
            load_delta(model, tmp_path / 'other.delta.safetensors')
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    load_delta(model, tmp_path / 'right.delta.safetensors')
    expected = predict(source)
    assert torch.equal(predict(model), expected)
    with pytest.raises(CheckpointMismatchError, match='tensors differ'):
        load_delta(model, tmp_path / 'other.delta.safetensors')
    assert torch.equal(predict(model), expected)
    torch.save(source.state_dict(), tmp_path / 'whole.pth')
    whole = build(base_file, method)
    load_checkpoint(whole, str(tmp_path / 'whole.pth'))
    with pytest.raises(CheckpointMismatchError, match='tensors differ'):
        load_delta(whole, tmp_path / 'other.delta.safetensors')
    assert torch.equal(predict(whole), expected)


def test_a_pretrained_file_that_is_not_here(base_file, tmp_path):
    """Where a model of a run from a whole model is served, the file of its init_cfg need not be there; of a run without
    one it must, and what the error leaves is what was there."""
    source = trained(base_file, dict(METHODS['mona'], trainable='stages.1'))
    state = {f'module.{name}': tensor for name, tensor in source.state_dict().items()}  # as DDP names them
    torch.save(state, tmp_path / 'whole.pth')
    save_delta(source, tmp_path / 'a.delta.safetensors', base_file=str(tmp_path / 'whole.pth'))
    model = build('gone.pth', dict(METHODS['mona'], trainable='stages.1'), init_cfg=dict(type='Normal', layer='Conv2d'))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_delta(model, tmp_path / 'a.delta.safetensors')
    assert torch.equal(predict(model), predict(source))
    model.load_state_dict(before)
    (tmp_path / 'whole.pth').unlink()
    with pytest.raises(MissingFileError, match='no checkpoint gone.pth'):
        load_delta(model, tmp_path / 'a.delta.safetensors')
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.is_init for module in model.modules() if isinstance(module, BaseModule))


def test_a_base_that_names_itself(base_file, tmp_path, monkeypatch):
    """Runs one after the other write deltas of the same name: two that name each other, and one whose base is gone, are
    refused, and not put on themselves."""
    source, folders = trained(base_file, METHODS['mona']), [tmp_path / name for name in 'ab']
    with torch.no_grad():
        source.backbone.patch_embed.projection.weight.add_(1)
    tried = []
    whole = mona_mm.checkpoint.delta._load_whole
    monkeypatch.setattr(
        'mona_mm.checkpoint.delta._load_whole', lambda *args, **options: (tried.append(args), whole(*args, **options))
    )
    files = [folder / 'epoch_1.delta.safetensors' for folder in folders]
    for file, base in zip(files, files[::-1], strict=True):
        file.parent.mkdir()
        save_delta(source, file, base_file=str(base))
    for count in (1, 0):
        tried.clear()
        with pytest.raises(CheckpointMismatchError, match='trained on another frozen base'):
            load_delta(build(base_file, METHODS['mona']), files[0])
        assert len(tried) == count
        files[1].unlink(missing_ok=True)


def test_a_base_that_does_not_help_leaves_nothing(base_file, tmp_path):
    """A delta is refused after the delta that it names as its base has been loaded: the one before is as it was, with
    its classes, and what it changed is still put back by the next."""
    a, b, c, part, whole = (
        tmp_path / name for name in (*(f'{n}.delta.safetensors' for n in ('a', 'b', 'c', 'part')), 'whole.pth')
    )
    method = METHODS['mona']
    source = trained(base_file, method)
    save_delta(source, a, dataset_meta=dict(classes=['a']))
    save_delta(source, part, parts=['method'])
    for file, base in ((c, whole), (b, c)):
        with torch.no_grad():
            source.backbone.patch_embed.projection.weight.add_(1)
        if base is whole:
            torch.save(source.state_dict(), whole)
        save_delta(source, file, base_file=str(base), dataset_meta=dict(classes=['b', 'c']))
    model = build(base_file, method)
    model.init_weights()
    model.dataset_meta = {}
    before = model.head[0].weight.clone()
    load_delta(model, a)
    expected = predict(model)
    with pytest.raises(CheckpointMismatchError, match='1 of .* tensors differ'):
        load_delta(model, b)
    assert model.dataset_meta == dict(classes=['a']) and torch.equal(predict(model), expected)
    load_delta(model, part)
    assert torch.equal(model.head[0].weight, before)
    load_delta(model, c)
    assert model.dataset_meta == dict(classes=['b', 'c'])


def test_a_part_on_a_base_that_is_a_whole_model(base_file, tmp_path):
    """Of the whole model below a delta of the method alone only the backbone is taken: the head keeps what it has, and
    what an earlier delta changed in it is put back."""
    method, whole, part, other = METHODS['mona'], *(tmp_path / f'{n}.delta.safetensors' for n in ('w', 'part', 'a'))
    whole = whole.with_suffix('.pth')
    save_delta(trained(base_file, method), other)
    source = trained(base_file, method)
    with torch.no_grad():
        source.backbone.patch_embed.projection.weight.add_(1)
    torch.save(source.state_dict(), whole)
    save_delta(source, part, parts=['method'], base_file=str(whole))
    model = build(base_file, method)
    head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    for files in ([part], [other, part]):
        for file in files:
            load_delta(model, file)
        backbone = source.backbone.state_dict()
        assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.backbone.state_dict().items())
        assert all(torch.equal(model.head.state_dict()[name], tensor) for name, tensor in head.items())


@pytest.mark.parametrize('named', ['~/start/whole.pth', 'start/whole.pth'])
def test_paths_of_a_base(named, base_file, tmp_path, monkeypatch):
    """A base named from the home folder or from the run's is found from another folder; a delta is written and read
    where `~` says."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'start').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    source = trained(base_file, METHODS['mona'])
    with torch.no_grad():
        source.backbone.patch_embed.projection.weight.add_(1)
    torch.save(source.state_dict(), 'start/whole.pth')
    save_delta(source, '~/a b.delta.safetensors', base_file=named)
    monkeypatch.chdir('elsewhere')
    for beside in (False, True):
        if beside:
            (tmp_path / 'start/whole.pth').rename(tmp_path / 'whole.pth')
        model = build(base_file, METHODS['mona'])
        load_delta(model, '~/a b.delta.safetensors')
        assert torch.equal(predict(model), predict(source))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize('load', [load_checkpoint, lambda m, f: m.load_state_dict(torch.load(f), strict=False)])
def test_what_was_loaded_since_is_not_put_back(load, base_file, tmp_path):
    """Heads loaded after a delta outlive the next delta, which holds only the method; what nobody touched since is put
    back, also in a model that was converted to half precision."""
    method, whole, part, heads = METHODS['mona'], *(str(tmp_path / f'{n}.delta.safetensors') for n in 'ab'), 'heads.pth'
    source = trained(base_file, method)
    save_delta(source, whole)
    save_delta(source, part, parts=['method'])
    model, anew = build(base_file, method), torch.randn(5, 16, 1, 1)
    load_delta(model, whole)
    before = build(base_file, method).head[0].weight.clone()
    record_of(model).replaced['head.0.weight'][0].copy_(before)
    torch.save({'head.2.weight': anew}, tmp_path / heads)
    load(model, str(tmp_path / heads))
    assert load_delta(model, part).restored == 9 - 1
    assert torch.equal(model.head[2].weight, anew) and torch.equal(model.head[0].weight, before)
    load_delta(model, whole)
    load_delta(model.half(), part, allow_other_base=True)
    assert torch.equal(model.head[2].weight, anew.half()) and torch.equal(model.head[0].weight, before.half())


def test_several_tasks_on_one_backbone(base_file, tmp_path):
    """Deltas switched in place give the outputs of separately loaded models, also where one holds only the method:
    then what the former changed is put back."""
    files, expected = {}, {}
    for seed, parts in [(1, None), (2, None), (3, ['method'])]:
        source = trained(base_file, METHODS['mona'])
        with torch.no_grad():
            for p in source.parameters():
                p.add_(seed * 0.01 * p.requires_grad)
        files[seed] = tmp_path / f'{seed}.delta.safetensors'
        save_delta(source, files[seed], parts=parts)
        if parts:  # the head stays as the model was built
            torch.manual_seed(7)
            alone = build(base_file, METHODS['mona'])
            load_delta(alone, files[seed])
            source = alone
        expected[seed] = predict(source)
    torch.manual_seed(7)
    model = build(base_file, METHODS['mona'])
    base = {n: t.clone() for n, t in read_checkpoint(str(base_file)).items()}
    for seed in (1, 2, 3, 2, 3, 1):
        loaded = load_delta(model, files[seed])
        assert torch.equal(predict(model), expected[seed]), seed
        assert loaded.seconds < 5
    assert all(torch.equal(model.backbone.state_dict()[name], tensor) for name, tensor in base.items())
    assert len({tuple(out.flatten().tolist()) for out in expected.values()}) == 3


def test_the_places_of_single_weights(base_file, tmp_path):
    """A delta of SPT holds values and no places; it loads with its own plan, whole or of the method alone, bit for bit,
    and with a plan of as many other places it is refused."""
    host = SMALL_SWIN
    plan = plan_for(host, dict(type='LoRA', rank=2))
    shifted = {name: (at + 1) % torch.Size(plan.architecture.shapes[name]).numel() for name, at in plan.weights.items()}
    first = next(name for name, at in shifted.items() if (at.diff() > 0).all() and '.qkv' not in name)
    other = dataclasses.replace(plan, weights={**plan.weights, first: shifted[first]})
    methods = []
    for i, each in enumerate((plan, other)):
        each.save(tmp_path / f'{i}.safetensors')
        methods.append(dict(peft=dict(type='SPT', plan=str(tmp_path / f'{i}.safetensors'))))
    source = trained(base_file, methods[0])
    for parts in (None, ['method']):
        save_delta(source, tmp_path / 'a.delta.safetensors', parts=parts)
        assert all(
            t.is_floating_point() or '.num_' in n
            for n, t in read_delta(tmp_path / 'a.delta.safetensors').tensors.items()
        )
        model = build(base_file, methods[0])
        load_delta(model, tmp_path / 'a.delta.safetensors')
        expected = source.backbone.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in model.backbone.state_dict().items())
        with pytest.raises(CheckpointMismatchError, match=r'1 of \d+ .*indices'):
            load_delta(build(base_file, methods[1]), tmp_path / 'a.delta.safetensors')


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'half'])
def test_parts_and_half(half, base_file, tmp_path):
    """`parts=['method']` writes only what is in the backbone; half precision rounds what trains, not statistics."""
    model = trained(base_file, METHODS['adapter'])
    state = model.state_dict()
    save_delta(model, tmp_path / 'a.delta.safetensors', half=half)
    save_delta(model, tmp_path / 'm.delta.safetensors', parts=['method'], half=half)
    whole, method = (read_delta(tmp_path / f'{name}.delta.safetensors').tensors for name in 'am')
    assert set(method) == {name for name in whole if name.startswith('backbone.')} < set(whole)
    for name, tensor in whole.items():
        rounded = (
            half and model.get_parameter(name).requires_grad if '.running' not in name and 'num_' not in name else False
        )
        assert tensor.dtype == (torch.float16 if rounded else state[name].dtype)
        assert torch.equal(tensor, state[name].half() if rounded else state[name])
    with pytest.raises(ConfigError, match=r"parts=\['neck'\].*head, method"):
        save_delta(model, tmp_path / 'n.delta.safetensors', parts=['neck'])
    with pytest.raises(ConfigError, match='must end in .delta.safetensors'):
        save_delta(model, tmp_path / 'n.pth')
    with pytest.raises(MissingFileError, match='no delta'):
        load_delta(model, tmp_path / 'n.delta.safetensors')


def test_half_precision_has_bounds(base_file, tmp_path):
    """A tensor with a value beyond float16 is written as it is, not as infinity."""
    model = trained(base_file, METHODS['adapter'])
    with torch.no_grad():
        model.head[0].weight[0, 0] = -1e5
    save_delta(model, tmp_path / 'a.delta.safetensors', half=True)
    tensors = read_delta(tmp_path / 'a.delta.safetensors').tensors
    assert torch.equal(tensors['head.0.weight'], model.head[0].weight) and tensors['head.2.weight'].dtype == torch.half


def test_the_config_in_a_delta_is_not_handed_on(base_file, tmp_path):
    """mmengine executes the config that it finds in a checkpoint: in what it is given of a delta there is none."""
    save_delta(trained(base_file, METHODS['mona']), tmp_path / 'a.delta.safetensors', config='import os', metrics={})
    checkpoint = read_checkpoint(str(tmp_path / 'a.delta.safetensors'))
    assert 'cfg' not in checkpoint['meta'] and 'import os' not in str({**checkpoint, 'state_dict': {}})


@pytest.fixture
def detector(detector_config, tmp_path):
    """The small detector with a pretrained base, two iterations an epoch, averaged weights."""
    cfg = detector_config
    base = {**cfg.model.backbone.base, 'type': 'mmdet.SwinTransformer'}
    model = MODELS.build(base)
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / 'base.pth')
    cfg.model.backbone.base.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    cfg.train_dataloader.batch_size = 3
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best='coco/bbox_mAP')
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.3))
    adapt_to_device(cfg)
    return cfg


def start(cfg, **options):
    cfg = cfg.copy()
    cfg.merge_from_dict({**options, 'experiment_name': os.urandom(4).hex()})
    return build_runner(cfg)


@pytest.mark.slow
def test_a_detector_in_every_way(detector, tmp_path):
    """One run of a detector with BatchNorm heads; its delta through Runner.test, init_detector, the inferencer,
    load_from and resume gives what the whole checkpoint gives, and follows its keep and best rules."""
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    work = Path(detector.work_dir)
    runner = start(detector)
    runner.train()
    names = {file.name.partition('.')[0] for file in work.glob('*.delta.safetensors')}
    assert names == {file.stem for file in work.glob('*.pth')} == {'epoch_2', 'best_coco_bbox_mAP_epoch_1'}
    whole, delta = work / 'epoch_2.pth', work / 'epoch_2.delta.safetensors'
    header = read_delta(delta).header
    assert header.metrics['coco/bbox_mAP'] == runner.message_hub.get_scalar('val/coco/bbox_mAP').current()
    assert header.dataset_meta['classes'] == ['disc', 'square', 'triangle', 'star']
    assert 'PeftBackbone' in header.config

    def outputs(results):
        return [(r.pred_instances.bboxes, r.pred_instances.scores, r.pred_instances.masks) for r in results]

    with pytest.raises(ConfigError, match='name its config as well'):
        DetInferencer(weights=str(delta), device='cpu')
    images = sorted(str(file) for file in Path(detector.data_root, 'val2017').iterdir())
    expected = init_detector(detector.copy(), str(whole), device='cpu')
    for model in (
        init_detector(detector.copy(), str(delta), device='cpu'),
        DetInferencer(detector.copy(), str(delta), device='cpu', show_progress=False).model,
    ):
        assert model.dataset_meta['classes'] in (header.dataset_meta['classes'], tuple(header.dataset_meta['classes']))
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
        if hasattr(model, 'cfg') and model.cfg is not None:
            given, wanted = (outputs(inference_detector(m, images)) for m in (model, expected))
            assert all(torch.equal(a, b) for x, y in zip(given, wanted, strict=True) for a, b in zip(x, y, strict=True))

    expected = expected.state_dict()
    tested = start(detector, load_from=str(delta), work_dir=str(tmp_path / 'test'))
    tested.test()
    (ema,) = (hook for hook in tested.hooks if isinstance(hook, EMAHook))
    for model in (tested.model, ema.ema_model.module):  # the two are swapped for the test
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    tuned = start(
        detector,
        load_from=str(delta),
        work_dir=str(tmp_path / 'tuned'),
        **{'optim_wrapper.optimizer.lr': 0.0, 'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 9},
    )
    tuned.train()
    assert tuned.epoch == 1
    frozen = {name for name in expected if 'running' not in name and 'num_batches' not in name}
    assert all(torch.equal(tuned.model.state_dict()[name], expected[name]) for name in frozen)


def test_what_serves_a_detector_takes_a_delta(detector, tmp_path):
    """init_detector and the inferencer make of a delta, its config and its classes the model that it was written of."""
    from mmdet.apis import DetInferencer, init_detector

    init_default_scope('mmdet')
    model = MODELS.build(detector.model)
    model.init_weights()
    file = tmp_path / 'a.delta.safetensors'
    classes = ('disc', 'square', 'triangle', 'star')
    save_delta(model, file, config=detector.pretty_text, dataset_meta=dict(classes=classes))
    for served in (
        init_detector(detector.copy(), str(file), device='cpu'),
        DetInferencer(detector.copy(), str(file), device='cpu', show_progress=False).model,
    ):
        assert tuple(served.dataset_meta['classes']) == classes
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in served.state_dict().items())


def test_resume_from_a_delta(detector, tmp_path):
    """--resume on a delta goes on at its iteration with the schedule's learning rates, and says what begins anew; on a
    part of a model it is refused."""
    detector.custom_hooks.pop()
    detector.val_dataloader = detector.val_cfg = detector.val_evaluator = None
    detector.default_hooks.checkpoint.update(max_keep_ckpts=-1, save_best=None)
    detector.param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[1, 3], gamma=0.5)]
    straight = start(detector)
    straight.train()
    resumed = detector.copy()
    resumed.work_dir = str(tmp_path / 'resumed')
    resumed.load_from = str(Path(detector.work_dir, 'epoch_1.pth'))
    resume_from(resumed, str(Path(detector.work_dir, 'epoch_1.delta.safetensors')))
    runner = start(resumed)
    runner.train()
    assert (runner.epoch, runner.iter) == (straight.epoch, straight.iter) == (2, 4)
    assert find_last_checkpoint(resumed.work_dir).endswith('epoch_2.pth')
    header = read_delta(Path(resumed.work_dir, 'epoch_2.delta.safetensors')).header
    assert header.base_file == resumed.base_checkpoint == str(Path(detector.work_dir, 'epoch_1.pth'))
    assert runner.optim_wrapper.get_lr() == straight.optim_wrapper.get_lr()
    assert not Path(resumed.work_dir, 'epoch_1.pth').exists()
    save_delta(runner.model, tmp_path / 'part.delta.safetensors', parts=['method'])
    with pytest.raises(ConfigError, match='holds only method'):
        resume_from(resumed, str(tmp_path / 'part.delta.safetensors'))


def test_the_tools(detector, tmp_path, tool):
    """tools/test.py evaluates a delta alone; on another base it ends with one line, and with --allow-other-base goes on
    and says so loudly."""
    detector.custom_hooks.pop()
    detector.test_dataloader.dataset.indices = 1
    init_default_scope('mmdet')
    model = MODELS.build(detector.model)
    model.init_weights()
    delta = tmp_path / 'a.delta.safetensors'
    save_delta(model, delta)
    detector.dump(tmp_path / 'config.py')
    arguments = 'test.py', str(tmp_path / 'config.py'), str(delta), '--work-dir', str(tmp_path / 'test')
    assert tool(*arguments)[0] == 0
    state = torch.load(tmp_path / 'base.pth', weights_only=True)
    torch.save({name: t + 1 if t.is_floating_point() else t for name, t in state.items()}, tmp_path / 'base.pth')
    status, _, err = tool(*arguments)
    assert status == 2
    assert re.search(r'error: .*trained on another frozen base.*--allow-other-base', err.splitlines()[-1])
    status, out, err = tool(*arguments, '--allow-other-base')
    assert status == 0 and re.search('WARNING.*trained on another frozen base', out + err)
    assert tool(*arguments)[0] == 2, 'the option ends with its command'


def test_deltas_of_a_resumed_run(base_file, tmp_path):
    """The checkpoint that a run continued from is no base of its deltas; the whole model that it first started from
    is, however often it was resumed, and a base that is gone ends with what to do about it."""
    for name in ('whole.pth', 'epoch_1.pth', 'epoch_2.pth'):
        (tmp_path / name).touch()
    cfg = Config(dict(load_from=str(tmp_path / 'whole.pth')))
    assert whole_model_base(cfg) == cfg.load_from
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        resume_from(cfg, str(tmp_path / name))
        (tmp_path / name).unlink()
        assert cfg.load_from.endswith(name) and whole_model_base(cfg) == str(tmp_path / 'whole.pth')
    (tmp_path / 'whole.pth').unlink()
    with pytest.raises(MissingFileError, match=r'base_checkpoint=.*whole.pth.*--cfg-options base_checkpoint=/path'):
        whole_model_base(cfg)
    moved = tmp_path / 'moved'
    moved.mkdir()
    delta = str(moved / 'epoch_1.delta.safetensors')
    source = build(base_file, METHODS['bitfit'])
    save_delta(source, delta)
    with pytest.raises(MissingFileError, match='base_checkpoint'):
        whole_model_base(cfg, delta)
    (moved / 'whole.pth').touch()
    assert whole_model_base(cfg, delta) == str(moved / 'whole.pth')
    with pytest.raises(MissingFileError, match='load_from=gone/epoch_1'):  # its namesake, not itself
        whole_model_base(Config(dict(load_from='gone/epoch_1.delta.safetensors')), delta)
    (tmp_path / 'there.pth').touch()
    save_delta(source, delta, base_file=str(tmp_path / 'there.pth'))
    assert whole_model_base(cfg, delta) == str(tmp_path / 'there.pth')
    with pytest.raises(MissingFileError, match='load_from=gone.pth.*--cfg-options load_from=/path'):
        whole_model_base(Config(dict(load_from='gone.pth')))
    assert whole_model_base(Config(dict(load_from='gone.pth', resume=True))) is whole_model_base(Config()) is None


@pytest.mark.slow
def test_the_tools_on_a_resumed_config(tmp_path, detector, tool):
    """The config that a resumed run dumped merges and tests its delta when what it continued from is gone; a base that
    is gone is one line. The whole model that it first started from is loaded, though the delta does not name it."""
    detector.custom_hooks.pop()
    init_default_scope('mmdet')
    model = MODELS.build(detector.model)
    detector.base_checkpoint = str(tmp_path / 'whole.pth')
    torch.save(dict(state_dict=model.state_dict()), detector.base_checkpoint)
    delta, config, merged = (str(tmp_path / name) for name in ('a.delta.safetensors', 'config.py', 'merged.pth'))
    save_delta(model, delta)
    detector.load_from, detector.resume = str(tmp_path / 'epoch_2.pth'), True
    detector.dump(config)
    resumed = load_config(config)
    for arguments in (
        ('delta.py', 'merge', config, delta, merged),
        ('test.py', config, delta, '--work-dir', str(tmp_path / 'test')),
    ):
        status, _, err = tool(*arguments, '--cfg-options', 'resume=False')
        assert status == 2
        assert re.search(r'error: load_from=.*epoch_2.pth: there is no such checkpoint', err.splitlines()[-1])
        status, _, err = tool(*arguments)
        assert status == 0, err
    text = torch.load(merged, weights_only=True)['meta']['cfg']
    assert 'epoch_2.pth' in resumed.pretty_text and 'epoch_2.pth' not in text
    assert Config.fromstring(text, '.py').resume is False


@pytest.mark.slow
def test_a_base_that_is_a_whole_model(detector, tmp_path, tool):
    """A detector from load_from, of whose base only the heads train: its delta holds those and the Mona.
    tools/test.py, --resume, init_detector and the inferencer first load what load_from names, which gives the model of
    the whole checkpoint."""
    from mmdet.apis import DetInferencer, init_detector

    detector.custom_hooks.pop()
    detector.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=9)
    init_default_scope('mmdet')
    source = MODELS.build(detector.model)
    torch.save(dict(state_dict=source.state_dict(), meta={}), tmp_path / 'whole.pth')
    detector.model.neck = dict(type='mona_mm.FrozenModel', base=detector.model.neck, trainable='none')
    detector.load_from = str(tmp_path / 'whole.pth')
    start(detector).train()
    file = Path(detector.work_dir, 'epoch_1.delta.safetensors')
    delta = read_delta(file)
    assert {delta.header.part(name) for name in delta.tensors} == {'rpn_head', 'roi_head', 'method'}
    detector.dump(tmp_path / 'config.py')
    expected = torch.load(Path(detector.work_dir, 'epoch_1.pth'), weights_only=False)['state_dict']
    for model in (
        init_detector(detector.copy(), str(file), device='cpu'),
        DetInferencer(detector.copy(), str(file), device='cpu', show_progress=False).model,
    ):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    resumed = detector.copy()
    resume_from(resumed, str(file))
    runner = start(resumed, work_dir=str(tmp_path / 'resumed'), **{'train_cfg.max_epochs': 2})
    runner.train()
    assert runner.epoch == 2
    frozen = {name for name, p in runner.model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 50 and all(torch.equal(runner.model.state_dict()[name], expected[name]) for name in frozen)
    arguments = 'test.py', str(tmp_path / 'config.py'), str(file), '--work-dir', str(tmp_path / 'test')
    assert tool(*arguments)[0] == 0
    torch.save(dict(state_dict=MODELS.build(detector.model).state_dict(), meta={}), tmp_path / 'whole.pth')
    status, _, err = tool(*arguments)
    assert status == 2 and 'trained on another frozen base' in err


def demo_config() -> Config:
    """The small detector, one block a stage."""
    cfg = load_config(str(ROOT / 'configs/demo/demo_mona_shapes.py'))
    cfg.model.backbone.base.depths = [1, 1, 1, 1]
    return cfg


def cascade(tmp_path, peft, **options) -> tuple[str, nn.Module]:
    """A config file of the small detector with a pretrained base and another method, and a trained model of it."""
    cfg = demo_config()
    model = MODELS.build(dict(cfg.model.backbone.base, type='mmdet.SwinTransformer'))
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / 'base.pth')
    base = dict(cfg.model.backbone.base, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    cfg.model.backbone = dict(type='mona_mm.PeftBackbone', base=base, peft=peft, **options)
    cfg.dump(tmp_path / 'config.py')
    adapt_to_device(cfg)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    model.init_weights()
    state = model.state_dict()
    with torch.no_grad():
        for name in changing(model):
            if state[name].is_floating_point():
                state[name].add_(torch.rand_like(state[name]) * 0.05)
    model.eval()
    return str(tmp_path / 'config.py'), model


@pytest.mark.parametrize('kind', ['by scope', 'spt'])
def test_what_is_folded_its_config_can_say(kind, tmp_path, tool):
    """Mona under its full name is folded, and so are Mona modules of SPT, whose config then says where they are: either
    merged checkpoint loads into the model of the config in it, without the plan's file, with the same outputs."""
    if kind == 'spt':
        base = demo_config().model.backbone.base
        plan = plan_for({**base, 'type': 'mmdet.SwinTransformer', 'init_cfg': None}, dict(type='Mona', bottleneck=4))
        plan.save(tmp_path / 'plan.safetensors')
        peft = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'))
    else:
        peft = dict(type='mona_mm.Mona', bottleneck=8)
    config, model = cascade(tmp_path, peft)
    save_delta(model, tmp_path / 'a.delta.safetensors')
    merged = tmp_path / 'merged.pth'
    status, out, err = tool('delta.py', 'merge', config, str(tmp_path / 'a.delta.safetensors'), str(merged))
    assert status == 0 and 'are folded' in out, err
    for file in ('plan.safetensors', 'base.pth'):
        (tmp_path / file).unlink(missing_ok=True)
    checkpoint = torch.load(merged, weights_only=True)
    assert 'dataset_meta' not in checkpoint['meta']  # there were no names in the delta
    cfg = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    adapt_to_device(cfg)
    again = MODELS.build(cfg.model)
    again.load_state_dict(checkpoint['state_dict'])
    x = torch.randn(1, 3, 96, 64)
    again.eval()
    with torch.no_grad():
        for a, b in zip(again.double().extract_feat(x.double()), model.double().extract_feat(x.double()), strict=True):
            assert_near(a, b)
    if kind == 'spt':  # tuned further from the config that it now has
        cfg.dump(config)
        save_delta(again.float(), tmp_path / 'b.delta.safetensors', base_file=str(merged))
        more = str(tmp_path / 'more.pth')
        status, out, err = tool('delta.py', 'merge', config, str(tmp_path / 'b.delta.safetensors'), more)
        assert status == 0, err
        state = torch.load(more, weights_only=True)['state_dict']
        assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize('config', ['lora_cascade_swin_b_coco', 'spt_lora_vit_b_vtab', 'spt_lora_vit_b_fgvc'])
def test_a_stock_config_has_nothing_of_ours(config):
    """Hooks, wrappers, schedules and constructors of a merged model's config are mmengine's, the schedule with the
    steps that it had; only the lists of FGVC have no reader in the libraries, which the tool says."""
    cfg = load_config(str(ROOT / f'configs/{"spt_" * ("spt" in config)}lora/{config}.py'))
    stock = stock_config(cfg)
    left = types_left(stock)
    assert left == (['mona_mm.FGVCJson'] if 'fgvc' in config else [])
    assert set(re.findall(r'mona_mm[.\w]*', stock.pretty_text)) == set(left)
    if 'spt' in config:
        (ours,), (warmup, cosine) = cfg.param_scheduler, stock.param_scheduler
        assert (warmup.begin, warmup.end, warmup.start_factor) == (0, ours.warmup, ours.start_ratio)
        assert (cosine.begin, cosine.get('end'), cosine.eta_min_ratio) == (ours.warmup, ours.get('end'), ours.end_ratio)
        cfg.param_scheduler = ours  # in no list
        assert stock_config(cfg).param_scheduler == stock.param_scheduler
    cfg.default_hooks.timer = None  # takes mmengine's away
    assert stock_config(cfg).default_hooks.timer is None


MERGED = {
    'lora': (dict(peft=METHOD_CONFIGS['lora']), True),
    'lora-everywhere': (dict(peft=METHOD_CONFIGS['lora-everywhere']), True),
    **{rule: (dict(peft=None, trainable=rule), True) for rule in RULES},
    'lora-bfloat16': (IN_BFLOAT16['lora-bfloat16'], True),
    'mona': (dict(peft=METHOD_CONFIGS['mona']), False),
    'adapter': (dict(peft=METHOD_CONFIGS['adapter']), False),
    'two-loras': (dict(peft=[METHOD_CONFIGS['lora'], METHOD_CONFIGS['lora-ffn']]), True),
    'lora-and-mona': (dict(peft=METHOD_CONFIGS['lora-and-mona']), False),
}

ALIKE = ('norm_tuning', 'partial_1', 'fixed', 'full', 'adapter', 'lora', 'two-loras')  # to others here


@pytest.mark.parametrize(
    'method', [pytest.param(method, marks=[pytest.mark.slow] * (method in ALIKE)) for method in MERGED]
)
def test_extract_and_merge(method, tmp_path, tool, capsys):
    """A whole checkpoint to a delta and, by tools/delta.py merge, to a checkpoint that a stock model loads strictly
    (or the config in it, for methods that cannot be merged), with the same features; info and diff tell about it."""
    arguments, mergeable = MERGED[method]
    config, model = cascade(tmp_path, **arguments)
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a', 'b')))), tmp_path / 'whole.pth'
    )
    delta, merged = str(tmp_path / 'a.delta.safetensors'), str(tmp_path / 'merged.pth')
    status, out, err = tool('delta.py', 'extract', config, str(tmp_path / 'whole.pth'), delta)
    assert status == 0, err
    status, out, err = tool('delta.py', 'merge', config, delta, merged)
    assert status == 0 and ('stock config loads it' in out) == mergeable, (out, err)
    checkpoint = torch.load(merged, weights_only=True)
    text = checkpoint['meta']['cfg']
    assert ('mona_mm' in text) != mergeable
    assert mergeable or 'base.pth' not in text, 'it would look for the base again'
    cfg = Config.fromstring(text, '.py')
    adapt_to_device(cfg)
    again = MODELS.build(cfg.model)
    again.load_state_dict(checkpoint['state_dict'])
    x = torch.randn(1, 3, 96, 64)
    again.eval()
    with torch.no_grad():  # in double precision: what is left is the rounding of the merged weights
        for a, b in zip(again.double().extract_feat(x.double()), model.double().extract_feat(x.double()), strict=True):
            assert_near(a, b)
    assert ('deploy=True' in text) == ('mona' in method)
    if method == 'mona':
        status, out, err = tool('delta.py', 'info', delta)
        assert status == 0 and 'Mona(bottleneck=8)' in out
        assert re.search(r'method +[\d,]+ values.*\n +neck .*\n +roi_head .*\n +rpn_head ', out)
        assert tool('delta.py', 'diff', delta, delta)[:2] == (0, 'equal\n')
        model.neck.lateral_convs[0].conv.bias.data += 1
        save_delta(model, tmp_path / 'b.delta.safetensors')
        status, out, err = tool('delta.py', 'diff', delta, str(tmp_path / 'b.delta.safetensors'))
        assert status == 1
        assert 'neck: 1 of 16 tensors differ, most neck.lateral_convs.0.conv.bias by 1' in out


def classifier(tmp_path, host: str, peft: dict) -> str:
    """A config file of a classifier on a small host with a pretrained base."""
    backbone = dict(HOSTS[host], out_indices=(3,))
    base = MODELS.build(backbone)
    base.init_weights()
    torch.save(dict(state_dict=base.state_dict()), tmp_path / 'base.pth')
    backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='mona_mm.PeftBackbone', base=backbone, peft=peft),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=5, in_channels=192),
            ),
        )
    )
    cfg.dump(tmp_path / 'config.py')
    return str(tmp_path / 'config.py')


@pytest.mark.slow
def test_extract_and_merge_of_a_swin_v2(tmp_path, tool):
    """SwinV2's load hook drops buffers that it recomputes: its checkpoint is whole all the same, and its delta merges
    into one that the stock model loads, whole models in load_from and init_cfg alike."""
    sites = ['q', 'k', 'v', 'proj', 'fc1', 'fc2']
    config = classifier(tmp_path, 'mmpretrain-swinv2', dict(type='LoRA', rank=2, sites=sites))
    init_default_scope('mmpretrain')
    model = MODELS.build(load_config(config).model)
    model.init_weights()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    model.eval()
    whole, delta, merged = (str(tmp_path / name) for name in ('whole.pth', 'a.delta.safetensors', 'merged.pth'))
    torch.save(dict(state_dict=model.state_dict()), whole)
    x = torch.randn(1, 3, 64, 64)
    status, _, err = tool('delta.py', 'extract', config, whole, delta)
    assert status == 0, err
    for name in ('load_checkpoint', 'load_delta'):
        fresh = MODELS.build(load_config(config).model).eval()
        load_delta(fresh, delta) if name == 'load_delta' else load_checkpoint(fresh, whole)
        assert torch.equal(fresh(x), model(x)), name
    status, _, err = tool('delta.py', 'extract', config, whole, delta)
    assert status == 2 and 'a.delta.safetensors already exists' in err
    named = str(tmp_path / 'named.delta.safetensors')
    assert tool('delta.py', 'extract', config, whole, named, '--cfg-options', f'load_from={whole}')[0] == 0
    assert read_delta(named).header.base_file == whole
    for options in ([], ['--cfg-options', f'load_from={whole}', 'model.backbone.base.init_cfg=None']):
        Path(merged).unlink(missing_ok=True)
        status, out, err = tool('delta.py', 'merge', config, delta, merged, *options)
        assert status == 0 and 'stock config loads it' in out, err
        checkpoint = torch.load(merged, weights_only=True)
        stock = MODELS.build(Config.fromstring(checkpoint['meta']['cfg'], '.py').model).eval()
        load_checkpoint(stock, merged)
        assert_near(stock(x), model(x))
        assert not torch.allclose(stock(x), MODELS.build(load_config(config).model).eval()(x), atol=1e-2)


@pytest.mark.slow
def test_plans_of_spt_beside_the_file(tmp_path, tool):
    """A config that names no plan: tools/delta.py finds it beside the checkpoint or the delta, and else says where it
    looked; tools/count_params.py counts what is known without one and goes on, and with the plan all of it."""
    lora = dict(type='LoRA', rank=2)
    config = classifier(tmp_path, 'mmpretrain-swin', dict(type='SPT', budget='2%', structured=lora))
    run = tmp_path / 'run'
    run.mkdir()
    architecture = Architecture.of(MODELS.build(HOSTS['mmpretrain-swin']))
    plan = Plan(architecture, lora, {'stages.0.blocks.0': ('q', 'proj')}, (), {}, dict(budget='2%'))
    files = [str(run / name) for name in ('whole.pth', 'a.delta.safetensors', 'merged.pth')]
    cfg = load_config(config)
    cfg.model.backbone.peft = None
    init_default_scope('mmpretrain')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), files[0])
    extract, merge = ('extract', config, *files[:2]), ('merge', config, *files[1:])
    status, _, err = tool('delta.py', *extract)
    assert status == 2 and re.search(r'no plan.safetensors in .*/run or work_dirs/config', err.splitlines()[-1])
    plan.save(run / 'plan.safetensors')
    cfg.model.backbone.peft = dict(type='SPT', plan=str(run / 'plan.safetensors'), structured=lora)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), files[0])
    for arguments in (extract, merge):
        status, _, err = tool('delta.py', *arguments)
        assert status == 0, err
    Path(files[2]).unlink()
    elsewhere = (run / 'plan.safetensors').rename(tmp_path / 'elsewhere.safetensors')
    assert tool('delta.py', *merge)[0] == 2
    assert tool('delta.py', *merge, '--cfg-options', f'model.backbone.peft.plan={elsewhere}')[0] == 0
    elsewhere.rename(run / 'plan.safetensors')
    assert set(read_delta(files[1]).tensors) == {n for n, p in model.named_parameters() if p.requires_grad}

    shipped = 'configs/lora/lora_swin_l_flowers102.py'
    status, out, err = tool('count_params.py', config, shipped, '--json')
    without, other = json.loads(out)
    base = sum(p.numel() for n, p in model.backbone.named_parameters() if '.peft.' not in n)
    head = sum(p.numel() for p in model.head.parameters())
    assert status == 0 and other['backbone_trainable'] > 0
    assert without == dict(
        config=config, method='SPT', total=base + head, trainable=None, backbone_total=base, backbone_trainable=None,
        budget='2%',
    )  # fmt: skip
    status, out, _ = tool('count_params.py', config, shipped)
    assert status == 0 and re.search(rf'SPT, budget 2%: - trainable of {base:,} .*no plan.safetensors', out)
    assert out.count('trainable in the backbone: ') == 1
    (found,) = json.loads(tool('count_params.py', config, '--json', '--cfg-options', f'work_dir={run}')[1])
    assert found['backbone_trainable'] == plan.counts.total and 'budget' not in found
