"""Kept features: those of the same image and the same weights, and no others."""

import copy
import pickle

import pytest
import torch
from conftest import HOSTS
from helpers import assert_equal, assert_near
from mmengine.dataset import DefaultSampler
from mmengine.runner import load_checkpoint
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader
from toy_runs import Images, Score, log_of, state

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError, FreezeError
from mona_mm.hosts import find_host
from mona_mm.record import record_of

STILL = {name: dict(host, drop_path_rate=0.0) for name, host in HOSTS.items()}
WITH_END = [name for name in HOSTS if 'swinv2' not in name and ('swin' in name or 'vit' in name)]
COMMON_WITH_END = ('mmdet-swin', 'mmpretrain-swin', 'mmpretrain-vit')
CASES = [
    pytest.param((name, rule), id=f'{name}-{rule}', marks=[] if common else [pytest.mark.slow])
    for rule, names in (('partial_1', WITH_END), ('fixed', HOSTS))
    for name in names
    for common in [(name in COMMON_WITH_END) == (rule == 'partial_1')]
]
"""Every rule on every host that has something to keep; `make test` has every host once."""


@pytest.fixture(params=CASES)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """The same backbone without and with kept features."""
    return make_pair(*request.param)


def make_pair(host: str, rule: str, gib: float = 1.0, **options) -> tuple[nn.Module, nn.Module]:
    plain, kept = (PeftBackbone(base=STILL[host], trainable=rule, cache_features=of, **options) for of in (None, gib))
    plain.init_weights()
    kept.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, kept):
        model.train()
    return plain, kept


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(8))


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    model.zero_grad()
    outs = model(x)
    loss = sum((out * torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:])).sum() for out in outs)
    if loss.requires_grad:
        loss.backward()
    return [*(out.detach() for out in outs), *(p.grad for p in model.parameters() if p.requires_grad)]


def blocks_run(model: nn.Module) -> list[str]:
    """The paths of the blocks that run from now on, in order."""
    ran = []
    for path, block in find_host(model).blocks(model).items():
        block.register_forward_pre_hook(lambda m, args, path=path: ran.append(path))
    return ran


def found(model: nn.Module) -> tuple[int, int]:
    return record_of(model).feature_cache.found, record_of(model).feature_cache.requested


def test_bit_for_bit_in_batches_of_one(pair):
    """Every image, computed and found, in training and evaluation: the outputs and gradients of a backbone that keeps
    nothing. Of what is found only the last block runs, and only where it trains. Outputs are a list where the host's
    are a list."""
    plain, kept = pair
    ran = blocks_run(kept)
    *_, last = find_host(kept).blocks(kept)
    for epoch in range(3):
        for model in (plain, kept):
            model.train(epoch != 1)
        for x in images(3).split(1):
            assert_equal(step(kept, x), step(plain, x))
        if epoch:
            assert set(ran) <= {last} and len(ran) == 3 * bool(record_of(kept).freeze.trainable)
            assert found(kept) == (3, 3)
        ran.clear()
    assert len(record_of(kept).feature_cache.features) == 3
    for x in (images(1), torch.randn(1, 3, 64, 64)):
        assert type(kept(x)) is type(plain(x))


def test_batches_composed_anew(pair):
    """Batches of other images, some found, some not, one twice: within rounding what is computed at once."""
    plain, kept = pair
    x = images(6)
    for of in ([0, 1], [2, 0, 3], [3, 2, 1, 0], [4], [5, 4, 4], [0, 1, 2, 3, 4, 5]):
        assert_near(step(kept, x[of]), step(plain, x[of]))
    assert found(kept) == (0 + 1 + 4 + 0 + 2 + 6, 19)
    wide = x.view(6, 3, 32, 128)  # other images, of the same bytes
    assert_near(step(kept, wide), step(plain, wide))
    assert found(kept)[0] == 13


