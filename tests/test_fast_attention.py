"""The fast window attention computes what the stock one does, forward and backward, wherever it is used."""

import copy
import importlib
import pickle

import pytest
import torch
from conftest import HOSTS
from fast_forms import backbone_pair, kept, step
from helpers import assert_equal, assert_near, pairwise
from torch.autograd.graph import saved_tensors_hooks

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError
from mona_mm.hosts import make_fast
from mona_mm.hosts.window_attention import FastWindowAttention, window_index

SWINS = ['mmdet-swin', 'mmseg-swin', 'mmpretrain-swin']
ATTENTION = dict(
    mmdet='mmdet.models.backbones.swin', mmseg='mmseg.models.backbones.swin', mmpretrain='mmpretrain.models.utils'
)


def attention(library: str = 'mmdet', window: int = 7, shift: int = 3, fast: bool = True, **options):
    """One stock attention module with a trained-looking table, fast or not."""
    torch.manual_seed(0)
    cls = importlib.import_module(ATTENTION[library]).ShiftWindowMSA
    module = cls(embed_dims=24, num_heads=3, window_size=window, shift_size=shift, **options)
    torch.nn.init.normal_(module.w_msa.relative_position_bias_table)
    assert not fast or make_fast(module)
    return module


def run(module, hw, batch=2, seed=0, rounded=False):
    """Output, input gradient, and gradients of what trains; for numbers that bfloat16 has if `rounded`."""
    torch.manual_seed(seed)
    dtype = module.w_msa.qkv.weight.dtype
    x, cotangent = (torch.randn(batch, hw[0] * hw[1], 24) for _ in range(2))
    if rounded:
        x, cotangent = x.bfloat16(), cotangent.bfloat16()
    x, cotangent = x.to(dtype).requires_grad_(), cotangent.to(dtype)
    module.zero_grad()
    out = module(x, hw)
    (out * cotangent).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def train_only(model, *names):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(names) if names else False)
    return model


@pytest.mark.parametrize(
    ('library', 'windows', 'hw', 'batch', 'trains'),
    pairwise(
        ('mmdet', 'mmpretrain'),
        {'7': (7, 0), '7-shifted': (7, 3), '12': (12, 0), '12-shifted': (12, 6)},
        [(14, 14), (24, 36), (13, 29), (7, 12), (5, 6), (1, 30), (7, 7), (12, 12)],
        (1, 3),
        dict(frozen=(), bitfit=('_bias_table', 'bias'), full=('',)),
    ),
)
def test_equals_stock(library, windows, hw, batch, trains):
    """Output and every gradient within 1e-5: whole and padded maps, shifted windows, maps smaller than a window."""
    window, shift = windows
    options = dict(pad_small_map=True) if library == 'mmpretrain' else {}
    stock, fast = (attention(library, window, shift, f, **options) for f in (False, True))
    for module in (stock, fast):
        train_only(module, *trains)
    assert_near(run(fast, hw, batch), run(stock, hw, batch))


