"""Every method on every host: what injecting promises, whatever is injected."""

import importlib
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import HOSTS, needs_gpu
from helpers import assert_equal, assert_near, pairwise
from mmengine.registry import MODELS
from suite import (
    CLONES,
    METHOD_CONFIGS,
    PRECISIONS,
    SIZES,
    STARTS,
    check_copies,
    check_everything,
    check_gradients,
    check_names,
    check_round_trip,
    check_size,
    check_start,
    freeze_alike,
    images,
    is_common,
    is_common_in,
    load,
    outputs,
    supports,
    trains_in_mixed_precision,
)

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError, UnknownOptionError, UnsupportedHostError
from mona_mm.frozen.rules import check_trainable
from mona_mm.hosts import HOSTS as SUPPORTED
from mona_mm.hosts import LINEAR_SITES, STREAM_SITES, find_host, method_modules, method_names, register_host
from mona_mm.methods import LinearModule, StreamModule, build_method
from mona_mm.record import record_of
from mona_mm.registry import METHODS


def pytest_generate_tests(metafunc):
    """Every method on every host that it supports; where there is a third option, every pair of the three. `make test`
    has the pairs of suite.COMMON, fewer of them where blocks are computed again or in half precision, and `make
    test-all` has all."""
    options = dict(clone=CLONES, size=SIZES, start=STARTS, dtype=list(PRECISIONS))
    if 'method' in metafunc.fixturenames:
        third = [name for name in options if name in metafunc.fixturenames]
        hosts, common = HOSTS, is_common_in if third == ['dtype'] else is_common
        if 'checkpointing' in metafunc.function.__name__:  # ViT and PVTv2 have no `with_cp`
            hosts = {name: host for name, host in HOSTS.items() if 'Vision' not in host['type']}
            common = is_common_with_checkpointing
        rows = pairwise(
            hosts,
            METHOD_CONFIGS,
            *map(options.get, third),
            possible=lambda host, method, *_: supports(host, method),
            common=lambda host, method, *rest: common(host, method, *(rest if third == ['dtype'] else ())),
        )
        metafunc.parametrize(('host', 'method', *third), rows)


def is_common_with_checkpointing(host: str, method: str) -> bool:
    """On the first host only what is not like another method there, or on another host, in what a block keeps."""
    like_others = ('mona-design-2', 'adaptformer', 'lorand', 'lora', 'lora-ffn', 'dora', 'adapter-plus')
    return is_common(host, method) and not (host == 'mmdet-swin' and method in like_others)


@pytest.fixture
def adapted(host, method):
    return PeftBackbone(base=host, peft=method)


class EverySite(StreamModule):
    """Does nothing, everywhere: shows that the seams themselves change nothing."""

    sites = tuple(site for site in STREAM_SITES if site != 'parallel_ffn')

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.offset)

    def forward(self, x, hw):
        assert x.shape[1] - hw[0] * hw[1] in (0, 1)
        return x


class BesideFFN(EverySite):
    sites = ('parallel_ffn',)

    def forward(self, x, hw):
        return torch.zeros_like(x)


class EveryLinear(LinearModule):
    """Adds zeros, everywhere, and looks at what it stands beside."""

    sites = LINEAR_SITES
    is_weight_delta = True

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.offset = torch.nn.Parameter(torch.zeros(out_channels))

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.offset)

    def forward(self, x, out, linear):
        assert out.shape == (*x.shape[:-1], len(self.offset))
        assert linear.weight.shape == (len(self.offset), self.in_channels)
        assert_near(torch.nn.functional.linear(x, linear.weight, linear.bias), out)
        return self.offset.expand(*x.shape[:-1], -1)

    def delta_weight(self, weight):
        return torch.zeros_like(weight)


@pytest.fixture
def every_site():
    """Configs of the methods above, by what they occupy."""
    classes = {'stream-sites': EverySite, 'beside-ffn': BesideFFN, 'linear-sites': EveryLinear}
    for cls in classes.values():
        METHODS.register_module(module=cls)
    yield {kind: dict(type=cls.__name__) for kind, cls in classes.items()}
    for cls in classes.values():
        METHODS.module_dict.pop(cls.__name__)


