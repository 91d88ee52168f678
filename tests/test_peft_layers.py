"""PeftModel on single layers: against plain formulas, in every form a layer can have, and what it refuses."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import HOSTS, SMALL_SWIN
from helpers import assert_equal, assert_near
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

import mona_mm
from mona_mm import PeftModel, count_trainable
from mona_mm.checkpoint.described_methods import describe_methods
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.errors import CheckpointMismatchError, ConfigError, FreezeError, UnknownOptionError
from mona_mm.frozen.rules import check_trainable
from mona_mm.hosts import find_layers
from mona_mm.methods import LinearModule
from mona_mm.nn.patterns import PathPattern
from mona_mm.registry import METHODS

LORA = dict(type='LoRA', rank=3, alpha=2)


@MODELS.register_module()
class OneLayer(BaseModule):
    """A layer of any class, at ``layer``."""

    def __init__(self, cls, init_cfg=None, **options):
        super().__init__(init_cfg)
        self.layer = cls(**options)

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@MODELS.register_module()
class Parts(BaseModule):
    """Two branches of like layers, with a layer that both share, and modules that are no layers."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.branches = nn.ModuleList(
            nn.ModuleDict(dict(conv=ConvModule(4, 6, 3, padding=1), norm=nn.LayerNorm(6), fc=nn.Linear(6, 6)))
            for _ in range(2)
        )
        for branch in self.branches:
            branch['shared'] = shared

    def forward(self, x):
        out = 0
        for branch in self.branches:
            y = branch['conv'](x).flatten(2).transpose(1, 2)
            out = out + branch['shared'](branch['fc'](branch['norm'](y)).relu())
        return out


@pytest.fixture
def methods():
    """What a test registers is gone after it."""
    before = dict(METHODS.module_dict)
    yield METHODS
    METHODS.module_dict.clear()
    METHODS.module_dict.update(before)


def one_layer(cls, target=None, **options):
    """A model of one layer in float64 with LoRA beside it, every parameter of it random."""
    path = 'layer.**' if issubclass(cls, nn.MultiheadAttention) else 'layer'
    model = PeftModel(base=dict(type='OneLayer', cls=cls, **options), targets=[target or dict(LORA, path=path)])
    model.init_weights()
    return off_zero(model).double()


