"""One model, several threads: nothing about a call is kept where another call could find it."""

import copy
import sys
import threading

import pytest
import torch
from adapted import COVER, HOSTS, METHODS, adapted, assert_close, image
from helpers import pairwise
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

import mona_mm
from mona_mm.backbone import PeftBackbone
from mona_mm.errors import ConfigError, UserError
from mona_mm.record import record_of

SIZES = [(64, 96), (96, 64), (64, 64), (32, 96)]


def together(*works) -> list:
    """Run functions in threads that change as often as the interpreter allows; what they return, or raise here."""
    results: list = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(i):
        start.wait()
        try:
            results[i] = works[i]()
        except BaseException as error:
            results[i] = error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def training_step(model, size):
    """Outputs and gradients of what trains, without a trace on the model."""
    outputs = model(image(*size))
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2)) for o in outputs]
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize(
    ('host', 'method', 'fast'),
    pairwise(
        list(HOSTS),
        list(METHODS),
        (True, False),
        common=lambda host, method, fast: (
            (host, method) in COVER and (fast == 'True' or (host == 'Swin' and method in ('Mona', 'LoRA')))
        ),
    ),
)
def test_four_threads_get_what_one_gets(host, method, fast):
    """Images of four shapes, predicted and trained on at once: bit for bit the results of one after the other, and the
    model is as it was."""
    model = adapted(host, method, fast=fast)
    attributes = {path: set(vars(m)) for path, m in model.named_modules()}

    def predict(size):
        with torch.no_grad():
            return model(image(*size))

    predicted, trained = [predict(s) for s in SIZES], [training_step(model, s) for s in SIZES[:2]]
    works = [lambda s=s: [predict(s) for _ in range(3)] for s in SIZES[2:]]
    works += [lambda s=s: [training_step(model, s) for _ in range(2)] for s in SIZES[:2]]
    found = together(*works)
    for all_, expected in zip(found, predicted[2:] + trained, strict=True):
        for each in all_:
            for a, b in zip(each, expected, strict=True):
                assert torch.equal(a, b)
    for size, expected in zip(SIZES, predicted, strict=True):
        assert all(map(torch.equal, predict(size), expected))
    # No new attribute either, which a thread that copies the model at the same time would stumble over.
    assert {path: set(vars(m)) for path, m in model.named_modules()} == attributes


@pytest.mark.parametrize('around', ['with_cp', 'module', 'call'])
@pytest.mark.parametrize('host', ['ViT', 'Swin'])
def test_recomputed_in_another_thread(host, around):
    """What a checkpoint computes again, later and in another thread, after images of other shapes have passed, is on
    the grid of its own image."""
    model = adapted(host, 'Mona')
    expected = training_step(model, (64, 96))
    blocks = [(p, m) for p, m in model.named_modules() if hasattr(m, 'hooked')]
    for path, block in blocks:
        if around == 'with_cp':
            block.with_cp = True
        elif around == 'module':
            parent, _, name = path.rpartition('.')
            model.get_submodule(parent)._modules[name] = CheckpointWrapper(block)
        else:  # as mmengine's activation_checkpointing does
            block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    outputs = model(image(64, 96))
    model(image(96, 64))
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2)) for o in outputs]
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    (gradients,) = together(lambda: torch.autograd.grad(total, parameters))
    assert_close([*(o.detach() for o in outputs), *gradients], expected)


def test_a_checkpoint_within_a_block_says_so():
    """Only a part of a block recomputed, a Mona in it: nobody can know the grid; an Adapter does not ask."""
    for method, refused in (('Mona in the branches', True), ('Adapter', False)):
        model = adapted('ViT', method)
        for block in model.layers:
            block.ffn = CheckpointWrapper(block.ffn)
        if refused:
            with pytest.raises(ConfigError, match='put the checkpoint around the whole block'):
                training_step(model, (64, 96))
        else:
            assert_close(training_step(model, (64, 96)), training_step(adapted('ViT', method), (64, 96)))


def test_a_copy_has_its_own_blocks():
    model = adapted('ViT', 'Mona')
    twin = copy.deepcopy(model)
    expected = model(image(64, 96))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(map(torch.equal, twin(image(64, 96)), expected))


@pytest.mark.parametrize(('host', 'rule'), [('Swin', 'fixed'), ('Swin', 'partial_1'), ('ViT', 'partial_1')])
def test_a_feature_cache_shared_by_threads(host, rule):
    """Features that several threads compute and find at once are those of their own images."""
    base = dict(HOSTS[host], drop_path_rate=0.0)
    model = PeftBackbone(base, trainable=rule, cache_features=1.0).eval()
    plain = PeftBackbone(base, trainable=rule).eval()
    plain.load_state_dict(model.state_dict())
    images = [image(*size, seed=i) for i, size in enumerate(SIZES)]

    def work(order):
        with torch.no_grad():
            return [(i, model(images[i])) for _ in range(3) for i in order]

    with torch.no_grad():
        expected = [plain(x) for x in images]
    for found in together(*(lambda k=k: work([(i + k) % 4 for i in range(4)]) for k in range(4))):
        for i, outputs in found:
            assert_close(outputs, expected[i])
    assert len(record_of(model).feature_cache.features) == 4
    assert record_of(model).feature_cache.requested == 48


def test_answers_are_wholly_of_one_delta(tmp_path):
    """Threads that predict within `reading` while others load deltas get outputs of one delta or of another."""
    model = adapted('Swin', 'Mona')
    files, expected, x = [], [], image(32, 32)
    for i in range(3):
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_(std=0.3)
            expected.append(model(x))
        files.append(tmp_path / f'{i}.delta.safetensors')
        mona_mm.save_delta(model, files[-1])

    def predict():
        wrong = 0
        for _ in range(20):
            with torch.no_grad(), mona_mm.reading(model), mona_mm.reading(model):
                outputs = model(x)
            wrong += not any(all(map(torch.equal, outputs, each)) for each in expected)
        return wrong

    def load(k):
        for i in range(8):
            mona_mm.load_delta(model, files[(i + k) % 3])
        return 0

    assert together(predict, predict, lambda: load(0), lambda: load(1)) == [0, 0, 0, 0]
    with mona_mm.reading(model), pytest.raises(UserError, match='mona_mm.reading'):
        mona_mm.load_delta(model, files[0])
    mona_mm.load_delta(model, files[1])
    with torch.no_grad():
        assert all(map(torch.equal, model(x), expected[1]))
    copy.deepcopy(model)  # which has no lock
