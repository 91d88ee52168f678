"""Hosts that are only a declaration: the stock forward with hooks, for every method that has a site there."""

import copy
from functools import partial

import pytest
import torch
from declared_hosts import CONVOLUTIONAL, DECLARED, FIXED_SIZE, IMAGE_SIZES, VARIANTS
from helpers import assert_near
from mmengine.registry import MODELS
from suite import (
    check_copies,
    check_gradients,
    check_names,
    check_round_trip,
    off_initial_values,
    outputs,
    trains_in_mixed_precision,
)
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.hosts import STREAM_SITES, Host, find_host, method_modules
from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS
from mona_mm.spt import Plan, Sensitivity, allocate
from mona_mm.spt.parts import Architecture

NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in DECLARED]


class Shift(StreamModule):
    """Adds a constant, and looks at the grid that it is told."""

    sites = ('post_attn',)

    def __init__(self, channels: int, by: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels) + by * torch.linspace(-1, 1, channels))

    def reset_parameters(self) -> None:
        pass

    def forward(self, x, hw):
        assert not self.needs_grid or 0 <= x.shape[1] - hw[0] * hw[1] <= 1, (x.shape, hw)
        return x + self.shift if self.shift.any() else x


class ShiftOfTokens(Shift):
    """The same for hosts that have tokens in another order than that of a grid."""

    needs_grid = False


class Affine(Shift):
    """Multiplies every channel by a factor of its own, and adds a constant of its own."""

    def forward(self, x, hw):
        return affine(x)


def affine(x: torch.Tensor) -> torch.Tensor:
    scale, shift = (start + 0.3 * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) for start in (1, 0.1))
    return x * scale + shift


@pytest.fixture(autouse=True)
def methods_of_this_file():
    methods = (Shift, ShiftOfTokens, Affine)
    for method in methods:
        METHODS.register_module(module=method)
    yield
    for method in methods:
        METHODS.module_dict.pop(method.__name__)


def host_of(name: str) -> Host:
    return find_host(MODELS.build(copy.deepcopy(DECLARED[name])))


def shift_on(host: Host) -> str:
    return 'Shift' if all(spec.row_major for spec in host.specs) else 'ShiftOfTokens'


def image(name: str) -> torch.Tensor:
    size = IMAGE_SIZES.get(name, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def adapted(base: dict, **peft) -> tuple[nn.Module, nn.Module]:
    """The stock backbone and the same with a method, in evaluation, with the weights of one seed."""
    torch.manual_seed(0)
    stock = MODELS.build(copy.deepcopy(base))
    for module in stock.modules():
        if type(module).__name__ == 'TridentConv':  # holds whatever was in memory: nothing initialises it
            nn.init.normal_(module.weight, std=0.05)
    model = PeftBackbone(base=copy.deepcopy(base), peft=peft, fast=False)
    model.load_state_dict(stock.state_dict(), strict=False)
    model.eval()
    stock.eval()
    stock.requires_grad_(False)  # as in the other, for torch's attention has a form of its own then
    return stock, model


@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_changed_bit_for_bit(name):
    """Modules that do nothing, at every stream site."""
    host = host_of(name)
    sites = [site for site in STREAM_SITES if site in host.sites and site != 'parallel_ffn']
    stock, model = adapted(DECLARED[name], type=shift_on(host), sites=sites)
    assert method_modules(model)
    for a, b in zip(outputs(stock, image(name)), outputs(model, image(name)), strict=True):
        assert torch.equal(a, b)


BETWEEN = ('xcit', 'davit', 'tinyvit')
"""Hosts whose blocks have a convolution between the branches, on the way from the one site to the other; they have a
test of their own below."""

OF_SOME_BLOCKS = ('levit', 'mobilevit', 'conformer', 'vig', 'pyramidvig')
"""Hosts that have post_ffn in other blocks than ffn_out, or choose neighbours by distances, which rounding decides."""


@pytest.mark.parametrize('name', NAMES)
def test_a_constant_is_the_same_before_and_after_the_residual_add(name):
    """What a hook on the end of a branch adds to it is what other hooks add to the stream behind it."""
    base, host, kind = DECLARED[name], host_of(name), name.rpartition('-')[2]
    for branch in ('attn', 'ffn'):
        if f'{branch}_out' not in host.sites or f'post_{branch}' not in host.sites or kind in OF_SOME_BLOCKS:
            continue
        if branch == 'attn' and kind in BETWEEN:
            continue
        shifted = [
            adapted(base, type=shift_on(host), by=0.3, sites=[site]) for site in (f'{branch}_out', f'post_{branch}')
        ]
        before, after = (outputs(model, image(name)) for _, model in shifted)
        stock = outputs(shifted[0][0], image(name))
        for a, b in zip(before, after, strict=True):
            assert_near(a, b)
        assert any((a - plain).abs().max() > 1e-3 for a, plain in zip(before, stock, strict=True))


@pytest.mark.parametrize(
    'name', [p for p in NAMES if p.values[0] in CONVOLUTIONAL or p.values[0].rpartition('-')[2] in OF_SOME_BLOCKS]
)
def test_post_ffn_is_on_what_a_block_returns(name):
    """As hooks on the blocks of the stock backbone add it."""
    host = host_of(name)
    stock, model = adapted(DECLARED[name], type=shift_on(host), by=0.3, sites=['post_ffn'])
    plain = outputs(stock, image(name))
    for path, block in host.blocks(stock).items():
        spec = host.spec(block)
        if 'post_ffn' in spec.sites:
            shift = model.get_submodule(path).peft['post_ffn'].shift.detach()
            block.register_forward_hook(partial(add, shift if spec.layout == 'BNC' else shift[:, None, None]))
    expected = outputs(stock, image(name))
    assert_near(outputs(model, image(name)), expected)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(expected, plain, strict=True))