def off_zero(model):
    """The same model with random values in all parameters of the method."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.peft.' in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def change(lora, weight, scale=2 / 3):
    """The addition to a weight, by the definition of LoRA."""
    return (scale * lora.up.weight @ lora.down.weight).view_as(weight)


def gradients(model, outputs):
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def check_formula(model, actual, expected):
    """Outputs, the gradients of all parameters that train, and the merged model."""
    assert_near(actual, expected, 1e-12)
    assert_near(gradients(model, actual), gradients(model, expected), 1e-12)
    names = [name for name in model.state_dict() if '.peft.' not in name]
    stock_type = type(model.layer).__mro__[2:]
    mona_mm.merge(model)
    assert list(model.state_dict()) == names and type(model.layer).__mro__[0] in stock_type
    assert not model.layer._forward_hooks and all(p.requires_grad for p in model.parameters())


CONVOLUTIONS = {
    '3x3': dict(kernel_size=3, padding=1),
    '3x3 of stride 2': dict(kernel_size=3, stride=2, padding=1, bias=False),
    'dilated': dict(kernel_size=3, padding=2, dilation=2),
    'one-sided': dict(kernel_size=(1, 3), stride=(2, 1), padding=(0, 1)),
    'same': dict(kernel_size=3, padding='same'),
    '7x7': dict(kernel_size=7, stride=2, padding=3),
    'padded 1x1': dict(kernel_size=1, padding=1),
    'grouped': dict(kernel_size=3, groups=2),
    'grouped 1x1': dict(kernel_size=1, groups=4),
    'reflected': dict(kernel_size=3, padding=1, padding_mode='reflect'),
    '1x1': dict(kernel_size=1),
    '1x1 of stride 2': dict(kernel_size=1, stride=2),
    '1x1 of two strides': dict(kernel_size=1, stride=(1, 3)),
}


@pytest.mark.parametrize('kind', CONVOLUTIONS)
def test_a_convolution_by_its_weight(kind):
    """LoRA beside a convolution is the convolution with another weight: outputs, gradients, the number of parameters,
    and the merged model."""
    model = one_layer(nn.Conv2d, in_channels=8, out_channels=12, **CONVOLUTIONS[kind])
    conv, x = model.layer, torch.randn(2, 8, 9, 11, dtype=torch.float64)
    plain = nn.Conv2d(8, 12, **CONVOLUTIONS[kind]).double()
    lora = conv.peft['weight']
    parameters = dict(weight=conv.weight + change(lora, conv.weight))
    if conv.bias is not None:
        parameters['bias'] = conv.bias
    expected = torch.func.functional_call(plain, parameters, x)
    assert count_trainable(model).trainable == 3 * (conv.weight[0].numel() + 12)
    actual = model(x)
    assert actual.stride() == expected.stride()
    check_formula(model, [actual], [expected])
    assert_near(model(x), expected, 1e-12)


def test_a_linear_layer():
    model = one_layer(nn.Linear, in_features=5, out_features=7)
    linear, x = model.layer, torch.randn(2, 4, 5, dtype=torch.float64)
    expected = F.linear(x, linear.weight + change(linear.peft['weight'], linear.weight), linear.bias)
    assert_near(model(input=x), expected, 1e-12)
    check_formula(model, [model(x)], [expected])
    assert_near(model(x), expected, 1e-12)


def plain_attention(q, k, v, weights, bias, out_weight, out_bias, heads):
    """Softmax attention by its definition, ``(B, N, C)``."""
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, bias.chunk(3), strict=True)
    )
    attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return F.linear((attention @ v).transpose(1, 2).flatten(2), out_weight, out_bias)


@pytest.mark.parametrize('widths', [{}, dict(kdim=6, vdim=10)], ids=['fused', 'separate'])
def test_attention_by_its_definition(widths):
    """LoRA beside the matrices that torch's attention reads: outputs, gradients and the merged model are those of the
    definition."""
    model = one_layer(nn.MultiheadAttention, embed_dim=8, num_heads=2, batch_first=True, **widths)
    layer, peft = model.layer, model.layer.peft
    names = ['q_proj_weight', 'k_proj_weight', 'v_proj_weight'] if widths else ['in_proj_weight']
    assert list(peft) == [*names, 'out_proj']
    weights = [getattr(layer, name) + change(peft[name], getattr(layer, name)) for name in names]
    weights = weights if widths else weights[0].chunk(3)
    out_weight = layer.out_proj.weight + change(peft['out_proj'], layer.out_proj.weight)
    q = torch.randn(2, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 4, layer.kdim, dtype=q.dtype), torch.randn(2, 4, layer.vdim, dtype=q.dtype)
    nn.init.normal_(layer.in_proj_bias)
    expected = plain_attention(q, k, v, weights, layer.in_proj_bias, out_weight, layer.out_proj.bias, 2)
    check_formula(model, [model(query=q, key=k, value=v)[0]], [expected])
    assert_near(model(q, k, v)[0], expected, 1e-12)


def test_slices_of_attention():
    """``slices`` puts a module of its own beside q and v, and nothing beside k."""
    target = dict(LORA, path='layer.in_proj_weight', slices=['q', 'v'])
    model = one_layer(nn.MultiheadAttention, target, embed_dim=8, num_heads=2)
    layer = model.layer
    assert list(layer.peft) == ['q', 'v'] and count_trainable(model).trainable == 2 * 3 * (8 + 8)
    q, k, v = layer.in_proj_weight.chunk(3)
    weights = q + change(layer.peft['q'], q), k, v + change(layer.peft['v'], v)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = plain_attention(x, x, x, weights, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias, 2)
    xs = x.transpose(0, 1)
    check_formula(model, [model(xs, xs, xs)[0].transpose(0, 1)], [expected])
    assert_near(model(xs, xs, xs)[0].transpose(0, 1), expected, 1e-12)


def test_slices_of_two_targets():
    """Each slice has the method of its target, and none can have two."""
    cfg = dict(type='OneLayer', cls=nn.MultiheadAttention, embed_dim=8, num_heads=2, batch_first=True)
    path = 'layer.in_proj_weight'
    targets = [dict(LORA, path=path, slices=['q']), dict(type='LoRA', rank=1, path=path, slices=['k', 'v'])]
    model = off_zero(PeftModel(base=cfg, targets=targets))
    assert [model.layer.peft[name].down.out_features for name in 'qkv'] == [3, 1, 1]
    x = torch.randn(2, 5, 8)
    out = model(x, x, x)[0].detach()
    merged = mona_mm.merge(copy.deepcopy(model))
    assert type(merged.layer) is nn.MultiheadAttention
    assert_near(merged(x, x, x)[0].detach(), out)
    for slices in (['q'], ['k', 'q'], []):
        with pytest.raises(ConfigError, match='a layer, or a slice of it, gets one method'):
            PeftModel(base=cfg, targets=[targets[0], dict(LORA, path='layer.*_weight', slices=slices)])


def test_the_fused_encoder_layer_of_torch():
    """In evaluation without gradients torch's encoder layer reads its layers' weights itself; the method's additions
    are in there as well."""
    options = dict(d_model=8, nhead=2, dim_feedforward=12, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for path in ('**.in_proj_weight', '**.linear1'):
        model = PeftModel(base=dict(type='OneLayer', cls=nn.TransformerEncoderLayer, **options),
                          targets=[dict(LORA, path=path)])  # fmt: skip
        off_zero(model).double().eval()
        expected = model(x)
        with torch.no_grad():
            assert_near(model(x), expected.detach(), 1e-12)
            mona_mm.merge(model)
            assert_near(model(x), expected.detach(), 1e-12)


def parts(*targets, **options):
    return PeftModel(base=dict(type='Parts'), targets=[dict(LORA, **target) for target in targets], **options)


IMAGE = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3))


def test_the_base_stays():
    """The object is the base: its class, the names of its state, the stock output bit for bit; only the method and
    what ``trainable`` says trains."""
    stock = MODELS.build(dict(type='Parts')).requires_grad_(False)
    model = parts(dict(path='branches.*.{conv.conv,fc}'), trainable='norm')
    model.load_state_dict(stock.state_dict(), strict=False)
    assert type(model) is Parts
    assert [name for name in model.state_dict() if '.peft.' not in name] == list(stock.state_dict())
    assert_equal(model(IMAGE), stock(IMAGE))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if '.peft.' in n or '.norm.' in n} and len(trains) == 12
    check_trainable(model)
    described = describe_methods(model)['']
    assert described['type'] == 'PeftModel' and described['trainable'] == ['norm']
    assert described['options'] == dict(targets=[dict(LORA, path='branches.*.{conv.conv,fc}')])


def test_a_shared_layer_counts_once():
    """A layer at two paths gets one module, under its first path; its merged weight would change for both."""
    model = parts(dict(path='branches.1.shared'))
    (target,) = model.peft_record.targets
    assert target.layers == ('branches.1.shared',) and count_trainable(model).trainable == 3 * 12
    off_zero(model).double()
    both = parts(dict(path='**.shared'))
    assert len(both.peft_record.targets[0].layers) == 1
    expected = model(IMAGE.double())
    mona_mm.merge(model)
    assert_near(model(IMAGE.double()), expected, 1e-12)


def test_layers_that_share_a_weight():
    """Each gets a module of its own, and there is no weight into which both could be merged."""
    base = MODELS.build(dict(type='Parts'))
    base.branches[1].fc.weight = base.branches[0].fc.weight
    model = PeftModel(base=dict(type='OneLayer', cls=lambda: base), targets=[dict(LORA, path='**.fc')])
    assert len(model.peft_record.targets[0].layers) == 2
    with pytest.raises(ConfigError, match='are one weight that several modules share'):
        mona_mm.merge(model)


def test_the_table_says_what_matched():
    model = parts(dict(path='branches.*.fc'), dict(path='**.conv.conv', rank=2))
    count = count_trainable(model)
    assert {p.part: (p.trainable, p.total) for p in count.parts if 'method' in p.part} == {
        'method (LoRA: branches.*.fc)': (2 * 3 * 12, 72),
        'method (LoRA: **.conv.conv)': (2 * 2 * (36 + 6), 168),
    }
    stock = sum(p.numel() for p in MODELS.build(dict(type='Parts')).parameters())
    assert (count.total, count.trainable, count.method) == (stock + 240, 240, 'LoRA')
    lines = count.table().splitlines()
    assert lines[-2:] == [
        'LoRA beside 2 layers: branches.*.fc (2)',
        'LoRA beside 2 layers: branches.*.conv.conv (2)',
    ]


@pytest.mark.parametrize(
    ('pattern', 'path', 'is_match'),
    [
        ('decoder.layers.*.fc', 'decoder.layers.11.fc', True),
        ('decoder.layers.*.fc', 'decoder.layers.11.ffn.fc', False),
        ('decoder.**.fc', 'decoder.layers.11.ffn.fc', True),
        ('decoder.**.fc', 'decoder.fc', True),
        ('decoder.**', 'decoder', True),
        ('decoder.**', 'decoders.fc', False),
        ('**', '', True),
        ('**.{value,output}_proj', 'a.b.output_proj', True),
        ('**.{value,output}_proj', 'a.b.proj', False),
        ('layer{3,4}.*', 'layer3.conv', True),
        ('fc', 'head.fc', False),
        ('f.c', 'fxc', False),
        ('a.{b.c,d}.e', 'a.b.c.e', True),
        ('a.{b.c,d}.e', 'a.d.e', True),
        (r're:.*\.(?:q|v)_proj', 'layers.0.v_proj', True),
        (r're:.*\.(?:q|v)_proj', 'layers.0.v_proj.0', False),
        (r're:(?i)FC', 'fc', True),
    ],
)
def test_patterns(pattern, path, is_match):
    assert PathPattern(pattern).matches(path) == is_match


class BesideOutput(LinearModule):
    """A method that adds to no weight."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(out_channels))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, x, out, linear):
        return self.scale * out


