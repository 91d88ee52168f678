"""Every method on every host: what injecting promises, whatever is injected."""

import copy
import importlib
import io
import math
import pickle
import sys

import pytest
import torch
from conftest import HOSTS, needs_gpu
from mmengine.registry import MODELS
from mmpretrain.models import ConvNeXt, VisionTransformer

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError, UnknownOptionError, UnsupportedHostError
from mona_mm.methods import PeftModule, build_method
from mona_mm.registry import METHODS
from mona_mm.sites import LINEAR_SITES, STREAM_SITES, find_host, method_modules, method_names
from mona_mm.spt.sparse import SparseDelta

METHOD_CONFIGS = {
    'mona': dict(type='Mona', bottleneck=8),
    'mona-design-2': dict(
        type='Mona', bottleneck=8, kernel_sizes=[3, 9], scaled_norm=['down', 'pointwise'], average=False
    ),
    'adapter': dict(type='Adapter', bottleneck=8),
    'adaptformer': dict(type='AdaptFormer', bottleneck=8),
    'lorand': dict(type='LoRand', inner=4),
    'lora': dict(type='LoRA', rank=4),
    'lora-everywhere': dict(type='LoRA', rank=4, sites=['q', 'k', 'v', 'proj', 'fc1', 'fc2']),
    'lora-ffn': dict(type='LoRA', rank=4, sites=['fc1', 'fc2']),
}
# ConvNeXt has no q, k, v, proj.
PAIRS = [
    pytest.param(dict(HOSTS[host]), dict(peft), id=f'{host}-{method}')
    for host in HOSTS
    for method, peft in METHOD_CONFIGS.items()
    if not ('convnext' in host and method in ('lora', 'lora-everywhere'))
]


def pytest_generate_tests(metafunc):
    """Every method on every host that it supports."""
    if 'method' in metafunc.fixturenames:
        pairs = PAIRS
        if 'checkpointing' in metafunc.function.__name__:  # ViT and PVTv2 have no `with_cp`
            pairs = [pair for pair in PAIRS if 'Vision' not in pair.values[0]['type']]
        metafunc.parametrize(('host', 'method'), pairs)


@pytest.fixture
def adapted(host, method):
    return PeftBackbone(base=host, peft=method)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)


def outputs(model, x, seed: int | None = None) -> list[torch.Tensor]:
    if seed is not None:
        torch.manual_seed(seed)
    return list(model(x))


def load(model, state_dict) -> set[str]:
    """Load a stock state dict and return what it did not hold, but for the buffers that SwinV2 always recomputes."""
    result = model.load_state_dict(state_dict, strict=False)
    assert not result.unexpected_keys
    return {name for name in result.missing_keys if not name.endswith(('position_index', 'coords_table'))}


def freeze_alike(stock, wrapped) -> None:
    """Frozen is frozen: a convolution of weights without gradients may be computed by another kernel."""
    frozen = {name for name, p in wrapped.named_parameters() if not p.requires_grad}
    for name, p in stock.named_parameters():
        p.requires_grad_(name not in frozen)


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class EverySite(PeftModule):
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


class EveryLinear(EverySite):
    sites = LINEAR_SITES
    is_weight_delta = True

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels)
        self.in_channels = in_channels

    def forward(self, x, out):
        assert out.shape == (*x.shape[:-1], len(self.offset))
        return self.offset.expand(*x.shape[:-1], -1)

    def delta_weight(self):
        return torch.zeros(len(self.offset), self.in_channels)


@pytest.fixture
def every_site():
    """Configs of the methods above, by what they occupy."""
    classes = {'stream-sites': EverySite, 'beside-ffn': BesideFFN, 'linear-sites': EveryLinear}
    for cls in classes.values():
        METHODS.register_module(module=cls)
    yield {kind: dict(type=cls.__name__) for kind, cls in classes.items()}
    for cls in classes.values():
        METHODS.module_dict.pop(cls.__name__)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('seams', ['no-method', 'stream-sites', 'beside-ffn', 'linear-sites'])
def test_stock_outputs_bit_for_bit(host, every_site, training, seams):
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
    assert_same(outputs(wrapped, x, seed=1), expected)
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


