"""Random configs, right and wrong: python tests/random_configs.py --count 1600 [--seed 0]

Each is a host, a method and options of any type, or a hook, schedule, optimizer constructor or data set of mona_mm with
options of any type. It has to be built and then to work; or be refused by one of our errors; or fail with the error
with which the stock module fails that is built with the same options. Anything else is printed with its config.
"""

import argparse
import copy
import inspect
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import HOSTS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS
from torch import nn

from mona_mm.checkpoint.described_methods import describe_methods
from mona_mm.errors import UserError
from mona_mm.hosts import recomputed_names
from mona_mm.methods import LoRA, Mona
from mona_mm.options import show
from mona_mm.registry import METHODS
from mona_mm.spt import SPT

BUILT, REFUSED, STOCK, FAILED = 'built', 'refused by our error', 'failed as the stock module does', 'failed otherwise'
SIDE = 64  # of the images, in pixels

# Made anew for every use: some are changed by what they are given to.
ANYTHING: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (None, True, False, 0, 1, -1, 3, 8, 2**31, 10**9, 10**30, -(10**30), 10**400, 10**5000)),
    *(lambda v=v: v for v in (0.5, 1.0, 8.0, -0.5, 1e-300, 1e308, float('nan'), float('inf'), float('-inf'))),
    *(lambda v=v: v for v in ('', 'x', '8', 'None', 'Mona', '.', 'a.b', 'mona_mm.', '\0', 'x' * 10000, b'x')),
    *(lambda v=v: copy.deepcopy(v) for v in ([], [3, 5], ['down'], [None], [[1]], (3, 4.5), (True,), [10**30, 3])),
    *(lambda v=v: copy.deepcopy(v) for v in ({}, {'a': 1}, {1: 2}, {'type': 'Mona'}, {'type': ''}, {'a': {'b': [1]}})),
    *(lambda v=v: v for v in (np.int64(8), np.float32(0.5), np.float64('nan'), np.bool_(True), np.str_('q'))),
    *(lambda v=v: v for v in (set(), range(3), range(3, 8, 2), object(), object, print, Mona, nn.Linear, 1j)),
    lambda: np.array([1, 2]),
    lambda: torch.tensor(3),
    lambda: torch.ones(2, requires_grad=True),
]
# What is right, at least on some host.
RIGHT: dict[str, list[Any]] = dict(
    bottleneck=[1, 4, 8],
    rank=[1, 4, 8],
    inner=[1, 4],
    branches=[1, 3],
    dropout=[0, 0.0, 0.1],
    drop_path=[0.0, 0.1],
    alpha=[1, 8.0],
    beta=[5.0],
    scale=[0.1, 2, -1.0],
    kernel_sizes=[(3,), [3, 5], (1, 9)],
    kernel_size=[3, 7],
    scaled_norm=[(), ['down'], ('down', 'pointwise')],
    average=[True, False],
    init=['zero', 'trunc_normal'],
    sites=['q', ['q', 'v'], ('fc1',), ['post_ffn'], ['ffn_branch', 'attn_branch'], ['parallel_ffn']],
    structured=[None, dict(type='LoRA'), dict(type='Mona', bottleneck=4), dict(type='Adapter', init='trunc_normal')],
    plan=[
        {},
        {'stages.0.blocks.0': ['q', 'fc1']},
        {'layers.1': ['fc2']},
        {'stages.1.0': ['post_ffn']},
        '/no/such/file',
    ],
    trainable=['none', 'all', 'bias', ['norm', 'bias'], 'last_block', 'stages.1'],
    fast=[True, False],
    compile=[False, {}],
    cache_features=[None, 1, 0.5],
    frozen_dtype=[None, 'bfloat16', 'float16'],
    budget=['0.5%', 1000],
    num_batches=[16],
    per_sample=[True],
    rule=['budget', 'published'],
    parts=[None, ['method']],
    half=[True, False],
    other_classes=[True, False],
    warmup=[0, 2, 1.5],
    start_ratio=[0.1],
    end_ratio=[0, 1e-3],
    begin=[0, 1],
    end=[10],
    by_epoch=[True, False],
    interval=[1],
    paramwise_cfg=[None, dict(norm_decay_mult=0.0), dict(custom_keys=dict(weight=dict(lr_mult=0.1)))],
)
# Of the bases, whose sizes stock code takes as they are: nothing here that asks for much memory or time.
BASE_WRONG = [None, True, 0, -1, 1.5, 'x', [], [3], {}, {'a': 1}, float('nan'), np.int64(2), torch.tensor(3)]