@pytest.mark.parametrize(
    ('targets', 'error', 'words'),
    [
        ([], ConfigError, 'targets=[] puts no method anywhere'),
        ([dict(type='LoRA')], ConfigError, 'path=None must be a pattern'),
        ([dict(path=[], type='LoRA')], ConfigError, 'path=[] must be a pattern'),
        ([dict(path='**.fc')], ConfigError, 'type=None must be a method that can stand beside a layer: '),
        ([dict(path='**.fc', type='Mona')], ConfigError, 'LoRA'),
        ([dict(path='**.fc', type='LoRA', rnak=3)], UnknownOptionError, "Did you mean 'rank'?"),
        ([dict(path='**.fc', type='LoRA', rank=0)], ConfigError, 'rank=0 must be'),
        ([dict(path='**.fc', type='LoRA', rank=7)], ConfigError, 'rank=7 must be at most 6'),
        ([dict(path='**.fc', type='LoRA', slices='q')], ConfigError, "slices='q' must be a list"),
        ([dict(LORA, path='**.fc', slices=['q'])], ConfigError, "'**.fc' matches no in_proj_weight, so slices=['q'] w"),
        ([dict(path='re:(', type='LoRA')], ConfigError, "'re:(' is not a valid pattern of paths"),
        ([dict(path='{fc', type='LoRA')], ConfigError, "'{fc' is not a valid pattern of paths"),
        ([dict(LORA, path='branches.*.cf')], ConfigError, "matches nothing in this Parts. Near paths of layers: 'bra"),
        ([dict(LORA, path='qq')], ConfigError, "Near paths of layers: 'branches.**', '**.conv', '**.fc', '**.shared'."),
        ([dict(LORA, path='fc')], ConfigError, "'fc' matches nothing in this Parts. Near paths of layers: '**.fc'."),
        ([dict(LORA, path='{fc,conv}')], ConfigError, "Near paths of layers: '**.{fc,conv}'."),
        ([dict(LORA, path='**.fc', slices=[['q']])], ConfigError, "slices=[['q']] must be a list"),
        ([dict(LORA, path='branches.*')], ConfigError, "only ModuleDict, and no layer. To match the layers within, ap"),
        ([dict(LORA, path=['**.fc', '**.norm'])], ConfigError, "'**.norm' matches only LayerNorm, and no layer in"),
        ([dict(LORA, path='**.fc'), dict(LORA, path='branches.0.**')], ConfigError,
         "branches.0.fc is matched by '**.fc' and by 'branches.0.**'"),
        ([dict(LORA, path='branches.0.shared'), dict(LORA, path='branches.1.shared')], ConfigError, 'one method'),
        ([dict(path='**.conv', type='BesideOutput')], ConfigError, 'add to the weight of a Conv2d'),
    ],
)  # fmt: skip
def test_what_is_refused(targets, error, words, methods):
    methods.register_module(module=BesideOutput)
    with pytest.raises(error) as raised:
        PeftModel(base=dict(type='Parts'), targets=targets)
    assert words in str(raised.value) and '\n' not in str(raised.value)


