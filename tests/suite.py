"""What is promised of every method on every host, as functions, and the methods that it is promised of.

test_hosts.py asks it of the methods below; others ask it of plans, of frozen weights in half precision, of a method
that a user has written.
"""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, assert_near
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmpretrain.models import ConvNeXt, VisionTransformer

import mona_mm
from mona_mm import PeftBackbone
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.merge import merged_state_dict, unmergeable
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.hosts import LINEAR_SITES, find_host, method_modules, method_names, remove
from mona_mm.methods.base import PeftModule
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture
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
    'lora-ffn': dict(type='LoRA', rank=4, sites=['fc1', 'fc2'], init='principal'),
    'dora': dict(type='DoRA', rank=4),
    'mona-late': dict(type='Mona', bottleneck={'*.2': 4, 'default': 8}, blocks='last 2'),
    'lora-and-mona': [dict(type='LoRA', rank=4), dict(type='Mona', bottleneck=8)],
    'adapter-plus': dict(type='AdapterPlus', bottleneck=8),
    'colin': dict(type='CoLin', bottleneck=12, rank=4),
    'parax': dict(type='ParaX', rank=8),
    'rein': dict(type='Rein', num_tokens=8, rank=4),
}
CLONES = {'deepcopy': copy.deepcopy, 'pickle': lambda m: pickle.loads(pickle.dumps(m))}
SIZES = {'64x96': (64, 96), '96x64': (96, 64), '50x70': (50, 70)}
STARTS = ('random', 'pretrained', 'model-level')
# Largest distances from float32: of an output, and of any parameter's gradient. (measured) 0.024 and 0.13 in bfloat16,
# 0.003 and 0.011 in float16; a gradient that is lost, doubled or of the wrong sign is at 1.
PRECISIONS = {torch.bfloat16: (0.05, 0.25), torch.float16: (0.01, 0.05)}
STRUCTURED = {
    'lora': dict(type='LoRA', rank=2),
    'dora': dict(type='DoRA', rank=2),
    'adapter': dict(type='Adapter', bottleneck=2),
    'mona': dict(type='Mona', bottleneck=4),
}


def supports(host: str, method: str) -> bool:
    """ConvNeXt has no q, k, v, proj."""
    return not ('convnext' in host and method in ('lora', 'lora-everywhere', 'lora-and-mona', 'dora'))


def types(method: dict | list[dict]) -> list[str]:
    """The types of a method's config, or of those of several together."""
    return [config['type'] for config in (method if isinstance(method, list) else [method])]


COMMON = {
    'mmdet-swin': tuple(METHOD_CONFIGS),
    'mmseg-swin': ('lora',),
    'mmpretrain-swin': ('adapter-plus', 'dora'),
    'mmpretrain-vit': (
        *('mona', 'adapter', 'lora-everywhere', 'mona-late', 'lora-and-mona'),
        *('colin', 'parax', 'rein'),
    ),
    'mmpretrain-vit-no-cls': ('mona', 'lora-ffn'),
    'mmpretrain-swinv2': ('mona', 'lora-everywhere'),
    'mmpretrain-convnext': ('mona', 'adaptformer', 'lora-ffn'),
    'mmpretrain-convnextv2': ('mona-design-2', 'lorand'),
    'mmdet-pvtv2': ('mona', 'lora-everywhere'),
}
"""The methods that a host has in `make test`: every method on two hosts, every kind of site on every kind of block.
What a host promises each site, test_stock_outputs_bit_for_bit asks of all of them."""

COMMON_IN_HALF_PRECISION = {
    'mmdet-swin': ('mona', 'lora-and-mona', 'dora'),
    'mmseg-swin': ('adapter',),
    'mmpretrain-swin': ('adapter-plus',),
    'mmpretrain-vit': ('mona', 'lora', 'mona-late', 'colin', 'parax', 'rein'),
    'mmpretrain-vit-no-cls': ('lora-ffn',),
    'mmpretrain-swinv2': ('lora-everywhere',),
    'mmpretrain-convnext': ('adaptformer',),
    'mmpretrain-convnextv2': ('mona-design-2', 'lorand'),
    'mmdet-pvtv2': ('mona',),
}
"""The same for half precision, which a CPU computes slowly: every method on one host, every host with one method."""

COMMON_IN_FLOAT16 = {'mmdet-swin': ('mona', 'dora'), 'mmpretrain-vit': ('lora', 'colin', 'parax', 'rein')}
"""Of these, those that `make test` also has in float16, whose range is small: what makes norms, products of several
matrices or attention of its own, and one of what adds up linear layers."""

COMMON_STRUCTURED = {
    'mmdet-swin': tuple(STRUCTURED),
    'mmpretrain-vit': ('lora', 'mona'),
    'mmpretrain-swinv2': ('dora',),
    'mmpretrain-convnext': ('lora',),
    'mmdet-pvtv2': ('adapter',),
}
"""The structured modules of SPT that a host has in `make test`."""