@pytest.mark.parametrize(
    ('host', 'seams', 'training'),
    pairwise(HOSTS, ('no-method', 'stream-sites', 'beside-ffn', 'linear-sites'), dict(eval=False, train=True)),
)
def test_stock_outputs_bit_for_bit(host, seams, training, every_site):
    """A stock checkpoint loads strictly and gives the stock outputs; seams without a method change no bit."""
    stock = MODELS.build(host)
    stock.init_weights()
    wrapped = PeftBackbone(base=host, peft=every_site.get(seams), fast=False)
    assert (method_names(wrapped) == set()) == (seams == 'no-method')
    assert load(wrapped, stock.state_dict()) == method_names(wrapped)
    freeze_alike(stock, wrapped)
    stock.train(training)
    wrapped.train(training)
    x = images()
    expected = outputs(stock, x, seed=1)
    assert_equal(outputs(wrapped, x, seed=1), expected)
    if training:
        assert any((a != b).any() for a, b in zip(outputs(stock, x, seed=2), expected, strict=True)), 'no DropPath?'


def test_seams_keep_gradients(host, every_site):
    """The input gradient through the seams is the stock one, bit for bit."""
    stock = MODELS.build(host)
    stock.init_weights()
    wrapped = PeftBackbone(base=host, peft=every_site['stream-sites'], fast=False)
    load(wrapped, stock.state_dict())
    freeze_alike(stock, wrapped)
    gradients = []
    for model in (stock, wrapped):
        model.eval()
        torch.manual_seed(3)
        x = images().requires_grad_()
        sum(out.square().sum() for out in model(x)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_names(host, method):
    check_names(host, method)


def test_round_trip(host, method):
    check_round_trip(host, method)


def test_copies(adapted, clone):
    check_copies(adapted, clone)


def test_any_image_size(adapted, size):
    check_size(adapted, size)


def test_start(host, method, start, tmp_path):
    check_start(host, method, start, tmp_path)


def test_gradients_only_where_they_belong(adapted):
    check_gradients(adapted)


def test_activation_checkpointing_is_equal(host, method):
    """`with_cp=True` gives the same outputs and gradients in train mode, dropout and DropPath included."""
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = PeftBackbone(base=dict(host, with_cp=with_cp), peft=method)
        model.init_weights()
        model.train()
        torch.manual_seed(1)
        x = images()
        runs = []
        for block in find_host(model).blocks(model).values():
            norm = block.norm1 if hasattr(block, 'norm1') else block.norm
            norm.register_forward_hook(lambda m, args, out, runs=runs: runs.append(m))
        out = outputs(model, x, seed=2)
        sum(o.square().sum() for o in out).backward()
        tuned = [bool(len(block.peft)) for block in find_host(model).blocks(model).values()]
        again = len(tuned) - tuned.index(True) if with_cp else 0
        assert len(runs) == len(tuned) + again, 'blocks are computed again in the backward from the first tuned one on'
        results.append((out, [p.grad for p in model.parameters() if p.requires_grad]))
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


ON_DEVICES = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])


@ON_DEVICES
def test_mixed_precision(host, method, dtype, device):
    """Every method trains under autocast, as :func:`trains_in_mixed_precision` says."""
    trains_in_mixed_precision(host, dict(peft=method), dtype, device)


@ON_DEVICES
@pytest.mark.parametrize(
    ('host', 'rule', 'dtype'),
    pairwise(
        HOSTS,
        ('full', 'bitfit', 'norm_tuning', 'partial_1'),
        list(PRECISIONS),
        common=lambda host, rule, dtype: (
            (host == 'mmpretrain-vit' or (host in ('mmdet-swin', 'mmdet-pvtv2') and rule == 'bitfit'))
            and (dtype == 'torch.bfloat16' or rule == 'bitfit' and host == 'mmpretrain-vit')
        ),
    ),
)
def test_mixed_precision_of_the_methods_without_modules(host, rule, dtype, device):
    trains_in_mixed_precision(host, dict(trainable=rule), dtype, device)


@pytest.mark.parametrize(
    ('base', 'stages'),
    [
        (dict(HOSTS['mmdet-swin'], frozen_stages=1), 1),
        (dict(HOSTS['mmseg-swin'], frozen_stages=2), 2),
        (dict(HOSTS['mmpretrain-swin'], frozen_stages=0), 0),
        (dict(HOSTS['mmpretrain-vit'], frozen_stages=2), 2),
        (dict(type='mmpretrain.EfficientNet', arch='b0', frozen_stages=2), 2),
    ],
)
def test_frozen_stages_under_a_method_are_refused(base, stages):
    """The host would freeze the method's modules again at every `.train()`: refused, with the reason and the value that
    is taken instead."""
    with pytest.raises(ConfigError, match=rf'frozen_stages={stages} ') as refused:
        PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8))
    advised = int(re.search(r'set frozen_stages=(-?\d)', str(refused.value))[1])
    PeftBackbone(base=dict(base, frozen_stages=advised), peft=dict(type='Mona', bottleneck=8))
    without = PeftBackbone(base=base)  # without a method it is the host's own business, and is respected
    without.train()
    assert 0 < len(record_of(without).freeze.trainable) < len(list(without.parameters()))


