"""Whatever a config says, it is built and works, or is refused by our error, or fails as the stock module does."""

import json

import pytest
import torch
from conftest import HOSTS
from mmengine.registry import HOOKS
from random_configs import BUILT, FAILED, REFUSED, cases, choices, outcome
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.checkpoint.described_methods import describe_methods
from mona_mm.errors import ConfigError, UnknownOptionError, UserError
from mona_mm.methods import LoRand, Mona
from mona_mm.options import Count, check_options, checked, show

SWIN = HOSTS['mmdet-swin']


def test_random_configs():
    """A short run of the script, whose long runs are in docs/reliability.md."""
    failed = [message for result, message in map(outcome, cases(40, seed=11)) if result == FAILED]
    assert not failed, failed[0]


def test_random_choices():
    """Methods in some blocks, of several widths, several together."""
    results = list(map(outcome, choices(25, seed=2)))
    assert {result for result, _ in results} == {BUILT, REFUSED}, [m for _, m in results if m]


@pytest.mark.parametrize(
    ('peft', 'message'),
    [
        (dict(type=''), "unknown method ''"),
        (dict(type='a.b'), "unknown method 'a.b'"),
        (dict(type=print), 'unknown method <built-in'),
        (dict(type=8), 'unknown method 8'),
        ([3], r'peft=\[3\] must be a dict'),
        (dict(type='SPT', plan=[3, 5]), r'plan=\[3, 5\] must be'),
        (dict(type='SPT', plan={'a': 1}), r"plan=\{'a': 1\} must be"),
        (dict(type='SPT', plan={'a': ['q']}), 'no structured module'),
        (dict(type='SPT', plan={}, structured=dict(type='LoRA', rank=10**9)), None),
        (
            dict(type='SPT', plan={'stages.0.blocks.0': ['q']}, structured=dict(type='LoRA', rank=10**9)),
            'largest width',
        ),
        (dict(type='SPT', plan={}, structured=dict(type='LoRA', rank=True)), 'rank=True'),
        (dict(type='SPT', plan={}, structured={'type': 'LoRA', 3: 4}), 'must be a dict with names as keys'),
        (dict(type='LoRand', branches=10**30), 'branches=10{30} must be a whole number'),
        (dict(type='LoRand', branches=10**9), 'branches=10{9} must be at most'),
        (dict(type='LoRand', inner=192, branches=192), 'LoRand: .*more than 4 times as many parameters'),
        (dict(type='Mona', kernel_sizes=[10**9 + 1]), 'kernel_sizes='),
        (dict(type='Mona', kernel_sizes=[3, 5.0]), 'kernel_sizes='),
        (dict(type='Mona', kernel_sizes=3), 'kernel_sizes=3'),
        (dict(type='Mona', bottleneck=8.0), 'bottleneck=8.0'),
        (dict(type='Mona', bottleneck=None), 'bottleneck=None'),
        (dict(type='Mona', bottleneck=torch.tensor(8)), r'bottleneck=tensor\(8\)'),
        (dict(type='Mona', average=1), 'average=1 must be True or False'),
        (dict(type='Mona', scaled_norm='down'), "scaled_norm='down'"),
        (dict(type='Mona', dropout=float('nan')), 'dropout=nan must be a probability'),
        (dict(type='AdaptFormer', scale=10**400), 'scale=1.* must be a number'),
        (dict(type='AdaptFormer', scale=10**5000), 'scale=<int> must be a number'),
        (dict(type='LoRA', alpha=float('inf')), 'alpha=inf'),
        (dict(type='LoRA', init=['zero']), r"init=\['zero'\] must be 'zero', 'trunc_normal', 'principal' or 'minor'"),
        (dict(type='LoRA', sites=[['q']]), 'cannot attach at sites='),
        (dict(type='LoRA', sites={'q': 1}), 'cannot attach at sites='),
        ({'type': 'LoRA', 1: 2}, 'must be a dict with names as keys'),
    ],
)
def test_options_of_methods(peft, message):
    """What was a raw exception, or hours of allocating memory, is one line that names the option."""
    if message is None:
        PeftBackbone(base=SWIN, peft=peft)
        return
    with pytest.raises(UserError, match=message.replace('10{30}', '1' + 30 * '0').replace('10{9}', '1' + 9 * '0')):
        PeftBackbone(base=SWIN, peft=peft)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(base=[3]), r'base=\[3\] must be a dict'),
        (dict(base={}), r'base=\{\} must be the config of a stock module'),
        (dict(base=dict(type='')), "no module ''"),
        (dict(base=dict(type=5)), 'no module 5'),
        (dict(base=dict(type='.')), r"no module '\.'"),
        (dict(fast='yes'), "fast='yes' must be True or False"),
        (dict(fast=1), 'fast=1'),
        (dict(compile=3), 'compile=3'),
        (dict(compile=dict(nonsense=1)), r"compile=\{'nonsense': 1\}: torch.compile refuses"),
        (dict(compile={1: 2}), 'compile='),
        (dict(cache_features=True), 'cache_features=True'),
        (dict(cache_features=float('inf')), 'cache_features=inf'),
        (dict(frozen_dtype=torch.float16), 'frozen_dtype=torch.float16'),
        (dict(frozen_dtype=['bfloat16']), 'frozen_dtype='),
        (dict(trainable={'a': 1}), 'must be a rule or a list of rules'),
        (dict(trainabel='none'), "Did you mean 'trainable'"),
    ],
)
def test_options_of_the_backbone(options, message):
    with pytest.raises(UserError, match=message):
        PeftBackbone(**{'base': SWIN, **options})
    with pytest.raises(ConfigError, match='PeftBackbone: .*base'):
        PeftBackbone(peft=dict(type='Mona'))