def is_common(host: str, method: str) -> bool:
    """Whether `make test` has this method on this host; `make test-all` has all that are supported."""
    return method in COMMON[host]


def is_common_structured(host: str, kind: str) -> bool:
    """The same for this structured module of SPT."""
    return kind in COMMON_STRUCTURED.get(host, ())


def is_common_in(host: str, method: str, dtype: str = 'torch.bfloat16') -> bool:
    """Whether `make test` has this method on this host in that precision."""
    common = COMMON_IN_FLOAT16 if dtype == 'torch.float16' else COMMON_IN_HALF_PRECISION
    return method in common.get(host, ())


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def outputs(model, x, seed: int | None = None) -> list[torch.Tensor]:
    """The tensors that a backbone returns, in order: one, or a sequence of tensors or of such sequences."""
    if seed is not None:
        torch.manual_seed(seed)
    return list(_tensors_in(model(x)))


def _tensors_in(outs):
    if isinstance(outs, torch.Tensor):
        yield outs
    else:
        for out in outs:
            yield from _tensors_in(out)


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


def check_names(host, method):
    """Injecting adds names with `.peft.` and changes no other; class and public attributes stay the stock ones."""
    stock = MODELS.build(host)
    model = PeftBackbone(base=host, peft=method)
    before, after = set(stock.state_dict()), set(model.state_dict())
    assert before < after
    assert all('.peft.' in name for name in after - before)
    assert after - before == method_names(model)
    assert type(model) is type(stock)


def check_round_trip(host, method, size=64):
    """What one model saves, another of the same config loads strictly, and computes the same."""
    source, target = (PeftBackbone(base=host, peft=method) for _ in range(2))
    source.init_weights()
    source.eval()
    target.eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert not load(target, torch.load(file, weights_only=True))
    x = images(size=size)
    assert_equal(outputs(source, x), outputs(target, x))