@dataclass
class Case:
    """One config.

    Args:
        config: what is printed.
        build: builds it.
        stock: builds the stock module that fails alike.
        is_backbone: whether what is built is to compute.
    """

    config: dict[str, Any]
    build: Callable[[], Any]
    stock: Callable[[], Any]
    is_backbone: bool = False


def cases(count: int, seed: int) -> Iterator[Case]:
    """The first ``count`` random configs of a seed."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        kind = rng.choice(['backbone'] * 12 + ['frozen', 'hook', 'hook', 'schedule', 'optimizer', 'data'])
        yield globals()[f'_{kind}'](rng)


BLOCKS = ['last 1', '1:', ':-1', [0, -1], 'layers.1', ['stages.{0,1}', 'layers.*'], 'last 9', '9:', '*.1', '::2']
PATTERNS = ['stages', 'stages.0', 'layers.*', '*.1', '*', 'default', '', 'x', 3]


def choices(count: int, seed: int) -> Iterator[Case]:
    """The first ``count`` random backbones of a seed with methods in some blocks, of several widths, in company."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        methods = [_choosy(rng) for _ in range(rng.integers(1, 4))]
        peft = methods[0] if len(methods) == 1 else methods
        base = copy.deepcopy(HOSTS[_pick(rng, sorted(HOSTS))])
        yield _model_case(dict(type='mona_mm.PeftBackbone', base=base, peft=peft))


def _choosy(rng: np.random.Generator) -> Any:
    name = _pick(rng, ['Mona', 'LoRA', 'Adapter', 'AdaptFormer', 'LoRand', 'SPT'])
    if name == 'SPT':
        peft = dict(type='SPT', structured=dict(type='LoRA', rank=2), plan=_pick(rng, RIGHT['plan']))
    else:
        width = dict(LoRA='rank', LoRand='inner').get(name, 'bottleneck')
        peft = {'type': name, width: {_pick(rng, PATTERNS[:-3]): 4, 'default': 2} if rng.random() < 0.6 else 4}
        if rng.random() < 0.1:
            peft[width] = {_pick(rng, PATTERNS): _value(rng, 'rank') for _ in range(2)}
    if rng.random() < 0.5 and name != 'SPT' or rng.random() < 0.1:
        peft['blocks'] = _pick(rng, BLOCKS) if rng.random() < 0.9 else _pick(rng, ANYTHING)()
    if rng.random() < 0.1:
        peft['name'] = _pick(rng, ['a', 'Mona', *(value() for value in ANYTHING)])
    return peft


def _pick(rng: np.random.Generator, values: list) -> Any:
    return values[rng.integers(len(values))]


def _value(rng: np.random.Generator, name: str, wrong: float = 0.3) -> Any:
    if name in RIGHT and rng.random() >= wrong:
        return copy.deepcopy(_pick(rng, RIGHT[name]))
    return _pick(rng, ANYTHING)()


def _options(rng: np.random.Generator, names: list[str], wrong: float = 0.3) -> dict[Any, Any]:
    options = {name: _value(rng, name, wrong) for name in names if rng.random() < 0.4}
    if rng.random() < 0.04:
        options[_pick(rng, ['bottelneck', 'x', '', 'self', 'channels', 'site', 'type_'])] = 1
    return options