@pytest.mark.parametrize(
    'hook',
    [
        dict(type='mona_mm.ParamFreezeHook', trainable=3),
        dict(type='mona_mm.ParamFreezeHook', trainable=[]),
        dict(type='mona_mm.LoadCheckHook', other_classes='no'),
        dict(type='mona_mm.DeltaCheckpointHook', parts='method'),
        dict(type='mona_mm.DeltaCheckpointHook', parts=[]),
        dict(type='mona_mm.DeltaCheckpointHook', half=1),
        dict(type='mona_mm.IterationSeedHook', seed=1),
    ],
)
def test_options_of_hooks(hook):
    with pytest.raises(UserError, match=hook['type'].partition('.')[2]):
        HOOKS.build(hook)


def test_kernels_and_branches_that_fit_stay():
    """The bounds refuse no method of the papers."""
    assert len(Mona(64, kernel_sizes=[1, 31, 101]).depthwise) == 3
    assert LoRand(64, branches=64).down.a.shape == (64, 64, 16)


@pytest.mark.parametrize('frozen_dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('cast', ['half', 'bfloat16', 'float', 'double'])
def test_cast_of_a_model_with_frozen_weights_in_half_precision(frozen_dtype, cast):
    """Whatever type a model is cast to later, it computes in it what it did before, within that type's rounding."""
    model = PeftBackbone(base=SWIN, peft=dict(type='Mona', bottleneck=8), frozen_dtype=frozen_dtype).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        getattr(model, cast)()
        given = x.to(next(model.parameters()).dtype)
        for out, before in zip(model(given), expected, strict=True):
            assert out.dtype == given.dtype
            torch.testing.assert_close(out.float(), before, rtol=0, atol=0.1 * float(before.abs().max()))


def test_what_a_delta_says_of_a_method_is_text():
    """A method given as a class, with tuples in its options, is recorded as by its name."""
    model = PeftBackbone(base=SWIN, peft=dict(type=Mona, bottleneck=8, kernel_sizes=(3, 5)))
    named = PeftBackbone(base=SWIN, peft=dict(type='mona_mm.methods.Mona', bottleneck=8, kernel_sizes=(3, 5)))
    assert json.dumps(describe_methods(model)) == json.dumps(describe_methods(named))
    assert describe_methods(model)['']['type'] == 'Mona'


def test_check_of_somebodys_function():
    """Annotations that the check does not know allow everything; defaults are always allowed."""

    class Module(nn.Module):
        @checked
        def __init__(self, width: Count, name: str = None, other: 'Unknown' = 3) -> None:  # noqa: F821
            super().__init__()

    assert isinstance(Module(3), nn.Module)

    @checked
    def function(width: Count, name: str = None, **more: int) -> int:
        return width

    assert function(3, name=None, anything=None) == 3
    with pytest.raises(ConfigError, match='function: width=0 must be a whole number of at least 1'):
        function(0)
    with pytest.raises(UnknownOptionError, match='f has no argument 3; it accepts width, name'):
        check_options('f', function, {3: 4})
    assert len(show('x' * 1000)) == 120