@pytest.mark.parametrize('case', [('mmdet-swin', 'fixed'), ('mmpretrain-vit', 'partial_1')], ids='-'.join)
def test_never_of_other_weights(case, tmp_path):
    """However the frozen weights change, or what comes behind them, features are those of the weights there are."""
    plain, kept = make_pair(*case)
    other = PeftBackbone(base=STILL[case[0]], trainable=case[1])
    other.init_weights()
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    name = next(n for n, p in kept.named_parameters() if n.endswith('.weight') and p.dim() == 2)
    weight, begun = kept.get_parameter(name), copy.deepcopy(kept.state_dict())

    def exchange():  # as mmengine's EMAHook does
        for mine, theirs in zip(kept.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        kept.eval()

    def swap_two():
        weight.data[[0, 1]] = weight.data[[1, 0]]
        kept.train()

    changes = dict(
        in_place=lambda: nn.init.normal_(weight, std=0.1),
        initialise=kept.init_weights,
        state_dict=lambda: kept.load_state_dict(begun, strict=False),
        checkpoint=lambda: load_checkpoint(kept, str(tmp_path / 'other.pth')),
        data=lambda: setattr(weight, 'data', torch.randn_like(weight) * 0.1),
        parameter=lambda: kept.get_submodule(name.removesuffix('.weight')).register_parameter(
            'weight', nn.Parameter(torch.randn_like(weight) * 0.1, requires_grad=False)
        ),
        halves=lambda: kept.half().float(),  # other values, perhaps at the old address
        no_trace=exchange,
        places=swap_two,
        last=lambda: [nn.init.normal_(p, std=0.1) for p in kept.parameters() if p.requires_grad],
    )
    x = images(1)
    before = step(kept, x)
    for of, change in changes.items():
        change()
        weight = kept.get_parameter(name)
        plain.load_state_dict(kept.state_dict(), strict=False)
        plain.train(kept.training)
        expected = step(plain, x)
        assert of == 'last' or not torch.equal(expected[0], before[0]), f'{of} changes nothing'
        for _ in range(2):
            assert_equal(step(kept, x), expected)
        before = expected


def test_kept_while_the_weights_are_the_same():
    """Switching modes, loading the same weights again, exchanging them there and back, and training the last block
    drop nothing."""
    plain, kept = make_pair('mmdet-swin', 'partial_1')
    x = images(2)
    step(kept, x)

    def there_and_back():
        weights = [p.data.clone() for p in kept.parameters()]
        for p in kept.parameters():
            p.data.zero_()
        for p, weight in zip(kept.parameters(), weights, strict=True):
            p.data.copy_(weight)
        kept.train()

    for change in (
        kept.eval,
        lambda: kept.load_state_dict(plain.state_dict(), strict=False),
        there_and_back,
        lambda: [nn.init.normal_(p, std=0.1) for p in kept.parameters() if p.requires_grad],
    ):
        change()
        record_of(kept).feature_cache.found = record_of(kept).feature_cache.requested = 0
        step(kept, x)
        assert found(kept) == (2, 2)


def test_precision_is_part_of_the_key():
    """Features in float32 are not found under autocast, and the other way round."""
    plain, kept = make_pair('mmdet-swin', 'partial_1')
    x = images(1)
    for _ in range(2):
        for low in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=low):
                assert_equal(step(kept, x), step(plain, x))
    assert found(kept) == (2, 4) and len(record_of(kept).feature_cache.features) == 2


def test_the_type_of_the_image_is_part_of_the_key():
    """The same bytes are other numbers in another type."""
    plain, kept = make_pair('mmdet-swin', 'fixed', frozen_dtype='bfloat16')
    x = images(1).half()
    first, second = (step(kept, each) for each in (x, x.view(torch.bfloat16)))
    assert_equal(first, step(plain, x))
    assert_equal(second, step(plain, x.view(torch.bfloat16)))
    assert found(kept) == (0, 2) and not torch.equal(first[0].float(), second[0].float())


@pytest.mark.parametrize('rule', ['fixed', 'partial_1'])
def test_with_frozen_weights_in_half_precision(rule):
    """Both options at once give what the one gives alone."""
    plain, kept = make_pair('mmpretrain-swin', rule, frozen_dtype='bfloat16')
    for _ in range(2):
        assert_equal(step(kept, images(1)), step(plain, images(1)))
    assert found(kept) == (1, 2)


def test_what_inference_mode_computed_can_be_trained_on():
    plain, kept = make_pair('mmdet-swin', 'partial_1')
    x = images(3)
    with torch.inference_mode():
        kept(x[:1])
        kept(x[:2])
    assert_near(step(kept, x), step(plain, x))
    assert found(kept) == (3, 6)