def add(shift, block, args, out):
    return (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift


def xcit_block(block, x, hw, at):
    """Attention over channels, then a convolution over patches, then the FFN, each with its residual."""
    x = x + at('attn_out', at('attn_branch', block.gamma1 * block.attn(block.norm1(x))))
    x = at('post_attn', x + block.gamma3 * block.local_mp(block.norm3(x), *hw))
    return x + block.gamma2 * block.ffn(block.norm2(x), identity=0)


def davit_block(block, x, hw, at):
    """A convolution for the position before attention and before the FFN."""
    x = block.cpe1(x, hw)
    arguments = (hw,) if type(block).__name__ == 'SpatialBlock' else ()
    x = x + at('attn_out', at('attn_branch', block.attn(block.norm1(x), *arguments)))
    x = at('post_attn', block.cpe2(x, hw))
    return x + block.ffn(block.norm2(x), identity=0)


def tinyvit_block(block, x, hw, at):
    """Attention in windows of the padded map, then a convolution, then the FFN."""
    (height, width), side, maps = hw, block.window_size, x.unflatten(1, hw)
    if hw == (side, side):
        attention = block.attn(x)
    else:
        padded = nn.functional.pad(maps, (0, 0, 0, -width % side, 0, -height % side))
        rows = []
        for row in padded.split(side, 1):
            windows = [block.attn(window.flatten(1, 2)).unflatten(1, (side, side)) for window in row.split(side, 2)]
            rows.append(torch.cat(windows, 2))
        attention = torch.cat(rows, 1)[:, :height, :width].flatten(1, 2)
    x = x + at('attn_out', at('attn_branch', attention))
    x = block.local_conv(x.transpose(1, 2).unflatten(2, hw)).flatten(2).transpose(1, 2)
    x = at('post_attn', x)
    return x + block.mlp(x)


FORMULAS = {'mmpretrain-xcit': xcit_block, 'mmpretrain-davit': davit_block, 'mmpretrain-tinyvit': tinyvit_block}


@pytest.mark.parametrize('site', ['attn_branch', 'attn_out', 'post_attn'])
@pytest.mark.parametrize('name', FORMULAS)
def test_attention_sites_are_where_the_formula_has_them(name, site):
    """Every block, with an affine map at the site, against the block's formula in float64 on the stock submodules."""
    stock, model = adapted(DECLARED[name], type='Affine', sites=[site])
    seen = {}
    blocks = find_host(model).blocks(model)
    hooks = [b.register_forward_hook(partial(record, seen, path), with_kwargs=True) for path, b in blocks.items()]
    model(image(name))
    for hook in hooks:
        hook.remove()
    for each in (stock, model):
        each.double()
        each.eval()  # TinyViT makes a table of its weights there
    assert len(seen) >= 2
    for path, (args, kwargs) in seen.items():
        x, *others = args[0].double(), *args[1:]
        out = blocks[path](x, *others, **kwargs)
        hw = (*others, *kwargs.values()) if others or kwargs else (blocks[path].img_size,)
        hw = tuple(hw[0]) if len(hw) == 1 else hw
        formula = partial(FORMULAS[name], stock.get_submodule(path), x, hw)
        assert_near(out, formula(lambda s, x: affine(x) if s == site else x), relative=1e-12)
        assert (out - formula(lambda s, x: x)).abs().max() > 1e-3


def record(seen, path, block, args, kwargs, out):
    seen[path] = args, kwargs


def methods_of(name: str) -> list[dict]:
    """The methods that a host takes."""
    host = host_of(name)
    found = [dict(type='Mona', bottleneck=4)] if shift_on(host) == 'Shift' or 'mobilevit' in name else []
    if 'ffn_branch' in host.sites:
        found += [
            dict(type='Adapter', bottleneck=4),
            dict(type='LoRand', inner=2),
            dict(type='AdaptFormer', bottleneck=4),
        ]
    linear = [site for site in ('q', 'v', 'fc1', 'fc2') if site in host.sites]
    return [*found, dict(type='LoRA', rank=2, sites=linear)] if linear else found


DISTINCT = ('beit', 'tinyvit', 'hornet', 'mscan', 'resnet', 'cgnet', 'tnt')
"""Hosts that show every kind of declaration; the others have the shared suite in `make test-all`."""

COMMON_LIBRARIES = ('mmpretrain-', 'mmseg-m', 'mmseg-cgnet', 'mmdet-cspnext')
"""The beginnings of their names: one of each kind that several libraries have."""


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if kind in DISTINCT and name.startswith(COMMON_LIBRARIES) else [pytest.mark.slow])
        for name in DECLARED
        for kind in [name.rpartition('-')[2]]
        if kind != 'trident'  # see adapted()
    ],
)
def test_the_suite(name):
    """Names, gradients, round trips and copies of every method; LoRA merges."""
    base, size = DECLARED[name], IMAGE_SIZES.get(name, 64)
    for number, peft in enumerate(methods_of(name)):
        if number % 2 == len(name) % 2 or peft['type'] == 'LoRA':  # half of them, others on the next host
            check_names(base, peft)
            check_round_trip(base, peft, size)
            other = None if name in FIXED_SIZE else (96, 32)
            check_copies(PeftBackbone(base=copy.deepcopy(base), peft=peft), copy.deepcopy, other, size)
            check_gradients(PeftBackbone(base=copy.deepcopy(base), peft=peft), size)
        if peft['type'] == 'LoRA':
            check_merged(name, peft)