def _peft(rng: np.random.Generator) -> Any:
    draw = rng.random()
    if draw < 0.05:
        return _pick(rng, ANYTHING)()
    if draw < 0.1:
        return None
    name = _pick(rng, [*sorted(METHODS.module_dict), 'SPT'])
    method = METHODS.get(name)
    names = [n for n in inspect.signature(method).parameters if n not in ('channels', 'in_channels', 'out_channels')]
    options = _options(rng, [*names, 'sites'] if method is not SPT else names)
    if isinstance(options.get('structured'), dict) and rng.random() < 0.5:
        options['structured'] |= _options(rng, ['rank', 'bottleneck', 'dropout', 'drop_path', 'init', 'kernel_sizes'])
    type_ = _pick(rng, [name] * 6 + [f'mona_mm.{name}', f'mona_mm.methods.{name}', method])
    if rng.random() < 0.06:
        type_ = _pick(rng, ANYTHING)()
    return dict(type=type_, **options) if rng.random() < 0.98 else options


def _base(rng: np.random.Generator) -> Any:
    draw = rng.random()
    if draw < 0.04:
        return _pick(rng, ANYTHING)()
    base = copy.deepcopy(HOSTS[_pick(rng, sorted(HOSTS))])
    if draw < 0.08:
        base['type'] = _pick(rng, [*(value() for value in ANYTHING), 'mmdet.ResNet', 'mmengine.BaseModule', LoRA])
    elif draw < 0.16:
        base[_pick(rng, [*base, 'frozen_stages', 'with_cp', 'out_indices', 'nonsense', 'init_cfg'])] = _pick(
            rng, BASE_WRONG
        )
    elif draw < 0.3:
        base['drop_path_rate'] = 0.0  # as cache_features wants it
    return base


def _backbone(rng: np.random.Generator) -> Case:
    config = dict(type='mona_mm.PeftBackbone', base=_base(rng))
    if rng.random() < 0.85:
        config['peft'] = _peft(rng)
    names = ['trainable', 'fast', 'compile', 'cache_features', 'frozen_dtype']
    config |= _options(rng, names, 0.15) if rng.random() < 0.5 else {}
    if rng.random() < 0.01:
        del config['base']
    return _model_case(config)


def _frozen(rng: np.random.Generator) -> Case:
    base = copy.deepcopy(
        _pick(rng, [dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=2), _base(rng)])
    )
    config = dict(type='mona_mm.FrozenModel', base=base, **_options(rng, ['trainable'], 0.4))
    return _model_case(config, computes=False)


def _model_case(config: dict, computes: bool = True) -> Case:
    def stock() -> Any:
        return MODELS.build(copy.deepcopy(config.get('base')))

    return Case(config, lambda: MODELS.build(copy.deepcopy(config)), stock, computes)


def _hook(rng: np.random.Generator) -> Case:
    name, options = _pick(
        rng,
        [
            ('ParamFreezeHook', ['trainable']),
            ('LoadCheckHook', ['other_classes']),
            ('DeltaCheckpointHook', ['parts', 'half']),
            ('IterationSeedHook', []),
            ('SafeCheckpointHook', ['interval', 'by_epoch']),
        ],
    )
    config = _options(rng, options, 0.5)
    return Case(
        dict(type=f'mona_mm.{name}', **config),
        lambda: HOOKS.build(dict(type=f'mona_mm.{name}', **config)),
        lambda: HOOKS.build(dict(type='CheckpointHook', **config)) if name == 'SafeCheckpointHook' else None,
    )


def _schedule(rng: np.random.Generator) -> Case:
    required = ['warmup', 'start_ratio', 'end_ratio']
    own = {name: _value(rng, name, 0.1) for name in required} | _options(rng, required, 0.3)
    others = _options(rng, ['begin', 'end', 'by_epoch'], 0.2)

    def build(**config: Any) -> Any:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        scheduler = PARAM_SCHEDULERS.build(dict(optimizer=optimizer, **config))
        for _ in range(3):
            optimizer.step()
            scheduler.step()

    return Case(
        dict(type='mona_mm.WarmupCosineLR', **own, **others),
        lambda: build(type='mona_mm.WarmupCosineLR', **{**own, **others}),
        lambda: build(type='CosineAnnealingLR', T_max=10, **others),
    )