def check_copies(model, clone, other_size=(96, 32), size=64):
    """A copy (EMA makes one) computes with its own weights and grid, and resets its own method."""
    model.init_weights()
    model.eval()
    x = images(size=size)
    expected = outputs(model, x)
    twin = clone(model)
    assert_equal(outputs(twin, x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(outputs(twin, x)[0], expected[0])
    assert_equal(outputs(model, x), expected)
    if other_size is not None:  # of hosts that take images of one size alone
        twin(torch.randn(1, 3, *other_size))  # another grid in the copy
    twin.init_weights()
    reset = [m for m in method_modules(twin) if not isinstance(m, SparseDelta)]  # those begin at zero
    assert reset and all(any(p.abs().sum() > 0 for p in m.parameters()) for m in reset)
    assert_equal(outputs(model, x), expected)


def check_size(model, size):
    """The grid is the image's, not the configuration's."""
    model.eval()
    seen = []
    for m in [m for m in method_modules(model) if isinstance(m, PeftModule)]:
        m.register_forward_pre_hook(lambda m, args: seen.append((args[0].shape[1], *args[1:])))
    for out in model(torch.randn(1, 3, *size)):
        assert out.isfinite().all()
    for tokens, hw in [call for call in seen if isinstance(call[1], tuple | torch.Size)][:1]:  # not at linear sites
        assert tokens - hw[0] * hw[1] in (0, 1)
        patch, rounded = find_patch(model)
        grid = [rounded(side / patch) for side in size]
        is_late = not len(next(iter(find_host(model).blocks(model).values())).peft)
        # What is in later blocks alone may be in any of the next three stages, each of half the grid.
        assert list(hw) in [[rounded(side / 2**stage) for side in grid] for stage in range(4 if is_late else 1)]


def find_patch(model):
    """The stride of the first block's grid, and which way the stem rounds a size that it does not divide."""
    if isinstance(model, ConvNeXt):
        return 4, math.floor
    return (16 if isinstance(model, VisionTransformer) else 4), math.ceil


def check_gradients(model, size=64) -> None:
    """Every parameter of the method gets a gradient, and no other parameter does."""
    model.init_weights()
    model.train()
    sum(out.square().sum() for out in outputs(model, images(size=size))).backward()
    named = list(model.named_parameters(remove_duplicate=False))  # a shared parameter has several names
    with_gradient = {name for name, p in named if p.grad is not None}
    required = {name for name, p in named if p.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    assert with_gradient == required == method_names(model) - buffers


def off_initial_values(model) -> None:
    """Give all that trains other values than it begins with, some of which are zero."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


def check_stock_base(host, method) -> None:
    """A stock checkpoint loads and leaves out the method alone; once the method is removed, the outputs are the stock
    model's, bit for bit."""
    stock = MODELS.build(host)
    stock.init_weights()
    model = PeftBackbone(base=host, peft=method, fast=False)
    assert load(model, stock.state_dict()) == method_names(model)
    freeze_alike(stock, model)
    off_initial_values(model)
    stock.eval()
    model.eval()
    x = images()
    expected = outputs(stock, x)
    assert not torch.equal(outputs(model, x)[-1], expected[-1])
    remove(model)
    assert_equal(outputs(model, x), expected)


def check_merge(host, method) -> None:
    """A method that is an addition to weights merges into a stock model with the same outputs; any other is refused,
    and the refusal names what cannot be merged."""
    model = PeftBackbone(base=host, peft=method)
    model.init_weights()
    off_initial_values(model)
    model.eval()
    x = images()
    expected = outputs(model, x)
    if unmergeable(model):
        assert set(unmergeable(model)) <= set(types(method))
        with pytest.raises(ConfigError, match=', '.join(unmergeable(model))):
            mona_mm.merge(model)
        assert_equal(outputs(model, x), expected)
    else:
        stock = MODELS.build(host)
        assert not load(stock, merged_state_dict(model))
        stock.eval()  # mmpretrain's returns nothing
        assert_near(outputs(stock, x), expected)


def check_delta(host, method, folder: Path) -> None:
    """A delta holds the method and nothing else, makes of a fresh model on the same base the one that it was written
    of, bit for bit, and is refused on another base."""
    stock = MODELS.build(host)
    stock.init_weights()
    torch.save(stock.state_dict(), folder / 'base.pth')
    base = dict(host, init_cfg=dict(type='Pretrained', checkpoint=str(folder / 'base.pth')))
    source, target = (PeftBackbone(base=base, peft=method) for _ in range(2))
    source.eval()
    target.eval()
    other = PeftBackbone(base=host, peft=method)
    source.init_weights()
    off_initial_values(source)
    file = folder / 'a.delta.safetensors'
    mona_mm.save_delta(source, file)
    assert set(read_delta(file).tensors) == method_names(source)
    mona_mm.load_delta(target, file)
    x = images()
    assert_equal(outputs(target, x), outputs(source, x))
    other.init_weights()
    with pytest.raises(CheckpointMismatchError, match='base'):
        mona_mm.load_delta(other, file)
    file.unlink()


def check_everything(host, method, folder: Path) -> None:
    """All that is promised of a method on a host: what test_hosts.py asks of each pair."""
    check_names(host, method)
    check_stock_base(host, method)
    check_gradients(PeftBackbone(base=host, peft=method))
    check_round_trip(host, method)
    for clone in CLONES.values():
        check_copies(PeftBackbone(base=host, peft=method), clone)
    for size in SIZES.values():
        check_size(PeftBackbone(base=host, peft=method), size)
    for dtype in PRECISIONS:
        trains_in_mixed_precision(host, dict(peft=method), dtype)
    for start in STARTS:
        check_start(host, method, start, folder)
    check_merge(host, method)
    check_delta(host, method, folder)


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


def check_start(host, method, start: str, folder: Path):
    """The method starts from its own initial values whether the base was loaded, initialised, or re-initialised by a
    model-level init_cfg, and the base is what was asked for: what the file has, or what the stock backbone draws."""
    stock = MODELS.build(host)
    torch.save({'state_dict': stock.state_dict()}, folder / 'base.pth')
    base = dict(host)
    if start == 'pretrained':
        base['init_cfg'] = dict(type='Pretrained', checkpoint=str(folder / 'base.pth'))
    model = PeftBackbone(base=base, peft=method)
    model.load_state_dict(stock.state_dict(), strict=False)  # what init_weights leaves alone was drawn by each
    with torch.no_grad():
        for module in method_modules(model):
            for p in module.parameters():
                p.fill_(7.0)
    if start == 'model-level':
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
    if start == 'random':
        torch.manual_seed(5)
        stock.init_weights()
    if start != 'model-level':
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stock.state_dict().items())


def plan_for(host: dict, structured: dict | None) -> Plan:
    """A plan that has everything: in every block sites with modules, whole vectors, single weights of the others."""
    torch.manual_seed(4)
    backbone = MODELS.build(host)
    architecture, descriptor = Architecture.of(backbone), find_host(backbone)
    possible = ('post_attn', 'post_ffn') if structured['type'] == 'Mona' else LINEAR_SITES
    of_kind = [s for s in descriptor.sites if s in possible]
    if structured['type'] == 'Adapter':  # it reads the linear's output
        of_kind = [s for s in of_kind if descriptor.linears[s].is_called]
    sites = {block: tuple({of_kind[i % len(of_kind)], of_kind[(i + 2) % len(of_kind)]})
             for i, block in enumerate(architecture.blocks)}  # fmt: skip
    vectors = [(architecture.class_token, None)] if architecture.class_token else []
    weights: dict[str, list[torch.Tensor]] = {}
    for i, part_ in enumerate(architecture.parts):
        if part_.kind == 'vector' and i % 3 == 0:
            vectors.append((part_.name, part_.rows))
        elif part_.kind == 'vector' or part_.op not in sites.get(part_.block, ()):
            chosen = torch.randperm(part_.numel)[: 1 + part_.numel // 20] + part_.offset
            weights.setdefault(part_.name, []).append(chosen)
    weights = {name: torch.cat(chosen).sort().values for name, chosen in weights.items()}
    return Plan(architecture, structured, sites, tuple(vectors), weights)