def test_a_full_memory(make_runner, caplog):
    """No more than the limit is kept; the rest is computed, and stays so; it is said once."""
    _, measured = make_pair('mmdet-swin', 'partial_1')
    measured(images(1))
    each = record_of(measured).feature_cache.bytes
    assert each == sum(t.nbytes for t in [*measured(images(1))[:-1], torch.empty(4, 192)])
    plain, kept = make_pair('mmdet-swin', 'partial_1', gib=2.5 * each / 2**30)
    runner = make_runner(kept)
    for epoch in range(3):
        for x in images(4).split(1):
            assert_equal(step(kept, x), step(plain, x))
        assert found(kept) == (2 * epoch, 4 * (epoch + 1))
    assert record_of(kept).feature_cache.bytes == 2 * each
    assert log_of(runner).count('cache_features are full: the features of 2 images are kept') == 1
    for model in (plain, kept):  # the features of other weights have all of the memory again
        torch.manual_seed(6)
        nn.init.normal_(model.stages[0].blocks[0].ffn.layers[1].weight, std=0.1)
    for _ in range(2):
        for x in images(4).split(1):
            assert_equal(step(kept, x), step(plain, x))
    assert record_of(kept).feature_cache.bytes == 2 * each and len(record_of(kept).feature_cache.features) == 2


@pytest.mark.parametrize('rule', ['fixed', 'partial_1'])
def test_kept_features_are_their_own(rule):
    """Who changes outputs in place changes no features; an image that is twice in a batch is kept and counted once; no
    storage is larger than what is counted."""
    plain, kept = make_pair('mmdet-swin', rule)
    x = images(2)[[0, 1, 0]]
    for _ in range(2):
        outputs = kept(x)
        with torch.no_grad():
            for out in outputs:
                out.zero_()
    assert_near(step(kept, x), step(plain, x))
    features = record_of(kept).feature_cache.features.values()
    tensors = [t for each in features for t in (*each.outputs, each.tokens) if t is not None]
    assert len(features) == 2
    for sizes in ([t.nbytes for t in tensors], [t.untyped_storage().nbytes() for t in tensors]):
        assert record_of(kept).feature_cache.bytes == sum(sizes)


def test_an_address_is_not_used_again():
    """The memory of weights that were exchanged is held until that is noticed: no others can be at their addresses."""
    _, kept = make_pair('mmdet-swin', 'fixed')
    step(kept, images(1))
    weight = kept.stages[0].blocks[0].ffn.layers[1].weight
    memory, other = StorageWeakRef(weight.untyped_storage()), torch.randn_like(weight)
    weight.data = other
    assert not memory.expired()
    step(kept, images(1))
    assert memory.expired()


def test_buffers_are_followed():
    """What a host computes with and is no parameter, such as SwinV2's table of coordinates, may change as well."""
    plain, kept = make_pair('mmpretrain-swinv2', 'fixed')
    before = step(kept, images(1))
    for model in (plain, kept):
        next(b for name, b in model.named_buffers() if name.endswith('relative_coords_table')).mul_(-3)
    after = step(kept, images(1))
    assert_equal(after, step(plain, images(1)))
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('rule', ['fixed', 'partial_1'])
def test_copies_begin_empty(clone, rule):
    """A copy has none of the features, keeps its own, and computes with its own weights; no state dict has any."""
    plain, kept = make_pair('mmpretrain-vit', rule)
    x = images(1)
    expected = step(kept, x)
    assert kept.state_dict().keys() == plain.state_dict().keys()
    twin = clone(kept)
    assert not record_of(twin).feature_cache.features and record_of(twin).feature_cache.gib == 1.0
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    for _ in range(2):
        assert not torch.equal(step(twin, x)[0], expected[0])
    assert record_of(twin).feature_cache.found == 1
    twin.eval()
    assert kept.training and not twin.training
    assert_equal(step(kept, x), expected)


def test_gradients_to_the_image_are_computed():
    """Who asks for them gets them, and nothing is kept."""
    plain, kept = make_pair('mmdet-swin', 'fixed')
    gradients = []
    for model in (plain, kept):
        model(images(1))
        x = images(1).requires_grad_()
        sum(out.square().sum() for out in model(x)).backward()
        gradients.append(x.grad)
    assert_equal(gradients[:1], gradients[1:])