def check_merged(name: str, peft: dict) -> None:
    """The stock backbone computes the same with the merged weights."""
    stock, model = adapted(DECLARED[name], **peft)
    off_initial_values(model)
    expected = outputs(model, image(name))
    assert not torch.equal(outputs(stock, image(name))[-1], expected[-1])
    stock.load_state_dict(merged_state_dict(model))
    stock.eval()  # some keep a table that they make of their weights
    assert_near(outputs(stock, image(name)), expected, relative=1e-4)


@pytest.mark.parametrize('name', ['mmdet-resnet-caffe', 'mmdet-trident'])
def test_linear_layers_with_a_stride_or_several_calls_merge(name):
    """Bottlenecks of ResNet in the style of Caffe begin with the stride; those of TridentNet run once a branch."""
    peft = dict(type='LoRA', rank=2, sites=['fc1', 'fc2'])
    check_names(DECLARED[name], peft)
    check_gradients(adapted(DECLARED[name], **peft)[1])
    check_merged(name, peft)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mmdet-cspnext', 'mmseg-cgnet', 'mmpretrain-hivit', 'mmpretrain-convmixer'])
def test_mixed_precision(name):
    """Outputs and gradients in bfloat16 are near those in float32."""
    trains_in_mixed_precision(DECLARED[name], dict(peft=methods_of(name)[0]), torch.bfloat16)


OTHER_CHECKPOINTS = tuple(
    f'mmpretrain-{kind}' for kind in ('convmixer', 'edgenext', 'repmlp', 'replknet', 'mobilevit', 't2t')
)
"""Hosts whose activation checkpoints are like those of another one in the list."""


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in (*VARIANTS, *OTHER_CHECKPOINTS) else [])
        for name in DECLARED
        if 'res' not in name and 'hrnet' not in name and 'trident' not in name
    ],
)
def test_activation_checkpoints(name):
    """with_cp computes the same gradients, also under an input that requires none."""
    torch.manual_seed(0)
    model = PeftBackbone(base=copy.deepcopy(DECLARED[name]), peft=methods_of(name)[0])
    model.eval()
    found = []
    for with_cp in (False, True):
        for module in model.modules():
            if hasattr(module, 'hooked'):
                module.with_cp = with_cp
        found.append(gradients(model, name))
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


def gradients(model: nn.Module, name: str) -> tuple[torch.Tensor, ...]:
    """Those of the method's parameters, after these have got values that depend on nothing else."""
    torch.manual_seed(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        nn.init.normal_(p, std=0.1)
    total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs(model, image(name)))
    return torch.autograd.grad(total, parameters)