def test_dropout_cannot_be_in_a_weight():
    """Beside a linear layer or a plain convolution LoRA may drop; where the weight is read it cannot, and says so."""
    target = dict(LORA, path='layer.**', dropout=0.5)
    for cls, options in ((nn.Linear, (4, 4)), (nn.Conv2d, (4, 4, 3))):
        names = dict(zip(('in_features', 'out_features') if cls is nn.Linear else ('in_channels', 'out_channels',
                         'kernel_size'), options, strict=True))  # fmt: skip
        model = one_layer(cls, target, **names)
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        assert not torch.equal(model(x), model(x))
    for cls, options in (
        (nn.MultiheadAttention, dict(embed_dim=4, num_heads=2)),
        (nn.Conv2d, dict(in_channels=4, out_channels=4, kernel_size=3, groups=2)),
    ):
        with pytest.raises(ConfigError, match='Leave dropout and drop_path out'):
            one_layer(cls, target, **options)


def test_where_a_layer_is_not_one_of_torch():
    """Classes with a forward of their own are passed over, so that nothing is merged that was never computed."""

    class Normalised(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.normalize(self.weight), self.bias)

    class Named(nn.Linear):
        pass

    model = nn.ModuleDict(dict(a=Normalised(3, 3), b=Named(3, 3), c=nn.utils.parametrizations.weight_norm(Named(3, 3))))
    assert list(find_layers(model)) == ['b']