@pytest.mark.parametrize('rule', ['fixed', 'partial_1'])
def test_a_run_is_the_same(rule, make_runner, tmp_path):
    """Three epochs of mmengine's Runner with an EMAHook, in batches of one: every weight, the averaged ones included,
    is what it is without the cache, bit for bit; from the second epoch on every image is found."""
    results = []
    for gib in (None, 0.1):
        torch.manual_seed(0)
        loader = DataLoader(Images(), batch_size=1, sampler=DefaultSampler(Images(), shuffle=False))
        runner = make_runner(
            PeftBackbone(base=STILL['mmdet-swin'], trainable=rule, cache_features=gib),
            [dict(type='EMAHook', momentum=0.3), dict(type='mona_mm.ParamFreezeHook')],
            epochs=3,
            train_dataloader=loader,
            val_dataloader=loader,
            val_cfg=dict(),
            val_evaluator=dict(type=Score),
            randomness=dict(seed=4),
        )
        runner.train()
        saved = torch.load(tmp_path / 'work' / 'epoch_3.pth', weights_only=False)
        results.append({**state(runner.model), **{f'saved {k}': v for k, v in saved['state_dict'].items()}})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
    log = log_of(runner)
    assert 'found for 0 of 4 images; those of 4 images are kept' in log
    assert log.count('found for 4 of 4 images') >= 3 and 'are dropped' not in log


def test_what_thaws_is_found():
    """Frozen weights that train all of a sudden would get no gradient: an error, and not silence."""
    _, kept = make_pair('mmdet-swin', 'fixed')
    kept(images(1))
    kept.stages[0].blocks[0].norm1.weight.requires_grad = True
    with pytest.raises(FreezeError, match=r'stages\.0\.blocks\.0\.norm1\.weight \(trains\)'):
        kept(images(1))


STILL_SWIN = STILL['mmdet-swin']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(peft=dict(type='Mona', bottleneck=8)), r"Mona trains stages\.0\.blocks\.0\.peft\.post_attn.*'partial_1'"),
        (dict(trainable='full'), r"trainable=\['full'\] trains norm0"),
        (dict(trainable='bitfit'), r"trainable=\['bitfit'\] trains"),
        (dict(trainable=['partial_1', 'norm3']), r'trains norm3\.bias'),
        (dict(), r"trainable=\['all'\] trains"),
        (dict(trainable='fixed', base=HOSTS['mmdet-swin']), r'0\.blocks\.1\.\S+ drops at random.*drop_path_rate=0'),
        (dict(trainable='partial_1', base=dict(STILL_SWIN, drop_rate=0.1)), r'drop_after_pos drops at random .*0\.1'),
        (dict(trainable='fixed', base=dict(STILL_SWIN, attn_drop_rate=0.1)), r'attn_drop drops at random'),
        (
            dict(trainable='fixed', base=dict(HOSTS['mmpretrain-vit'], drop_path_rate=0.3)),
            r'layers\.1\.\S+ drops at random',
        ),
        (dict(trainable='partial_1', base=dict(STILL_SWIN, out_indices=(0, 1))), r'partial_1.*out_indices=\(0, 1\)'),
        (dict(trainable='partial_1', base=STILL['mmdet-pvtv2']), r"'partial_1' supports only .*SwinTransformer"),
        (dict(trainable='fixed', cache_features=0), r'cache_features=0 must be a number above 0'),
        (dict(trainable='fixed', cache_features=True), r'cache_features=True must be'),
        (dict(trainable='fixed', cache_features='2'), r"cache_features='2' must be"),
        (dict(trainable='fixed', compile=True), r'cache_features and compile exclude each other'),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(options, message):
    """One error that names what changes the features, and the fix."""
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(**{**dict(base=STILL_SWIN, cache_features=1.0), **options})


def test_a_forward_of_its_own():
    """A subclass that goes on after the last block is refused where that trains, and served where nothing does."""
    from mmdet.models.backbones.swin import SwinTransformer

    class Scaled(SwinTransformer):
        def forward(self, x):
            return [2 * out for out in super().forward(x)]

    base = {**STILL_SWIN, 'type': Scaled}
    with pytest.raises(ConfigError, match="'partial_1' supports only"):
        PeftBackbone(base=base, trainable='partial_1', cache_features=1)
    kept = PeftBackbone(base=base, trainable='fixed', cache_features=1)
    assert_equal(list(kept(images(1))), list(kept(images(1))))