@pytest.mark.parametrize(
    ('window_of', 'form', 'batch', 'trains'),
    pairwise(
        [(7, (14, 21)), (7, (13, 29)), (7, (5, 6)), (12, (20, 30)), (12, (24, 12))],
        ('autocast', 'autocast-shifted', 'pure'),
        (1, 2),
        dict(frozen=(), trains=('_bias_table',)),
    ),
)
def test_bfloat16_is_close(window_of, form, batch, trains):
    """bfloat16, by autocast and of the whole module: the types of the stock module, finite, and as near to float32 as
    it is (within twice its distance); whole and padded maps, shifted windows, a map smaller than a window.
    (Shifted, the stock module cannot be bfloat16 itself: its mask is float32.)"""
    (window, hw), results = window_of, {}
    form, _, shifted = form.partition('-')
    for name, fast, low in (('exact', False, False), ('stock', False, True), ('fast', True, True)):
        module = train_only(attention(window=window, shift=window // 2 if shifted else 0, fast=fast), *trains)
        if form == 'pure':
            module = module.bfloat16()  # the same rounded weights and input for all three
        if low or form == 'autocast':
            with torch.autocast('cpu', torch.bfloat16, enabled=low and form == 'autocast'):
                results[name] = run(module, hw, batch)
        else:
            results[name] = run(module.float(), hw, batch, rounded=True)
    for exact, stock, fast in zip(*results.values(), strict=True):
        assert fast.isfinite().all() and fast.dtype == stock.dtype
        exact, stock, fast = exact.float(), stock.float(), fast.float()
        assert (fast - exact).norm() <= 2 * (stock - exact).norm() + 1e-3


def test_double_precision():
    """In float64 the difference is rounding alone, so the formula is the same."""
    stock, fast = (train_only(attention(fast=f).double(), '_bias_table') for f in (False, True))
    assert_near(run(fast, (13, 29)), run(stock, (13, 29)), 1e-12)


def test_small_maps_of_classification():
    """mmpretrain without `pad_small_map`: a map as narrow as a window is not shifted; a narrower one is refused by
    name."""
    stock, fast = (attention('mmpretrain', fast=f) for f in (False, True))
    for hw in ((7, 7), (7, 20), (14, 14)):
        assert_near(run(fast, hw), run(stock, hw))
    with pytest.raises(ConfigError, match='6 tokens.*window of 7.*pad_small_map=True'):
        fast(torch.randn(1, 60, 24), (6, 10))
    with pytest.raises(ValueError, match='59 tokens.*6 x 10'):
        fast(torch.randn(1, 59, 24), (6, 10))


def check_against_stock(fast, hw=(10, 17), **options):
    """`fast` computes what a stock module with its weights does."""
    stock = attention(fast=False, **options).to(fast.w_msa.qkv.weight.dtype)
    stock.load_state_dict(fast.state_dict())
    train_only(stock)
    assert_near(run(fast, hw), run(stock, hw))


def test_masks_follow_their_table():
    """Masks are kept while the table is the same, and made anew after loading, changing in place, moving, and
    exchanging the table in any way."""
    fast = train_only(attention())
    table = fast.w_msa.relative_position_bias_table
    check_against_stock(fast)
    kept = fast._masks
    check_against_stock(fast)
    assert fast._masks is kept, 'they are made once'
    fast.load_state_dict(attention(shift=0, fast=False).state_dict())
    check_against_stock(fast)
    with torch.no_grad():
        table.mul_(-2)
    check_against_stock(fast)
    fast.double()
    check_against_stock(fast)
    fast.half().float()  # other values, perhaps at the old address
    check_against_stock(fast)
    fast.w_msa.relative_position_bias_table = torch.nn.Parameter(torch.randn_like(table), requires_grad=False)
    check_against_stock(fast)
    fast.w_msa.relative_position_bias_table.data.mul_(3)  # leaves no trace; mmengine's EMAHook does so
    fast.eval()
    check_against_stock(fast)
    with torch.inference_mode():
        fast.train()
        fast(torch.randn(1, 170, 24), (10, 17))
    check_against_stock(fast)  # what was made in inference mode is fit for training


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_are_fast_and_independent(clone):
    """A copy is fast itself, carries no masks, and does not see later changes of its source."""
    fast = train_only(attention())
    before = run(fast, (10, 17))
    twin = clone(fast)
    assert isinstance(twin, FastWindowAttention)
    assert twin._masks is None
    with torch.no_grad():
        fast.w_msa.relative_position_bias_table.zero_()
    assert_equal(run(twin, (10, 17)), before)
    check_against_stock(twin)
    assert (run(fast, (10, 17))[0] != before[0]).any()


def test_bounded_memory_of_sizes():
    """Multi-scale training meets hundreds of sizes: indices are kept for the last few, masks do not depend on size."""
    window_index.cache_clear()
    fast = train_only(attention())
    for side in range(10, 90):
        fast(torch.randn(1, side * 12, 24), (side, 12))
    assert window_index.cache_info().currsize <= window_index.cache_info().maxsize <= 64
    assert [tuple(mask.shape) for mask in fast._masks[2]] == [(1, 3, 49, 49)] * 4


@pytest.mark.parametrize('p', ['attn_drop_rate', 'proj_drop_rate', 'dropout_layer'])
def test_dropouts_draw_the_stock_numbers(p):
    """In training, what is dropped is the same for the same seed: probabilities, outputs, whole branches."""
    value = dict(type='DropPath', drop_prob=0.5) if p == 'dropout_layer' else 0.3
    stock, fast = (attention(shift=0, fast=f, **{p: value}) for f in (False, True))
    assert_near(run(fast, (14, 20), batch=4), run(stock, (14, 20), batch=4))
    shifted = attention(fast=True, **{p: value})
    again = run(shifted, (14, 20), seed=1)
    assert any((a != b).any() for a, b in zip(run(shifted, (14, 20)), again, strict=True))


def test_hooks_inside_are_called():
    """Whoever hooks what the fast form leaves out gets the stock path; hooks on the linears are called either way."""
    fast, seen = attention(), []
    fast.w_msa.qkv.register_forward_hook(lambda m, args, out: seen.append('qkv'))
    fast.w_msa.proj.register_forward_hook(lambda m, args, out: seen.append('proj'))
    fast.drop.register_forward_hook(lambda m, args, out: seen.append('drop'))
    expected = run(fast, (10, 17))
    assert seen == ['qkv', 'proj', 'drop']
    fast.w_msa.softmax.register_forward_hook(lambda m, args, out: seen.append('softmax'))
    assert_near(run(fast, (10, 17)), expected)
    assert seen[3:] == ['qkv', 'softmax', 'proj', 'drop']


def test_backward_hooks_inside_are_called():
    fast, seen = attention(), []
    fast.w_msa.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
    assert_near(run(fast, (10, 17)), run(attention(fast=False), (10, 17)))
    assert len(seen) == 1


def test_a_trace_can_be_saved(tmp_path):
    """torch.jit.trace sees stock operations alone, whose graph can be written to a file and used for other images."""
    module, hw = attention().eval().requires_grad_(False), (10, 17)
    traced = torch.jit.trace(lambda x: module(x, hw), torch.randn(2, 170, 24))
    traced.save(str(tmp_path / 'trace.pt'))
    x = torch.randn(2, 170, 24)
    assert_near([torch.jit.load(str(tmp_path / 'trace.pt'))(x)], [module(x, hw)])


METHODS = {
    'full': dict(),
    'fixed': dict(trainable='none'),
    'bitfit': dict(trainable='bias'),
    'norm_tuning': dict(trainable='norm'),
    'partial_1': dict(trainable='last_block'),
    'lora': dict(peft=dict(type='LoRA', rank=4, sites=['q', 'v', 'proj', 'fc1'])),
    'adapter': dict(peft=dict(type='Adapter', bottleneck=8, dropout=0.0)),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', SWINS)
def test_backbones_are_equal(name, method):
    """Whole backbones in train mode with seeded DropPath: outputs and the gradient of everything that trains."""
    stock, fast = backbone_pair(HOSTS[name], **METHODS[method])
    assert sum(isinstance(m, FastWindowAttention) for m in fast.modules()) == 5
    assert not any(isinstance(m, FastWindowAttention) for m in stock.modules())
    assert stock.state_dict().keys() == fast.state_dict().keys()
    fast.train()
    stock.train()
    assert_near(step(fast), step(stock), 5e-5)


@pytest.mark.parametrize(
    ('window', 'method', 'autocast'),
    pairwise((7, 12), ('full', 'bitfit', 'adapter', 'mona'), dict(float32=False, bfloat16=True)),
)
def test_backbones_of_one_odd_image(window, method, autocast):
    """One image whose maps are padded in every stage, window 7 and 12: within 5e-5 in float32; in bfloat16 by autocast
    as near to float32 as the stock backbone is (within twice its distance)."""
    options = METHODS.get(method, dict(peft=dict(type='Mona', bottleneck=8, dropout=0.0)))
    stock, fast = backbone_pair(dict(HOSTS['mmdet-swin'], window_size=window), **options)
    fast.eval()
    stock.eval()
    exact = step(stock, (75, 101), 1)
    if not autocast:
        assert_near(step(fast, (75, 101), 1), exact, 5e-5)
        return
    results = []
    for model in (stock, fast):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            results.append(step(model, (75, 101), 1))
    least = 1e-4 * max(e.norm() for e in exact[4:])  # some gradients vanish but for rounding
    for e, s, f in zip(exact, *results, strict=True):
        assert f.dtype == s.dtype and f.isfinite().all()
        e, s, f = e.float(), s.float(), f.float()
        assert (f - e).norm() <= 2 * (s - e).norm() + max(1e-3 * e.norm(), least)


def test_activation_checkpointing():
    """`with_cp=True` changes nothing, masks trained or kept."""
    for method in ('full', 'adapter'):
        results = [
            step(backbone_pair(dict(HOSTS['mmdet-swin'], with_cp=cp), **METHODS[method])[1]) for cp in (False, True)
        ]
        assert_near(*results)


@pytest.mark.parametrize('fast', [True, False])
def test_nothing_is_kept_below_what_trains(fast):
    """Fixed: nothing at all. Partial-1: nothing at all until the last block begins, and no gradient below it."""
    host = dict(HOSTS['mmdet-swin'], out_indices=(3,))
    x = torch.randn(1, 3, 128, 128)
    assert not kept(PeftBackbone(base=host, trainable='none', fast=fast), x)
    partial, full = (PeftBackbone(base=host, trainable=t, fast=fast) for t in ('last_block', 'all'))
    assert sum(kept(partial, x).values()) < 0.1 * sum(kept(full, x).values())
    inputs = []
    for block in (block for stage in partial.stages for block in stage.blocks):
        block.register_forward_pre_hook(lambda m, args: inputs.append(args[0].requires_grad))
    partial(x)
    assert not any(inputs)
    before = []
    storages = {}
    last = partial.stages[-1].blocks[-1]
    last.register_forward_pre_hook(lambda m, args: before.append(dict(storages)))
    with saved_tensors_hooks(lambda t: storages.setdefault(id(t), t), lambda t: t):
        partial(x)
    assert before == [{}] and storages


def test_no_matrix_of_scores_is_kept():
    """Under frozen weights attention keeps queries, keys, values, output and one number a token and head, where the
    stock module keeps the probabilities, too."""
    sizes = []
    for fast in (True, False):
        module = train_only(attention(window=12, shift=6, fast=fast))
        sizes.append(sum(kept(module, torch.randn(1, 48 * 48, 24).requires_grad_(), (48, 48)).values()))
    unit = 4 * 48 * 48 * 24
    assert sizes[0] < 4.5 * unit
    assert sizes[1] > 20 * unit


def test_lora_on_q_and_v_keeps_no_second_qkv():
    """Both branches are added to the output of qkv in one step, with the gradients of the padded additions."""
    stock, fast = backbone_pair(HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=4))
    calls = [m for m in fast.modules() if isinstance(m, torch.nn.Linear) and m._forward_hooks]
    assert len(calls) == 5
    assert all(len(m._forward_hooks) == 1 for m in calls)
    assert_near(step(fast), step(stock), 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16'])
def test_compiled(frozen_dtype):
    """`compile` changes no name and, within rounding, no output or gradient; the whole backbone is one graph. With the
    backend that traces forward and backward, which needs no C++ compiler."""
    torch._dynamo.reset()
    host = dict(HOSTS['mmdet-swin'], depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))
    peft = dict(type='LoRA', rank=4)
    options = dict(base=host, peft=peft, frozen_dtype=frozen_dtype)
    plain = PeftBackbone(**options)
    compiled = PeftBackbone(**options, compile=dict(backend='aot_eager', fullgraph=True))
    plain.eval()
    compiled.eval()
    compiled.load_state_dict(plain.state_dict())
    assert_near(step(compiled), step(plain))
    assert type(copy.deepcopy(compiled)) is type(plain)
    torch._dynamo.reset()