@pytest.mark.parametrize(
    ('name', 'option'),
    [
        ('mmpretrain-hornet', 'with_cp'),
        ('mmpretrain-replknet', 'with_cp'),
        ('mmpretrain-mixmim', 'use_checkpoint'),
        ('mmpretrain-tinyvit', 'use_checkpoint'),
    ],
)
def test_activation_checkpoints_around_blocks(name, option):
    """Backbones that checkpoint their blocks from outside lose no gradient of a method."""
    found = []
    for value in (False, True):
        torch.manual_seed(0)
        base = dict(copy.deepcopy(DECLARED[name]), **{option: value})
        model = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4))
        assert all(getattr(m, 'with_cp', False) is value for m in model.modules() if hasattr(m, 'hooked'))
        model.eval()
        found.append(gradients(model, name))
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if name == 'mmseg-vit' else [pytest.mark.slow])
        for name in DECLARED
        if name not in VARIANTS
    ],
)
def test_traced_and_exported(name):
    """torch.jit.trace and torch.export write down what is computed, hooks included."""
    torch.manual_seed(0)
    model = PeftBackbone(base=copy.deepcopy(DECLARED[name]), peft=methods_of(name)[0])
    model.eval()
    for module in method_modules(model):
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    expected = outputs(model, image(name))
    written_down = (
        torch.jit.trace(model, image(name), check_trace=False),
        torch.export.export(model, (image(name),)).module(),
    )
    for form in written_down:
        for a, b in zip(expected, outputs(form, image(name)), strict=True):
            assert_near(a, b)


def test_weights_that_are_standardised_are_no_linear_layers():
    """An addition to the output of such a convolution is no addition to its weight: a merge would compute otherwise."""
    base = dict(DECLARED['mmdet-cspnext'], conv_cfg=dict(type='ConvWS'))
    named = r"stage1\.1\.blocks\.0\.conv2\.pointwise_conv\.conv, the convolution at 'fc2', is a ConvWS2d"
    with pytest.raises(ConfigError, match=named):
        PeftBackbone(base=copy.deepcopy(base), peft=dict(type='LoRA', rank=2, sites=['fc2']))
    assert method_modules(PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=4)))


SPT_HOSTS = (
    *((name, 'mona') for name in ('mmdet-resnet-caffe', 'mmpretrain-replknet')),
    *((name, 'lora') for name in ('mmdet-cspnext', 'mmseg-cgnet', 'mmpretrain-edgenext')),
    *((name, 'lora') for name in ('mmpretrain-convmixer', 'mmpretrain-mobilevit', 'mmpretrain-tnt')),
)


@pytest.mark.parametrize(('name', 'kind'), SPT_HOSTS)
def test_a_plan_of_spt(name, kind, tmp_path):
    """A plan is made within its budget from any host, and what it says trains, and nothing else."""
    torch.manual_seed(0)
    architecture = Architecture.of(MODELS.build(copy.deepcopy(DECLARED[name])))
    squares = {part.name: torch.rand(architecture.shapes[part.name]) ** 8 for part in architecture.parts}
    structured = dict(type='LoRA', rank=2) if kind == 'lora' else dict(type='Mona', bottleneck=2)
    plan = allocate(Sensitivity(architecture, squares), '20%', structured)
    assert 0 < plan.counts.total <= 0.2 * architecture.parameters
    assert plan.counts.structured or not architecture.matrices
    plan.save(tmp_path / 'plan.safetensors')
    model = PeftBackbone(
        base=copy.deepcopy(DECLARED[name]), peft=dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'))
    )
    trains = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == plan.counts.total
    model.eval()
    assert all(gradient.isfinite().all() for gradient in gradients(model, name))


def test_a_plan_at_a_site_that_a_block_lacks_is_refused(tmp_path):
    """EdgeNeXt's attention is followed by no residual add of its own."""
    architecture = Architecture.of(MODELS.build(copy.deepcopy(DECLARED['mmpretrain-edgenext'])))
    block = next(block for block, op in architecture.matrices if op == 'q')
    file = tmp_path / 'plan.safetensors'
    Plan(architecture, dict(type='Mona', bottleneck=2), {block: ('post_attn',)}, (), {}).save(file)
    with pytest.raises(ConfigError, match=rf'Mona at {block}\.post_attn.*no such site.*LoRA'):
        PeftBackbone(base=copy.deepcopy(DECLARED['mmpretrain-edgenext']), peft=dict(type='SPT', plan=str(file)))


def test_a_backbone_that_was_converted_for_inference_is_refused():
    """The blocks of a deployed LeViT have other layers than those that train."""
    said = r'LeViT is not a supported host: its blocks \(Residual\) are .*deploy=True'
    with pytest.raises(UnsupportedHostError, match=said):
        PeftBackbone(base=dict(type='mmpretrain.LeViT', arch='128s', deploy=True), peft=dict(type='LoRA'))