def _optimizer(rng: np.random.Generator) -> Case:
    config = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1), **_options(rng, ['paramwise_cfg'], 0.6))
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))

    def stock() -> Any:
        return build_optim_wrapper(model, copy.deepcopy(config))

    def build() -> Any:
        return build_optim_wrapper(
            model, dict(copy.deepcopy(config), constructor='mona_mm.PeftOptimWrapperConstructor')
        )

    return Case(config, build, stock)


def _data(rng: np.random.Generator) -> Case:
    content = _pick(
        rng, ['', '[', '[' * 100000, '{}', '[1]', '3', 'null', '{"a.jpg": 1}', '{"a.jpg": [1]}', '{"a": null}']
    )
    if rng.random() < 0.3:
        content = json.dumps({'a.jpg': _pick(rng, [1, 'x', 1.5, True, None, [], {}]), 'b.jpg': 2})
    options = {name: _pick(rng, ANYTHING)() for name in ('data_prefix', 'metainfo') if rng.random() < 0.2}

    def build(type_: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'train.json')
            file.write_text(content)
            return DATASETS.build(dict(type=type_, ann_file=str(file), pipeline=[], **options))

    return Case(
        dict(type='mona_mm.FGVCJson', content=content, **options),
        lambda: build('mona_mm.FGVCJson'),
        lambda: build('mmpretrain.CustomDataset'),
    )


def outcome(case: Case) -> tuple[str, str]:
    """What became of a case, and of a failure what to print."""
    step = 'building'
    try:
        built = case.build()
        if case.is_backbone:
            step = 'using'
            _use(built, case)
        if isinstance(built, nn.Module):
            json.dumps(describe_methods(built))
        return BUILT, ''
    except Exception as error:
        if isinstance(error, UserError) and step == 'building':
            return REFUSED, ''
        if isinstance(error, UserError) and error.__cause__ is not None:  # it says how the stock module failed
            error = error.__cause__
        try:
            stock = case.stock()
            if step == 'using':
                _train(stock)
        except Exception as stocks:
            if type(stocks) is type(error):
                return STOCK, ''
        return (
            FAILED,
            f'{show(case.config)}\n{case.config if len(str(case.config)) < 4000 else ""}\n{traceback.format_exc()}',
        )


def _train(backbone: nn.Module) -> None:
    """A step of training."""
    backbone._dump_init_info = lambda *_: None  # mmengine's report of four lines a parameter
    backbone.init_weights()
    del backbone._dump_init_info
    backbone.train()
    total = sum(out.float().square().mean() for out in backbone(torch.rand(2, 3, SIDE, SIDE)))
    if total.requires_grad:
        total.backward()


def _use(backbone: nn.Module, case: Case) -> None:
    """A step of training, and a state dict that makes another one equal."""
    _train(backbone)
    other = case.build()
    wrong = other.load_state_dict(backbone.state_dict(), strict=False)  # SwinV2 leaves out what it recomputes
    assert all(name.endswith(recomputed_names()) for name in wrong.missing_keys) and not wrong.unexpected_keys, wrong
    images = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        for a, b in zip(backbone.eval()(images), other.eval()(images), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def main() -> None:
    parser = argparse.ArgumentParser(description='Build random configs and count what becomes of them')
    parser.add_argument('--count', type=int, default=1600)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    counts, start = Counter(), time.time()
    for number, case in enumerate(cases(args.count, args.seed)):
        torch.manual_seed(number)
        result, message = outcome(case)
        counts[result] += 1
        if message:
            print(f'--- config {number} of seed {args.seed}: {message}', flush=True)
    print(f'{args.count} configs of seed {args.seed} in {time.time() - start:.0f} s:')
    for result in (BUILT, REFUSED, STOCK, FAILED):
        print(f'  {counts[result]:5} {result}')
    sys.exit(counts[FAILED] > 0)


if __name__ == '__main__':
    main()