@pytest.mark.parametrize(
    ('base', 'blocks', 'refused'),
    [
        (dict(HOSTS['mmdet-swin'], frozen_stages=1), 'stages.1', 'stages.0'),
        (dict(HOSTS['mmpretrain-vit'], frozen_stages=1), '1:', [0, -1]),
        (dict(type='mmdet.ResNet', depth=18, base_channels=8, frozen_stages=1), 'layer{2,3,4}', 'layer1'),
    ],
)
def test_a_method_behind_the_frozen_stages_is_accepted(base, blocks, refused):
    """`frozen_stages=1` is in most stock configs, and freezes nothing of a method in later blocks alone."""
    model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8, blocks=blocks))
    model.train()
    assert all(p.requires_grad for m in method_modules(model) for p in m.parameters())
    check_trainable(model)
    with pytest.raises(ConfigError, match='frozen_stages=1 in the base config: .* the Mona modules'):
        PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8, blocks=refused))


def test_frozen_patch_embedding_is_accepted():
    """mmdet's `frozen_stages=0` reaches no block, and is the published VOC setting."""
    model = PeftBackbone(base=dict(HOSTS['mmdet-swin'], frozen_stages=0), peft=dict(type='Mona'))
    model.train()
    assert all(p.requires_grad for m in method_modules(model) for p in m.parameters())


def test_unknown_hosts_are_refused():
    """A VGG is not known; DeiT3's layers have the names of ViT's and call one norm twice. Both are refused, the second
    with the reason, naming what is supported."""
    for base, named in (
        (dict(type='mmdet.SSDVGG', input_size=300, depth=16, out_indices=(3, 4)), 'SSDVGG'),
        (dict(type='mmpretrain.DeiT3', arch='small', img_size=32), 'DeiT3.*ln1'),
    ):
        with pytest.raises(
            UnsupportedHostError, match=rf'{named}.*mmdet: .*SwinTransformer.*register_host.*FrozenModel'
        ):
            PeftBackbone(base=base, peft=dict(type='Mona'))


def test_unknown_method_and_misspelt_argument():
    """Each error names the wrong thing and the accepted ones."""
    base = HOSTS['mmdet-swin']
    with pytest.raises(ConfigError, match="unknown method 'Monna'.*Mona"):
        PeftBackbone(base=base, peft=dict(type='Monna'))
    with pytest.raises(UnknownOptionError, match="no argument 'bottelneck'.*Did you mean 'bottleneck'"):
        PeftBackbone(base=base, peft=dict(type='Mona', bottelneck=8))
    with pytest.raises(ConfigError, match='bottleneck=0'):
        PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=0))
    with pytest.raises(ConfigError, match='base='):
        PeftBackbone(base='swin', peft=dict(type='Mona'))
    with pytest.raises(ConfigError, match="peft='Mona' must be a dict"):
        PeftBackbone(base=base, peft='Mona')
    with pytest.raises(ConfigError, match=r"Mona cannot attach at sites=\['q'\]; its sites are post_attn, "):
        PeftBackbone(base=base, peft=dict(type='Mona', sites=['q']))


def test_every_host_has_the_sites_that_are_documented(host):
    """All sites; on ConvNeXt, whose blocks have one branch without attention, those of the FFN."""
    everything = {*STREAM_SITES, *LINEAR_SITES}
    sites = set(find_host(MODELS.build(host)).sites)
    assert sites == ({s for s in everything if 'f' in s} if 'ConvNeXt' in host['type'] else everything)


def test_unsupported_pairs_are_refused():
    """No site at all, or one that was asked for: the error names the block and what it has. A method of several sites
    takes those that a host has."""
    convnext, swinv2 = HOSTS['mmpretrain-convnext'], HOSTS['mmpretrain-swinv2']
    with pytest.raises(ConfigError, match='LoRA cannot attach at q, v.* ConvNeXtBlock.*: fc1, fc2.'):
        PeftBackbone(base=convnext, peft=dict(type='LoRA', rank=4))
    with pytest.raises(ConfigError, match='Mona cannot attach at post_attn.* ConvNeXtBlock.*: post_ffn, ffn_branch'):
        PeftBackbone(base=convnext, peft=dict(type='Mona', bottleneck=8, sites=['post_attn', 'post_ffn']))
    with pytest.raises(ConfigError, match=r'q, v, since BasicBlock .*It has post_ffn: .*mona_mm\.PeftModel'):
        PeftBackbone(base=dict(type='mmdet.ResNet', depth=18), peft=dict(type='LoRA', rank=4))
    model = PeftBackbone(base=convnext, peft=dict(type='Mona', bottleneck=8))
    assert len(method_modules(model)) == 5
    with pytest.raises(ConfigError, match="SwinTransformerV2.* 'q' .*dropout=0.*: proj, fc1, fc2"):
        PeftBackbone(base=swinv2, peft=dict(type='LoRA', rank=4, dropout=0.1))