def test_a_backbone_that_has_a_method():
    """A layer beside which a PeftBackbone's method stands gets no second one, the others do; all of it trains, is
    counted apart, and keeps the checks of what trains."""
    backbone = dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=2))
    base = dict(type='OneLayer', cls=MODELS.build, cfg=backbone)
    with pytest.raises(ConfigError, match=r'attn\.w_msa\.qkv already has a method beside it'):
        PeftModel(base=base, targets=[dict(LORA, path='layer.**.qkv')])
    model = PeftModel(base=base, targets=[dict(LORA, path=['layer.**.attn.**.proj', 'layer.**.ffn.**'])])
    check_trainable(model)
    x = torch.randn(1, 3, 64, 64)
    model(x)[-1].sum().backward()
    assert all((p.grad is not None) == ('.peft.' in name) for name, p in model.named_parameters())
    model.layer.stages[0].blocks[0].attn.w_msa.proj.peft['weight'].up.weight.requires_grad = False
    with pytest.raises(FreezeError, match='do not train as the config asked'):
        check_trainable(model)
    model.double()
    off_zero(model).eval()
    expected = model(x.double())
    mona_mm.merge(model)
    assert_near(list(model(x.double())), list(expected), 1e-10)
    assert '.peft.' not in ' '.join(model.state_dict())


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmpretrain-vit'])
def test_the_fast_forms_of_a_backbone(host):
    """The faster forms of attention and FFN read weights past their layers, but not where a method stands."""
    backbone = dict(type='mona_mm.PeftBackbone', base=HOSTS[host], trainable='none')
    model = PeftModel(base=dict(type='OneLayer', cls=MODELS.build, cfg=backbone),
                      targets=[dict(LORA, path='layer.{stages,layers}.**')])  # fmt: skip
    off_zero(model).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = list(model(x))
    assert all(grad.abs().max() > 0 for grad in gradients(model, expected).values())
    mona_mm.merge(model)
    assert_near(list(model(x)), [out.detach() for out in expected])