def test_base_keys_are_kept(host, method):
    """Injecting adds names with `.peft.` and changes no other; class and public attributes stay the stock ones."""
    stock = MODELS.build(host)
    adapted = PeftBackbone(base=host, peft=method)
    before, after = set(stock.state_dict()), set(adapted.state_dict())
    assert before < after
    assert all('.peft.' in name for name in after - before)
    assert after - before == method_names(adapted)
    assert type(adapted) is type(stock)


def test_gradients_only_where_they_belong(adapted):
    """Every parameter of the method gets a gradient, no other parameter does."""
    adapted.init_weights()
    adapted.train()
    sum(out.square().sum() for out in adapted(images())).backward()
    own = {f'{name}' for name in method_names(adapted)}
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    required = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert with_gradient == required == own


def test_state_dict_round_trip(host, method):
    """What one model saves, another of the same config loads strictly, and computes the same."""
    source, target = (PeftBackbone(base=host, peft=method) for _ in range(2))
    source.init_weights()
    source.eval()
    target.eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert not load(target, torch.load(file, weights_only=True))
    x = images()
    assert_same(outputs(source, x), outputs(target, x))


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_are_independent(adapted, clone):
    """A copy (EMA makes one) computes with its own weights and grid, and resets its own method."""
    adapted.init_weights()
    adapted.eval()
    x = images()
    expected = outputs(adapted, x)
    twin = clone(adapted)
    assert_same(outputs(twin, x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(outputs(twin, x)[0], expected[0])
    assert_same(outputs(adapted, x), expected)
    twin(torch.randn(1, 3, 96, 32))  # another grid in the copy
    twin.init_weights()
    reset = [m for m in method_modules(twin) if not isinstance(m, SparseDelta)]  # those begin at zero
    assert reset and all(any(p.abs().sum() > 0 for p in m.parameters()) for m in reset)
    assert_same(outputs(adapted, x), expected)


@pytest.mark.parametrize('size', [(64, 96), (96, 64), (50, 70)])
def test_any_image_size(adapted, size):
    """The grid is the image's, not the configuration's."""
    adapted.eval()
    seen = []
    for m in [m for m in method_modules(adapted) if isinstance(m, PeftModule)]:
        m.register_forward_pre_hook(lambda m, args: seen.append((args[0].shape[1], *args[1:])))
    for out in adapted(torch.randn(1, 3, *size)):
        assert out.isfinite().all()
    for tokens, hw in [call for call in seen if isinstance(call[1], tuple | torch.Size)][:1]:  # not at linear sites
        assert tokens - hw[0] * hw[1] in (0, 1)
        patch, rounded = find_patch(adapted)
        assert tuple(hw) == tuple(rounded(side / patch) for side in size)


def find_patch(model):
    """The stride of the first block's grid, and which way the stem rounds a size that it does not divide."""
    if isinstance(model, ConvNeXt):
        return 4, math.floor
    return (16 if isinstance(model, VisionTransformer) else 4), math.ceil


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
        blocks = len(find_host(model).blocks(model))
        assert len(runs) == (2 if with_cp else 1) * blocks, 'every block is computed again in the backward, or none is'
        results.append((out, [p.grad for p in model.parameters() if p.requires_grad]))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


# Largest distances from float32: of an output, and of any parameter's gradient. (measured) 0.024 and 0.13 in bfloat16,
# 0.003 and 0.011 in float16; a gradient that is lost, doubled or of the wrong sign is at 1.
PRECISIONS = {torch.bfloat16: (0.05, 0.25), torch.float16: (0.01, 0.05)}
ON_DEVICES = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
IN_HALF = pytest.mark.parametrize('dtype', PRECISIONS, ids=str)


@ON_DEVICES
@IN_HALF
def test_mixed_precision(host, method, dtype, device):
    """Every method trains under autocast, as :func:`trains_in_mixed_precision` says."""
    trains_in_mixed_precision(host, dict(peft=method), dtype, device)


@ON_DEVICES
@IN_HALF
@pytest.mark.parametrize('rule', ['full', 'bitfit', 'norm_tuning', 'partial_1'])
def test_mixed_precision_of_the_methods_without_modules(host, rule, dtype, device):
    trains_in_mixed_precision(host, dict(trainable=rule), dtype, device)


def trains_in_mixed_precision(host, tuning, dtype, device='cpu') -> None:
    """Outputs and gradients under autocast are near those in float32, gradients of parameters are in float32, and a
    scaled step in train mode moves all that trains, which stays in float32, and nothing else."""
    size = 64
    if 'V2' in host['type'] and 'Swin' in host['type'] and dtype == torch.float16:
        # The stock attention divides a padded token's key, zero, by its length, no less than 1e-12: zero in float16.
        host, size = dict(host, img_size=128), 128
    model = PeftBackbone(base=host, **tuning).to(device)
    model.init_weights()
    for module in method_modules(model):  # off zero, where some begin
        for name, p in module.named_parameters():
            if name.endswith(('up.weight', 'values')):
                torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(2, 3, size, size, device=device)
    model.eval()
    directions = [torch.randn_like(out) / out.numel() ** 0.5 for out in model(x)]
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def backward(low: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=low):
            outs = [out.float() for out in model(x)]
        scaler.scale(sum((out * d).sum() for out, d in zip(outs, directions, strict=True))).backward()
        scaler.unscale_(optimizer)
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return [out.detach() for out in outs], named

    expected, exact = backward(False)
    scaler.update()
    actual, gradients = backward(True)
    scaler.update()
    of_output, of_gradient = PRECISIONS[dtype]
    for out, near in zip(actual, expected, strict=True):
        assert (out - near).norm() <= of_output * near.norm()
    assert gradients.keys() == exact.keys() <= {name for name, p in model.named_parameters() if p.requires_grad}
    # Sums that cancel (of the keys' biases: to nothing but rounding) are compared with a tenth of a typical gradient.
    floor = 0.1 * torch.stack([g.norm() for g in exact.values()]).square().mean().sqrt()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() <= of_gradient * (exact[name].norm() + floor), name

    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(True)
    scaler.step(optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('source', ['random', 'pretrained', 'model-level'])
def test_method_is_reset_after_the_base(host, method, source, tmp_path):
    """The method starts from its own initial values whether the base was loaded, initialised, or re-initialised by a
    model-level init_cfg, and the base is what was asked for."""
    stock = MODELS.build(host)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'base.pth')
    base = dict(host)
    if source == 'pretrained':
        base['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    model = PeftBackbone(base=base, peft=method)
    with torch.no_grad():
        for module in method_modules(model):
            for p in module.parameters():
                p.fill_(7.0)
    if source == 'model-level':
        from mmengine.model import BaseModule

        parent = BaseModule(init_cfg=dict(type='Constant', layer=['Linear', 'Conv2d', 'LayerNorm'], val=7.0, bias=7.0))
        parent.backbone = model
        torch.manual_seed(5)
        parent.init_weights()
    else:
        torch.manual_seed(5)
        model.init_weights()
    for module in method_modules(model):
        assert not any((p == 7.0).any() for p in module.parameters())
        assert not any(p.requires_grad is False for p in module.parameters())
    if source == 'pretrained':
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize(
    ('base', 'stages'),
    [
        (dict(HOSTS['mmdet-swin'], frozen_stages=1), 1),
        (dict(HOSTS['mmseg-swin'], frozen_stages=2), 2),
        (dict(HOSTS['mmpretrain-swin'], frozen_stages=0), 0),
        (dict(HOSTS['mmpretrain-vit'], frozen_stages=2), 2),
    ],
)
def test_frozen_stages_under_a_method_are_refused(base, stages):
    """The host would freeze the method's modules again at every `.train()`: refused, with the reason."""
    with pytest.raises(ConfigError, match=rf'frozen_stages={stages}.*frozen_stages=-1'):
        PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8))
    without = PeftBackbone(base=base)  # without a method it is the host's own business, and is respected
    without.train()
    assert 0 < len(without.freeze_record.trainable) < len(list(without.parameters()))


def test_frozen_patch_embedding_is_accepted():
    """mmdet's `frozen_stages=0` reaches no block, and is the published VOC setting."""
    model = PeftBackbone(base=dict(HOSTS['mmdet-swin'], frozen_stages=0), peft=dict(type='Mona'))
    model.train()
    assert all(p.requires_grad for m in method_modules(model) for p in m.parameters())


def test_unknown_hosts_are_refused():
    """BEiT's blocks have the attribute names of ViT's, a ResNet none: both are refused, naming what is supported."""
    for base in (
        dict(type='mmpretrain.BEiTViT', arch='deit-tiny', img_size=32),
        dict(type='mmdet.ResNet', depth=18),
    ):
        with pytest.raises(UnsupportedHostError, match=r'mmdet\.models\.backbones\.swin\.SwinTransformer.*FrozenModel'):
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
    with pytest.raises(ConfigError, match='LoRA cannot attach at q, v of ConvNeXtBlock.*: fc1, fc2.'):
        PeftBackbone(base=convnext, peft=dict(type='LoRA', rank=4))
    with pytest.raises(ConfigError, match='Mona cannot attach at post_attn of ConvNeXtBlock.*: post_ffn, ffn_branch'):
        PeftBackbone(base=convnext, peft=dict(type='Mona', bottleneck=8, sites=['post_attn', 'post_ffn']))
    model = PeftBackbone(base=convnext, peft=dict(type='Mona', bottleneck=8))
    assert len(method_modules(model)) == 8
    with pytest.raises(ConfigError, match="reads the weight of 'q' itself.*dropout=0.*: proj, fc1, fc2"):
        PeftBackbone(base=swinv2, peft=dict(type='LoRA', rank=4, dropout=0.1))


@pytest.mark.parametrize(
    ('peft', 'message'),
    [
        (dict(type='Mona', bottleneck=193), 'Mona: bottleneck=193 is larger than the widest block.* 192;'),
        (dict(type='LoRA', rank=193), 'LoRA: rank=193 is larger than the widest block.* 192;'),
        (dict(type='LoRA', rank=0), 'LoRA: rank=0 must be a whole number of at least 1'),
        (dict(type='LoRand', inner=193), 'LoRand: inner=193 is larger'),
        (dict(type='LoRA', sites=['q', 'w']), r"LoRA cannot attach at sites=\['q', 'w'\]; its sites are q, k, v, proj"),
        (dict(type='LoRA', sites=['q', 'q']), 'each once'),
        (dict(type='LoRA', sites=5), 'cannot attach at sites=5'),
        (dict(type='LoRA', rank=True), 'rank=True must be a whole number'),
        (dict(type='LoRA', alpha='x'), "alpha='x' must be a number"),
        (dict(type='LoRA', dropout=None), 'dropout=None must be a probability'),
        (dict(type='AdaptFormer', scale='a'), "scale='a' must be a number"),
        (dict(type='Mona', average='yes'), "average='yes' must be True or False"),
        (dict(type='Mona', scaled_norm=None), 'scaled_norm=None must be a list'),
        (dict(type='Mona', kernel_sizes=[3, 4]), r'kernel_sizes=\[3, 4\] must be different odd whole numbers'),
        (dict(type='Mona', kernel_sizes=[]), 'kernel_sizes'),
        (dict(type='Mona', scaled_norm=['up']), r"scaled_norm=\['up'\] must be a list of any of down, pointwise"),
    ],
)
def test_values_that_a_host_or_method_cannot_take(peft, message):
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)
    PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona', bottleneck=192))