@pytest.mark.parametrize(
    ('peft', 'message'),
    [
        (dict(type='Mona', bottleneck=193), 'Mona: bottleneck=193 must be at most 192'),
        (dict(type='LoRA', rank=193), 'LoRA: rank=193 must be at most 192'),
        (dict(type='LoRA', rank=0), 'LoRA: rank=0 must be a whole number of at least 1'),
        (dict(type='LoRand', inner=193), 'LoRand: inner=193 must be at most'),
        (dict(type='LoRA', sites=['q', 'w']), r"LoRA cannot attach at sites=\['q', 'w'\]; its sites are q, k, v, proj"),
        (dict(type='LoRA', sites=['q', 'q']), 'each once'),
        (dict(type='LoRA', sites=5), 'cannot attach at sites=5'),
        (dict(type='LoRA', rank=True), 'rank=True must be a whole number'),
        (dict(type='LoRA', alpha='x'), "alpha='x' must be a number"),
        (dict(type='LoRA', dropout=None), 'dropout=None must be a probability'),
        (dict(type='AdaptFormer', scale='a'), "scale='a' must be a number"),
        (dict(type='Mona', average='yes'), "average='yes' must be True or False"),
        (dict(type='Mona', scaled_norm=None), 'scaled_norm=None must be a list'),
        (
            dict(type='Mona', kernel_sizes=[3, 4]),
            r'\[3, 4\] must be a list of different odd whole numbers',
        ),
        (dict(type='Mona', kernel_sizes=[]), 'kernel_sizes'),
        (dict(type='Mona', scaled_norm=['up']), r"scaled_norm=\['up'\] must be a list .* 'down' or 'pointwise'"),
    ],
)
def test_values_that_a_host_or_method_cannot_take(peft, message):
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)
    PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona', bottleneck=192))


ONE_OF_EACH_KIND = ('mmdet-swin', 'mmpretrain-vit', 'mmpretrain-convnext')