def test_a_delta_fits_whatever_the_spelling(tmp_path):
    """Layers are compared, not the patterns that match them."""

    def build(*targets):
        base = dict(type='OneLayer', cls=MODELS.build, cfg=HOSTS['mmdet-swin'])
        torch.manual_seed(0)
        return PeftModel(base=base, targets=list(targets)).eval()

    narrow, wide = dict(LORA, alpha=3.0), dict(LORA, alpha=1.0)
    qkv, ffn = 'layer.stages.**.qkv', 'layer.stages.**.layers.**'
    file = tmp_path / 'a.delta.safetensors'
    model = off_zero(build(dict(narrow, path=qkv), dict(wide, path=ffn)))
    mona_mm.save_delta(model, file)
    again = build(dict(wide, path=[r're:layer\.stages\..*\.ffn\.layers\..*']), dict(narrow, path='layer.**.qkv'))
    mona_mm.load_delta(again, file)
    x = torch.randn(1, 3, 64, 64)
    assert_equal(list(again(x)), list(model(x)))
    with pytest.raises(CheckpointMismatchError, match='another method'):
        mona_mm.load_delta(build(dict(wide, path=qkv), dict(narrow, path=ffn)), file)

    mona_mm.save_delta(off_zero(build(dict(LORA, path=qkv))), file)
    mona_mm.load_delta(build(dict(LORA, path='layer.**.{qkv,no_such}')), file)
    with pytest.raises(CheckpointMismatchError, match='does not fit'):
        mona_mm.load_delta(build(dict(LORA, path=ffn)), file)


def test_beside_frozen_weights_in_half_precision(tmp_path):
    """In a backbone with ``frozen_dtype`` LoRA trains in float32 beside weights in bfloat16; a delta comes back, and
    the merged weights are in float32."""
    backbone = dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], trainable='none', frozen_dtype='bfloat16')

    def build():
        torch.manual_seed(0)
        base = dict(type='OneLayer', cls=MODELS.build, cfg=copy.deepcopy(backbone))
        return PeftModel(base=base, targets=[dict(LORA, path='layer.stages.**')])

    model, again = off_zero(build()).eval(), build().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = list(model(x))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(grad.dtype == torch.float32 for grad in gradients(model, expected).values())
    mona_mm.save_delta(model, tmp_path / 'a.delta.safetensors')
    mona_mm.load_delta(again, tmp_path / 'a.delta.safetensors')
    assert_equal(list(again(x)), expected)
    mona_mm.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_near(list(model(x)), [out.detach() for out in expected], 0.05)


def test_what_a_host_reads_without_calling():
    """SwinV2 reads the weight of qkv: a method beside it would have no effect, and is refused."""
    base = dict(HOSTS['mmpretrain-swinv2'])
    with pytest.raises(ConfigError, match=r'w_msa\.qkv reads its weight without calling it'):
        PeftModel(base=base, targets=[dict(LORA, path='**.qkv')])
    PeftModel(base=base, targets=[dict(LORA, path='**.w_msa.proj')])


