"""Adapted models in the hands of tools that look into them: traced, exported, counted, quantized, parametrized."""

import copy
import io
import warnings

import pytest
import torch
from adapted import COVER, METHODS, adapted, assert_close, image
from conftest import HOSTS
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError
from mona_mm.hosts import PeftBlock, find_host
from mona_mm.nn import choice
from mona_mm.nn.mixin import mix_out, qualified_name, stock_class
from mona_mm.spt.sparse import attach_sparse, merge_sparse

QUICK = (
    *(('Swin', method) for method in METHODS if method != 'AdaptFormer'),
    *(('ViT', 'Mona'), ('SwinV2', 'LoRA'), ('ConvNeXt', 'LoRA'), ('PVTv2', 'single weights')),
)
"""Every host once, and on the first every method; AdaptFormer is an Adapter beside the FFN."""


def seconds_each(*quick: tuple[str, str], of: list = COVER):
    """All pairs as a parameter, of which `make test` has only these, and `make test-all` has all."""
    return pytest.mark.parametrize(
        ('host', 'method'), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in quick)) for pair in of]
    )


@seconds_each(
    *((host, 'LoRA') for host in ('SwinV2', 'PVTv2', 'ConvNeXt')),
    *(('Swin', method) for method in ('CoLin', 'Rein', 'single weights')),
    ('ViT', 'Mona'),
)
def test_traced_and_saved(host, method):
    """torch.jit.trace, saved and loaded, computes for another image what the model does."""
    model, other = adapted(host, method), image(64, 64, seed=9)
    with torch.no_grad():
        expected = model(other)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, image(64, 64), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        with torch.no_grad():
            assert_close(torch.jit.load(file)(other), expected)
    with torch.no_grad():
        assert all(map(torch.equal, model(other), expected))