@pytest.mark.parametrize(
    'host',
    [pytest.param(HOSTS[name], id=name, marks=[pytest.mark.slow] * (name not in ONE_OF_EACH_KIND)) for name in HOSTS],
)
def test_a_new_method_is_one_small_file(host, tmp_path, monkeypatch):
    """Nothing but this file, with `custom_imports` or an import, makes a method, of which all is true that is promised
    of the package's own."""
    source = '''
import torch
from torch import Tensor, nn

from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS


@METHODS.register_module()
class ScaleShift(StreamModule):
    """SSF: ``x * scale + shift`` after every residual add."""

    sites = ('post_attn', 'post_ffn')

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels))
        self.shift = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        return x * self.scale + self.shift
'''
    assert source.count('\n') < 40
    (tmp_path / 'scale_shift.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module('scale_shift')
    try:
        check_everything(host, dict(type='ScaleShift'), tmp_path)
        with pytest.raises(UnknownOptionError, match='ScaleShift has no argument'):
            PeftBackbone(base=host, peft=dict(type='ScaleShift', bottleneck=8))
    finally:
        METHODS.module_dict.pop('ScaleShift')
        sys.modules.pop('scale_shift')


PLAIN_TRANSFORMER = """
import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from mona_mm.hosts import BlockSpec, Branch, GridArgument, Host, fused_qkv, register_host, separate_linears


class Attention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, channels, heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = Attention(channels, heads)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x, hw):
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))


@MODELS.register_module()
class PlainTransformer(BaseModule):
    def __init__(self, channels=32, depth=2, heads=2, drop_path_rate=0.0, out_indices=(1,), init_cfg=None):
        super().__init__(init_cfg)
        self.out_indices = out_indices
        self.patch_embed = nn.Conv2d(3, channels, 4, 4)
        self.layers = nn.ModuleList(Block(channels, heads, drop_path_rate) for _ in range(depth))

    def forward(self, x):
        height, width = (-side % 4 for side in x.shape[2:])
        x = self.patch_embed(nn.functional.pad(x, (0, width, 0, height)))
        hw = x.shape[2:]
        x, outs = x.flatten(2).transpose(1, 2), []
        for i, layer in enumerate(self.layers):
            x = layer(x, hw)
            if i in self.out_indices:
                outs.append(x.transpose(1, 2).unflatten(2, hw))
        return tuple(outs)


register_host(
    'plain_transformer.PlainTransformer',
    Host(
        specs=(
            BlockSpec(
                cls='plain_transformer.Block',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj', fc1='fc1', fc2='fc2')},
                branches=dict(attn=Branch('drop_path1'), ffn=Branch('drop_path2')),
                mid_norm='norm2',
                grid=GridArgument(('hw',)),
            ),
        ),
    ),
)
"""


@pytest.fixture
def plain_transformer(tmp_path, monkeypatch):
    """The config of a backbone that is in no library, whose class and declaration as a host are in one file."""
    (tmp_path / 'plain_transformer.py').write_text(PLAIN_TRANSFORMER)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module('plain_transformer')
    yield dict(type='PlainTransformer', drop_path_rate=0.3, out_indices=(0, 1))
    SUPPORTED.pop('plain_transformer.PlainTransformer', None)
    MODELS.module_dict.pop('PlainTransformer', None)
    sys.modules.pop('plain_transformer')


@pytest.mark.parametrize('name', ['mona', 'adapter', 'lora-everywhere'])
def test_a_new_host_is_one_declaration(plain_transformer, name, tmp_path):
    """Nothing but a declaration beside it makes a backbone a host, of which all is true that is promised of the
    package's own."""
    check_everything(plain_transformer, METHOD_CONFIGS[name], tmp_path)


@pytest.mark.parametrize('seams', ['no-method', 'stream-sites', 'beside-ffn', 'linear-sites'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_the_seams_of_a_new_host(plain_transformer, seams, training, every_site):
    test_stock_outputs_bit_for_bit(plain_transformer, seams, training, every_site)


def test_a_host_is_declared_once(plain_transformer):
    with pytest.raises(ConfigError, match=r'plain_transformer\.PlainTransformer'):
        register_host('plain_transformer.PlainTransformer', SUPPORTED['plain_transformer.PlainTransformer'])


def test_methods_that_read_the_grid_need_its_order(plain_transformer):
    """Where tokens are in another order than that of the grid's rows, a convolution would mix tokens that are no
    neighbours: it is refused with the reason, and what maps every token alone computes as elsewhere."""
    name = 'plain_transformer.PlainTransformer'
    alone = [dict(type='Adapter', bottleneck=4), dict(type='AdaptFormer', bottleneck=4), dict(type='LoRand', inner=2)]
    methods, found = [*alone, dict(type='LoRA', rank=2, sites=['q', 'fc1'])], []
    for row_major in (True, False):
        host = SUPPORTED.pop(name)
        register_host(name, replace(host, specs=(replace(host.specs[0], row_major=row_major),)))
        for peft in methods:
            torch.manual_seed(1)
            model = PeftBackbone(base=plain_transformer, peft=peft).eval()
            found.append(outputs(model, torch.ones(1, 3, 16, 16)))
    for ordered, unordered in zip(found[: len(methods)], found[len(methods) :], strict=True):
        assert_equal(unordered, ordered)
    for sites in (['post_attn', 'post_ffn'], ['ffn_out']):
        with pytest.raises(ConfigError, match='Mona reads the grid of the tokens, and Block of PlainTransformer has'):
            PeftBackbone(base=plain_transformer, peft=dict(type='Mona', bottleneck=4, sites=sites))


def test_second_method_is_refused(every_site):
    """One backbone carries one method."""
    from mona_mm.hosts import inject

    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona'))
    with pytest.raises(ConfigError, match='already carries'):
        inject(model, build_method(dict(type='LoRA')))


def test_subclasses_of_a_host():
    """A user's subclass with stock blocks is a host; one whose blocks are of a class of its own is refused."""
    from mmdet.models.backbones.swin import SwinBlock, SwinTransformer

    class MySwin(SwinTransformer):
        pass

    class MyBlock(SwinBlock):
        pass

    class OtherSwin(SwinTransformer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            for stage in self.stages:
                for block in stage.blocks:
                    block.__class__ = MyBlock

    arguments = {key: value for key, value in HOSTS['mmdet-swin'].items() if key != 'type'}
    model = PeftBackbone(base=dict(type=MySwin, **arguments), peft=dict(type='Mona'))
    assert len(method_modules(model)) == 10
    with pytest.raises(UnsupportedHostError, match='OtherSwin'):
        PeftBackbone(base=dict(type=OtherSwin, **arguments), peft=dict(type='Mona'))
