"""Choices between ways to compute the same: the fastest is taken, and nothing but the rounding depends on it."""

import gc
import io
import threading

import pytest
import torch
from conftest import HOSTS
from fast_forms import step as step_of
from helpers import assert_equal, assert_near, pairwise
from mmcv.cnn.bricks.transformer import FFN
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import Images, mona_swin, state

from mona_mm import PeftBackbone
from mona_mm.hosts import make_fast
from mona_mm.methods import Mona
from mona_mm.nn import choice, depthwise
from mona_mm.nn.choice import Ways
from mona_mm.spt import sparse


@pytest.fixture
def times(monkeypatch):
    """Measurements are on, and a way takes the seconds that the test gives for its name, 1 by default."""
    seconds: dict[str, float] = {}
    taken: list[str] = []
    names: dict[int, str] = {}

    def timed(run, way):
        if id(way) not in names:
            names.update({id(each): name for ways in all_ways() for name, each in ways.ways.items()})
        run(way)
        taken.append(names[id(way)])
        return seconds.get(names[id(way)], 1.0)

    monkeypatch.setattr(choice, '_measures', True)
    monkeypatch.setattr(choice, '_seconds', timed)
    return seconds, taken


def all_ways() -> list[Ways]:
    """Those of the package, and of the test that runs."""
    gc.unfreeze()  # conftest.py leaves what is imported out of garbage collection
    try:
        return [thing for thing in gc.get_objects() if type(thing) is Ways]  # isinstance would look into dead proxies
    finally:
        gc.freeze()


def identity(x):
    return x


def same(x):
    return x + 0


def test_the_fastest_is_taken(times):
    """The fastest way for each key, and the first where another is faster by less than the margin."""
    seconds, taken = times
    ways = Ways('test', first=identity, second=same)
    for of_second, expected in ((0.5, same), (1.5, identity), (0.98, identity)):
        seconds['second'] = of_second
        assert ways.choose((of_second,), lambda way: way(torch.ones(1))) is expected
    count = len(taken)
    assert ways.choose((0.5,), lambda way: way(torch.ones(1))) is same
    assert len(taken) == count, 'a known key was measured again'


def test_real_clock():
    """Without a stand-in for the clock: a way that computes a hundred products loses against one that computes one."""
    choice.measure(True)
    x = torch.randn(200, 200)
    ways = Ways('real', slow=lambda x: [x @ x for _ in range(100)][0], quick=lambda x: x @ x)
    assert ways.choose((), lambda way: way(x)) is ways.ways['quick']
    assert_equal([ways(x)], [x @ x])


@pytest.mark.parametrize('off', ['static', 'deterministic'])
def test_the_first_without_a_measurement(times, off):
    """``fast='static'`` and deterministic algorithms take the first way, whatever was chosen before."""
    seconds, taken = times
    seconds['second'] = 0.1
    ways = Ways('test', first=identity, second=same)
    run = lambda way: way(torch.ones(1))  # noqa: E731
    assert ways.choose((1,), run) is same
    count = len(taken)
    if off == 'static':
        PeftBackbone(HOSTS['mmdet-swin'], fast='static')
    else:
        torch.use_deterministic_algorithms(True)
    try:
        assert ways.choose((1,), run) is identity
        assert ways.choose((2,), run) is identity
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(taken) == count


def test_ways_that_fail(times):
    """A way that raises a RuntimeError, such as one for want of memory, is not taken; if all do, the first raises."""
    seconds, _ = times
    seconds['first'] = 0.1

    def fails(x):
        raise torch.OutOfMemoryError('too much')

    assert Ways('test', first=fails, second=same).choose((), lambda way: way(1)) is same
    all_fail = Ways('fail', first=fails, second=fails)
    with pytest.raises(torch.OutOfMemoryError):
        all_fail(1)