def test_a_new_method_is_one_small_file(host, tmp_path, monkeypatch):
    """Nothing but this file, with `custom_imports` or an import, makes a method: it is built by name, frozen around,
    saved, copied and trained like ours."""
    source = '''
import torch
from torch import Tensor, nn

from mona_mm.methods import PeftModule
from mona_mm.registry import METHODS


@METHODS.register_module()
class ScaleShift(PeftModule):
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
        peft = dict(type='ScaleShift')
        test_base_keys_are_kept(host, peft)
        test_gradients_only_where_they_belong(PeftBackbone(base=host, peft=peft))
        test_state_dict_round_trip(host, peft)
        for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            test_copies_are_independent(PeftBackbone(base=host, peft=peft), clone)
        test_any_image_size(PeftBackbone(base=host, peft=peft), (50, 70))
        for dtype in PRECISIONS:
            trains_in_mixed_precision(host, dict(peft=peft), dtype)
        for start in ('random', 'pretrained', 'model-level'):
            test_method_is_reset_after_the_base(host, peft, start, tmp_path)
        with pytest.raises(UnknownOptionError, match='ScaleShift has no argument'):
            PeftBackbone(base=host, peft=dict(type='ScaleShift', bottleneck=8))
    finally:
        METHODS.module_dict.pop('ScaleShift')
        sys.modules.pop('scale_shift')


def test_second_method_is_refused(every_site):
    """One backbone carries one method."""
    from mona_mm.sites import inject

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
    assert len(method_modules(model)) == 16
    with pytest.raises(UnsupportedHostError, match='OtherSwin'):
        PeftBackbone(base=dict(type=OtherSwin, **arguments), peft=dict(type='Mona'))