@seconds_each(('Swin', 'Mona'), ('ViT', 'single weights'))
def test_exported(host, method):
    """torch.export computes for another image what the model does."""
    model, other = adapted(host, method), image(64, 64, seed=9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = model(other)
        exported = torch.export.export(model, (image(64, 64),), strict=False).module()
        assert_close(exported(other), expected)
        assert all(map(torch.equal, model(other), expected))


@seconds_each(*QUICK)
def test_torch_func(host, method):
    """functional_call with other values, and vmap over images, against one call after the other."""
    model = adapted(host, method)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = {name: p * 0.9 for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        expected = model(image(64, 64))
        other = torch.func.functional_call(model, values, (image(64, 64),))
        assert not torch.equal(other[-1], expected[-1])
        model.load_state_dict({**state, **values}, strict=False)  # SwinV2 drops tables that it computes
        assert_close(model(image(64, 64)), other)
        model.load_state_dict(state, strict=False)
        images = torch.stack([image(64, 64), image(64, 64, seed=2)])
        mapped = torch.func.vmap(model)(images)
        for i in range(2):
            assert_close([out[i] for out in mapped], model(images[i]))


@pytest.mark.parametrize('method', METHODS)
def test_derivatives_in_forward_mode(method):
    """Dual numbers through a Swin, whose stock form knows them, against torch.func's."""
    model, x, direction = adapted('Swin', method).double(), image(64, 64).double(), image(64, 64, seed=3).double()
    with forward_ad.dual_level():
        outputs = model(forward_ad.make_dual(x, direction))
        tangents = [forward_ad.unpack_dual(out).tangent for out in outputs]
    assert_close(tangents, torch.func.jvp(lambda x: tuple(model(x)), (x,), (direction,))[1], 1e-10)


@seconds_each(
    *(('Swin', 'Mona'), ('ViT', 'LoRA')),
    of=[pair for pair in COVER if pair[0] in ('Swin', 'ViT', 'PVTv2')],
)
def test_counters(host, method):
    """Operations: mmengine's counter runs, and torch's counts in the fast form what it counts in the plain one."""
    model, plain = (adapted(host, method, fast=fast) for fast in (True, False))
    assert get_model_complexity_info(model, (3, 64, 64))['flops'] > 0
    counts = []
    for each in (model, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(image(64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@seconds_each(*QUICK, of=[p for p in COVER if p[0] != 'SwinV2'])
def test_dynamic_quantization(host, method):
    """Linears in 8 bits: near the model in single precision, and the method still reached. (SwinV2 reads the weight of
    a linear by itself, which no quantized one has; the stock one fails as well.)"""
    model = adapted(host, method)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    called, every = set(), set()
    for path, block in quantized.named_modules():
        for site, module in block.peft.items() if isinstance(block, PeftBlock) else ():
            linear = block.spec.linears.get(site)
            if linear is None or linear.is_called:
                every.add((path, site))
                module.register_forward_hook(lambda *_, at=(path, site): called.add(at))
    with torch.no_grad():
        assert_close(quantized(image(64, 64)), model(image(64, 64)), 0.2)
    assert called == every


@pytest.mark.parametrize('peft', [None, dict(type='Mona', bottleneck=8)], ids=['plain', 'mona'])
def test_dynamic_quantization_where_forms_are_measured(peft):
    """The choice of a form by measurement, as outside of tests, takes a quantized layer as well."""
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft).eval()
    expected = model(image(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    choice.measure(True)
    with torch.no_grad():
        assert_close(quantized(image(64, 64)), expected, 0.2)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@seconds_each(*QUICK)
def test_parametrized(host, method):
    """Every weight parametrized, or weight-normalised, computes what it did; copies do; classes are known again."""
    model = adapted(host, method)
    with torch.no_grad():
        expected = model(image(64, 64))
    blocks = list(find_host(model).blocks(model))
    for register in (
        lambda m: parametrize.register_parametrization(m, 'weight', Twice()),
        parametrizations.weight_norm,
    ):
        wrapped = copy.deepcopy(model)
        for module in list(wrapped.modules()):
            weight = module._parameters.get('weight')
            if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                register(module)
        assert list(find_host(wrapped).blocks(wrapped)) == blocks
        with torch.no_grad():
            assert_close(wrapped(image(64, 64)), expected, 1e-4)
            assert_close(copy.deepcopy(wrapped)(image(64, 64)), expected, 1e-4)


def test_parametrized_classes():
    """stock_class, mix_out and single weights under and over a parametrization."""
    linear = nn.Linear(4, 4)
    delta = attach_sparse(linear, [0, 5])
    nn.init.ones_(delta.values)
    x = torch.randn(3, 4)
    expected = linear(x)
    parametrize.register_parametrization(linear, 'bias', Twice())
    assert stock_class(linear) is nn.Linear
    torch.testing.assert_close(linear(x), expected)
    parametrize.remove_parametrizations(linear, 'bias')
    assert stock_class(linear) is nn.Linear
    merge_sparse(linear)
    assert type(linear) is nn.Linear
    norm = nn.LayerNorm(4)
    attach_sparse(norm, [1])
    nn.init.ones_(norm.peft['weight'].values)
    expected = norm(x)
    parametrize.register_parametrization(norm, 'weight', Twice())
    torch.testing.assert_close(norm(x), expected)
    mix_out(norm)
    assert qualified_name(stock_class(norm)) == 'torch.nn.modules.normalization.LayerNorm'
    assert not torch.equal(norm(x), expected)


@pytest.mark.parametrize('method', ['LoRA', 'Adapter', 'LoRand'])
def test_an_exchanged_module_is_no_silent_loss(method):
    """Where what a hook is on has been exchanged, the method is not left out without a word."""
    path = dict(LoRA='attn.w_msa.qkv', Adapter='attn.drop', LoRand='ffn.dropout_layer')[method]
    model = adapted('Swin', method)
    expected = model(image(64, 64))
    block = model.stages[0].blocks[0]

    def exchange():
        new = copy.copy(block.get_submodule(path))
        new._forward_hooks, new._forward_pre_hooks = type(new._forward_hooks)(), type(new._forward_pre_hooks)()
        block.set_submodule(path, new)

    exchange()
    assert all(map(torch.equal, model(image(64, 64)), expected))
    model.train()
    exchange()
    with pytest.raises(ConfigError, match=r'Call the train\(\) or eval\(\)'):
        model(image(64, 64))
    assert all(map(torch.equal, model.eval()(image(64, 64)), expected))


def test_stand_ins_are_whole_modules(monkeypatch):
    """A backbone that does not pass the grid runs as a stand-in, whose parameters torch.compile reads."""
    model, seen = adapted('ViT', 'Mona'), []
    monkeypatch.setattr(type(model), 'forward', lambda self, x: seen.append(self))
    model(image(64, 64))
    assert {id(p) for p in seen[0].parameters()} == {id(p) for p in model.parameters()}
    assert all(isinstance(child, nn.Module) for m in seen[0].modules() for child in m._modules.values() if child)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('host', 'method'), [('SwinV2', 'LoRA'), ('PVTv2', 'Mona'), ('Swin', 'Mona in the branches'), ('ViT', 'Mona')]
)
def test_compiled(host, method):
    """torch.compile, forward and backward."""
    torch._dynamo.reset()
    model = adapted(host, method)
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager')
    assert_close(compiled(image(64, 64)), model(image(64, 64)))
    torch._dynamo.reset()


def test_a_host_that_reads_a_weight_wrapped_away():
    """LoRA at a weight that the host reads by itself, behind a wrapper: an error and not a forward without it."""
    model = adapted('SwinV2', 'LoRA')
    attention = model.stages[0].blocks[0].attn
    attention.forward = attention.forward
    with pytest.raises(ConfigError, match='attn.* is wrapped'):
        model(image(64, 64))