def test_a_host_as_base(base_file):
    """The base may be a host, whose pretrained file is loaded with PeftBackbone's checks."""
    pretrained = dict(type='Pretrained', checkpoint=str(base_file))
    model = PeftModel(base=dict(SMALL_SWIN, init_cfg=pretrained), targets=[dict(LORA, path='**.qkv')])
    model.init_weights()
    state = torch.load(base_file)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all((p == 0).all() == name.endswith('up.weight') for name, p in model.named_parameters() if '.peft.' in name)
    wrong = PeftModel(base=dict(SMALL_SWIN, embed_dims=48, init_cfg=pretrained), targets=[dict(LORA, path='**.qkv')])
    with pytest.raises(CheckpointMismatchError):
        wrong.init_weights()
    with pytest.raises(ConfigError, match='cannot itself be a PeftBackbone'):
        backbone = dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=dict(type='Mona'))
        PeftModel(base=backbone, targets=[dict(LORA, path='**.proj')])


def test_a_method_that_begins_with_the_weights(methods, tmp_path):
    """What begins with the base's weights begins with those that are loaded, also by a Runner after ``init_weights``,
    but not if its own values are loaded."""

    @methods.register_module()
    class Remembers(BesideOutput):
        def start_from(self, weight):
            nn.init.constant_(self.scale, weight.sum().item())

    model = PeftModel(base=dict(type='OneLayer', cls=nn.Linear, in_features=3, out_features=2),
                      targets=[dict(type='Remembers', path='layer')])  # fmt: skip
    scale = model.layer.peft['weight'].scale
    assert_near(scale.detach(), model.layer.weight.detach().sum().expand(2))
    torch.save({'layer.weight': torch.ones(2, 3), 'layer.bias': torch.zeros(2)}, tmp_path / 'base.pth')
    load_checkpoint(model, str(tmp_path / 'base.pth'))
    assert scale.tolist() == [6, 6]
    torch.save({**model.state_dict(), 'layer.peft.weight.scale': torch.ones(2)}, tmp_path / 'whole.pth')
    load_checkpoint(model, str(tmp_path / 'whole.pth'))
    assert scale.tolist() == [1, 1]
    with pytest.raises(ConfigError, match='Remembers cannot be merged'):
        mona_mm.merge(model)


def test_a_method_without_convolve(methods):
    """A method without ``convolve``, or a LoRA with another forward, reaches convolutions by their weight."""

    @methods.register_module()
    class Doubled(METHODS.get('LoRA')):
        def forward(self, x, out, linear):
            return 2 * super().forward(x, out, linear)

        def delta_weight(self, weight):
            return 2 * super().delta_weight(weight)

    target = dict(LORA, type='Doubled', path='layer')
    model = one_layer(nn.Conv2d, target, in_channels=4, out_channels=6, kernel_size=3)
    assert not Doubled.has_convolve() and METHODS.get('LoRA').has_convolve()
    conv, x = model.layer, torch.randn(1, 4, 5, 5, dtype=torch.float64)
    weight = conv.weight + change(conv.peft['weight'], conv.weight, 4 / 3)
    check_formula(model, [model(x)], [F.conv2d(x, weight, conv.bias)])


EVERYWHERE = dict(path='**')


def everywhere():
    return off_zero(parts(EVERYWHERE, trainable='norm')).eval()


def test_copies_and_averages():
    """A copy, a pickle and an average compute for themselves: their own values, not those of the source."""
    model = everywhere()
    expected = model(IMAGE)
    average = ExponentialMovingAverage(model, momentum=0.5)
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module]
    off_by = {name: p for name, p in model.named_parameters() if '.peft.' in name}
    with torch.no_grad():
        for p in off_by.values():
            p.add_(1)
    assert not torch.allclose(model(IMAGE), expected)
    for clone in clones:
        assert_equal(clone(IMAGE), expected)
        clone.init_weights()
        assert all((p == 0).all() for name, p in clone.named_parameters() if name.endswith('up.weight'))
    assert all(not (p == 0).all() for p in off_by.values())
    average.update_parameters(model)  # the first update copies
    with torch.no_grad():
        for p in off_by.values():
            p.add_(1)
    average.update_parameters(model)
    state, source = average.module.state_dict(), model.state_dict()
    assert not any(torch.equal(state[name], source[name]) for name in off_by)
    assert all(torch.equal(state[name], source[name]) for name in source if '.peft.' not in name)