def test_random_numbers_are_not_used_up(times):
    """Dropout in a trial leaves the random numbers of the run as they were."""
    ways = Ways('test', first=nn.Dropout(0.5), second=nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = ways.ways['first'](torch.ones(9))
    torch.manual_seed(0)
    assert_equal([ways(torch.ones(9))], [expected])


def test_choices_within_a_way(times):
    """The first call of a way that itself chooses takes long, and is not held against it."""
    seconds, _ = times
    inner = Ways('inner', one=identity, two=same)
    outer = Ways('outer', first=lambda x: inner(x), second=same)
    seconds.update(second=1.5)
    assert outer.choose((), lambda way: way(torch.ones(1))) is outer.ways['first']
    assert {key for key, *_ in choice.chosen()} == {'inner', 'outer'}


def test_checkpoint(times):
    """Choices survive ``torch.save``, are read with ``weights_only``, and hold in place of those of the process."""
    seconds, taken = times
    seconds['second'] = 0.1
    ways = Ways('test', first=identity, second=same)
    run = lambda way: way(torch.ones(1))  # noqa: E731
    ways.choose((torch.float32, 3, True, 'cpu'), run)
    file = io.BytesIO()
    torch.save(choice.chosen(), file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    seconds['second'] = 2.0
    choice.restore([])
    assert ways.choose((torch.float32, 3, True, 'cpu'), run) is identity
    choice.restore(kept)
    count = len(taken)
    assert ways.choose((torch.float32, 3, True, 'cpu'), run) is same
    assert len(taken) == count
    choice.restore([[*kept[0][:-1], 'a way of another version']])
    assert ways.choose((torch.float32, 3, True, 'cpu'), run) is identity


def test_threads_measure_once(times):
    """Threads that meet a new shape together measure it once, and agree."""
    _, taken = times
    ways = Ways('test', first=identity, second=same)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ways.choose((), lambda way: way(torch.ones(1))))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [identity] * 8
    assert taken.count('first') == 1 + choice._ROUNDS


def test_a_thread_that_is_waited_for_does_not_wait(times, monkeypatch):
    """A backward pass on a GPU runs in a thread of its device, for which the one that measures waits."""
    monkeypatch.setattr(choice, '_PATIENCE', 0.05)
    inner = Ways('inner', one=identity, two=same)

    def in_another_thread(x):
        thread = threading.Thread(target=inner, args=(x,))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return x

    assert Ways('outer', first=in_another_thread, second=same).choose((), lambda way: way(torch.ones(1)))
    assert {key for key, *_ in choice.chosen()} == {'outer'}


SHAPES = [(130, 24, 16), (1, 8, 4), (2500, 8, 24)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', ['linear', 'linear_transposed', 'over_tokens'])
def test_products(name, shape):
    """Every way of a product equals the product in double precision."""
    torch.manual_seed(0)
    rows, width, out = shape
    x, weight, bias, y = torch.randn(rows, width), torch.randn(out, width), torch.randn(out), torch.randn(rows, out)
    if name == 'linear_transposed':
        weight = weight.t().contiguous().t()
    for function in named(name).ways.values():
        if name == 'over_tokens':
            assert_near([function(x, y)], [(x.double().t() @ y.double()).float()], 1e-5)
        else:
            for b in (bias, None):
                expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double()).float()
                assert_near([function(x, weight, b)], [expected], 1e-5)


def named(name: str) -> Ways:
    """The ways of the package by name."""
    return next(ways for ways in all_ways() if ways.name == name)


def test_depthwise_gradient():
    """Every way equals autograd in double precision, at heights that are no multiple of a strip."""
    torch.manual_seed(0)
    for batch, n, h, w, size in ((2, 6, 37, 5, 7), (1, 3, 8, 8, 3), (1, 4, 1, 2, 5)):
        grid, grad = torch.randn(batch, n, h, w), torch.randn(batch, n, h, w)
        kernel = torch.zeros(n, 1, size, size, dtype=torch.float64, requires_grad=True)
        nn.functional.conv2d(grid.double(), kernel, padding=size // 2, groups=n).backward(grad.double())
        for function in depthwise._GRADIENT.ways.values():
            assert_near([function(grad, grid, size)], [kernel.grad.float()], 1e-5)


def test_sparse_gradient(times):
    """Every way of single weights' gradients equals the whole product in double precision, and the fastest is taken."""
    torch.manual_seed(0)
    grad, x, indices = torch.randn(60, 8), torch.randn(60, 12), torch.tensor([0, 3, 40, 95])
    expected = (grad.double().t() @ x.double()).flatten()[indices].float()
    for ways in (sparse._ON_CPU, sparse._ELSEWHERE):
        for function in ways.ways.values():
            assert_near([function(grad, x, indices)], [expected], 1e-5)
    seconds, _ = times
    seconds['dense'] = 0.1
    assert_near([sparse.sparse_weight_grad(grad, x, indices)], [expected], 1e-5)
    assert choice.chosen()[-1][-1] == 'dense'


def swin_attention(trains: bool) -> nn.Module:
    from mmdet.models.backbones.swin import ShiftWindowMSA

    torch.manual_seed(0)
    module = ShiftWindowMSA(24, 2, 7, shift_size=3).requires_grad_(trains)
    nn.init.normal_(module.w_msa.relative_position_bias_table)
    make_fast(module)
    return module


def frozen_ffn() -> nn.Module:
    torch.manual_seed(0)
    module = FFN(24, 96, act_cfg=dict(type='GELU')).requires_grad_(False)
    make_fast(module)
    return module


def exact_mona() -> nn.Module:
    """A Mona whose forms draw the same dropout masks."""
    module = Mona(24, bottleneck=8)
    module.fast = 'exact'
    return module


# The module, its arguments beside the tokens, and the names of the ways of each of its forms.
BLOCKS = {
    'mona': (exact_mona, ((10, 17),), [['recomputed'], ['kept'], ['plain']]),
    'frozen_ffn': (frozen_ffn, (), [['recomputed'], ['stock']]),
    'attention': (lambda: swin_attention(False), ((10, 17),), [['fast', 'fused'], ['fast', 'plain'], ['stock']]),
    'trained attention': (lambda: swin_attention(True), ((10, 17),), [['fast', 'plain'], ['fast', 'fused'], ['stock']]),
}


@pytest.mark.parametrize('mode', ['training', 'no_grad', 'autocast'])
@pytest.mark.parametrize('name', BLOCKS)
def test_blocks(name, mode, times):
    """Each form of a block gives the same output and gradients, and finding the fastest leaves no trace: no gradient,
    no call of a hook of a parameter, the same random numbers."""
    seconds, _ = times
    build, arguments, forms = BLOCKS[name]
    results = []
    for form in forms:
        choice.restore([])
        seconds.clear()
        seconds.update(dict.fromkeys(form, 0.1))
        torch.manual_seed(0)
        module, calls = build().train(), []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(calls.append)
        torch.manual_seed(1)
        x = torch.randn(2, 170, 24, requires_grad=True)
        cotangent = torch.randn(2, 170, 24)
        torch.manual_seed(2)
        with torch.set_grad_enabled(mode != 'no_grad'), torch.autocast('cpu', enabled=mode == 'autocast'):
            out = module(x, *arguments)
            assert not calls and x.grad is None and all(p.grad is None for p in module.parameters())
        if mode != 'no_grad':
            out.backward(cotangent.to(out.dtype))
            trained = [p for p in module.parameters() if p.requires_grad]
            assert len(calls) == len(trained)
            out = [out.detach(), x.grad, *(p.grad for p in trained)]
        results.append(out if isinstance(out, list) else [out])
        chosen = {way for *_, way in choice.chosen()}
        assert chosen >= {*form}, chosen
    for result in results[1:]:
        assert_near(result, results[0], 1e-5 if mode != 'autocast' else 0.05)


@pytest.mark.parametrize(
    ('method', 'host'),
    pairwise(
        dict(Mona='Mona', Adapter='Adapter', none=None),
        HOSTS,
        common=lambda method, host: (
            host in ('mmdet-swin', 'mmpretrain-vit')
            or (method == 'Mona' and host in ('mmpretrain-swinv2', 'mmpretrain-convnext', 'mmdet-pvtv2'))
        ),
    ),
)
def test_a_backbone_with_measured_choices(method, host):
    """Whatever is fastest here, a training step equals that of the fixed choices within rounding; in `make test` on a
    host of every kind."""

    def build():
        torch.manual_seed(0)
        return PeftBackbone(host, method and dict(type=method, bottleneck=8), fast='exact').train()

    static = step_of(build(), (64, 64), 1)
    choice.measure(True)
    assert_near(step_of(build(), (64, 64), 1), static, 2e-5, least=1e-3)


def test_a_resumed_run_takes_the_same(times, make_runner):
    """What a checkpoint names holds in the run that resumes from it, which ends with the same bits though it would
    find something else to be fastest."""
    seconds, _ = times
    hooks = [dict(type='mona_mm.ResumptionHook'), dict(type='mona_mm.IterationSeedHook')]
    seconds['plain'] = 0.1
    loader = DataLoader(Images(), batch_size=2)
    runner = make_runner(mona_swin(), hooks, epochs=2, train_dataloader=loader)
    runner.train()
    straight = state(runner.model)
    assert {key: way for key, *_, way in choice.chosen()}['mona_small'] == 'plain'
    choice.restore([])
    seconds['plain'] = 2.0
    last = dict(resume=True, load_from=f'{runner.work_dir}/epoch_1.pth')
    resumed = make_runner(mona_swin(), hooks, epochs=2, train_dataloader=loader, **last)
    resumed.train()
    assert {key: way for key, *_, way in choice.chosen()}['mona_small'] == 'plain'
    assert_equal(state(resumed.model), straight)


def test_in_a_checkpointed_backbone():
    """What activation checkpointing keeps and counts is the forward's alone, though a first call measures and the
    recomputation does not."""

    def build():
        torch.manual_seed(0)
        return PeftBackbone(
            dict(HOSTS['mmdet-swin'], with_cp=True), dict(type='Mona', bottleneck=8), fast='exact'
        ).train()

    static = step_of(build(), (64, 64), 1)
    choice.measure(True)
    assert_near(step_of(build(), (64, 64), 1), static, 2e-5, least=1e-3)
    assert choice.chosen()


@pytest.mark.parametrize(
    'entry', ['text', 3, None, {'a': 1}, [], [[]], [['name', 1.5, 'way']], [['name', [1], 'way']], [['name', 'way'], 7]]
)
def test_what_a_checkpoint_may_hold(entry):
    """Whatever stands in a checkpoint in place of choices is left out, and what is right beside it is taken."""
    choice.restore(entry)
    assert choice.chosen() == ([['name', 'way']] if entry == [['name', 'way'], 7] else [])
    choice.restore([['name', 'torch.float32', 'torch.load', 'way']])
    assert [*choice._chosen] == [('name', torch.float32, 'torch.load')]