def test_recomputed_traced_compiled_and_in_threads():
    """Activation checkpoints, tracing, torch.compile and threads give what a call gives."""
    model = everywhere()
    expected = model(IMAGE)
    grads = gradients(model, [expected])
    again = checkpoint(model, IMAGE, use_reentrant=False)
    assert_equal(again, expected)
    assert_near(gradients(model, [again]), grads)
    assert_near(torch.jit.trace(model, IMAGE + 1, check_trace=False)(IMAGE), expected)
    assert_near(torch.export.export(model, (IMAGE + 1,)).module()(IMAGE), expected)
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager')(IMAGE)
    assert_near(compiled, expected)
    results = [None] * 4

    def run(i):
        results[i] = model(IMAGE * (i + 1))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        assert_equal(result, model(IMAGE * (i + 1)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    """Under autocast, outputs and gradients are those of float32 within the precision, in the autocast dtype."""
    model = everywhere()
    expected = model(IMAGE)
    with torch.autocast('cpu', dtype):
        out = model(IMAGE)
    assert out.dtype == dtype
    assert_near(out.float(), expected, 0.05)
    assert_near(gradients(model, [out]), gradients(model, [expected]), 0.3)


def test_merged_state_is_that_of_a_stock_model():
    model = everywhere().double()
    stock = MODELS.build(dict(type='Parts')).double()
    stock.load_state_dict(merged_state_dict(model))
    assert_near(stock(IMAGE.double()), model(IMAGE.double()), 1e-12)


def test_a_base_that_initialises_linear_layers_of_its_parts():
    """mmpretrain's ViT sets the weight and bias of every linear layer within its FFN, and LoRA's have no bias: the
    base's are initialised as without a method, and then the method's."""
    base = HOSTS['mmpretrain-vit']
    model = PeftModel(base, [dict(path='layers.*.ffn.**', type='LoRA', rank=4)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(3)
    model.init_weights()
    stock = MODELS.build(base)
    torch.manual_seed(3)
    stock.init_weights()
    layer, same = model.layers[1].ffn.layers[1], stock.layers[1].ffn.layers[1]
    assert_equal(layer.weight, same.weight)
    assert_equal(layer.bias, same.bias)
    lora = layer.peft['weight']
    assert not lora.up.weight.any() and 0 < lora.down.weight.abs().max() < 7


@pytest.mark.parametrize('method', [LORA, dict(type='DoRA', rank=2)], ids=lambda method: method['type'])
@pytest.mark.parametrize('also', [[], [dict(type='Normal', layer='Linear', std=0.5)]], ids=['file', 'rule and file'])
def test_a_base_that_is_loaded_whole(method, also, tmp_path):
    """The rules of an `init_cfg` beside its file are for the base: a model begins as the base of its file does, and has
    the values of the method that a file holds."""
    file = str(tmp_path / 'base.pth')
    cfg = dict(type='OneLayer', cls=nn.Linear, in_features=6, out_features=5)
    stock, x = MODELS.build(cfg), torch.randn(3, 6)
    torch.save(stock.state_dict(), file)
    cfg['init_cfg'] = [*also, dict(type='Pretrained', checkpoint=file)]
    model = PeftModel(base=cfg, targets=[dict(method, path='layer')])
    model.init_weights()
    assert_near(model(x).detach(), stock(x).detach())
    expected = off_zero(model)(x).detach()
    torch.save(model.state_dict(), file)
    again = PeftModel(base=cfg, targets=[dict(method, path='layer')])
    again.init_weights()
    assert_equal(again(x).detach(), expected)
