"""Hooks: what trains is said and checked, frozen weights are proved unchanged, checkpoints survive."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import HOSTS, SMALL_SWIN, needs_gpu
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import Images, Score, Toy, log_of, mona_swin, state, stock_swin

from mona_mm import FrozenModel, PeftBackbone
from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.errors import CheckpointMismatchError, ConfigError, FreezeError
from mona_mm.frozen.rules import freeze
from mona_mm.hooks import SafeCheckpointHook
from mona_mm.hooks.checkpoint import AtomicLocalBackend
from mona_mm.hooks.param_freeze import frozen_digests
from mona_mm.optim.constructor import PeftOptimWrapperConstructor


@pytest.mark.parametrize(
    'options',
    ['plain', 'ema', 'accumulate', 'with_cp', 'frozen-bf16', 'amp-bf16-cpu', pytest.param('amp', marks=needs_gpu)],
)
def test_only_what_should_train_moves(make_runner, options, monkeypatch):
    """Training moves the method and the head, no base weight, under EMA, accumulation and checkpointing too; the log
    has the table before and the proof after."""
    kwargs, hooks = {}, [dict(type='mona_mm.ParamFreezeHook')]
    backbone = mona_swin()
    if options == 'ema':
        hooks.append(dict(type='EMAHook'))
    elif options == 'accumulate':
        kwargs['optim_wrapper'] = dict(
            constructor='mona_mm.PeftOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5),
            accumulative_counts=2,
        )
    elif options.startswith('amp'):
        if options == 'amp-bf16-cpu':  # AmpOptimWrapper insists on an accelerator, which bfloat16 does not need
            monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
        kwargs['optim_wrapper'] = dict(
            type='AmpOptimWrapper',
            dtype='bfloat16' if options == 'amp-bf16-cpu' else 'float16',
            constructor='mona_mm.PeftOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5),
        )
    elif options == 'frozen-bf16':
        backbone = mona_swin(frozen_dtype='bfloat16')
    elif options == 'with_cp':
        backbone = PeftBackbone(base=dict(SMALL_SWIN, with_cp=True), peft=dict(type='Mona', bottleneck=8))
    runner = make_runner(backbone, hooks, epochs=2, **kwargs)
    before = state(runner.model)
    # init_weights re-initialises the random base before training: compare from there on
    runner.register_hook(Recorder(before), priority='LOWEST')
    runner.train()
    moved = {name for name, t in state(runner.model).items() if not torch.equal(t, before[name])}
    trainable = {name for name, p in runner.model.named_parameters() if p.requires_grad}
    assert moved == trainable
    log = log_of(runner)
    assert log.count('What trains:') == 1 and 'method (Mona)' in log and 'of base and method' in log
    assert 'frozen parameters are unchanged, bit for bit' in log
    assert 'requires_grad=False' not in log and 'paramwise_options' not in log


@pytest.mark.parametrize('rate', [0.5, 1])
@pytest.mark.parametrize('host', ['mmdet-swin', 'mmpretrain-vit'])
def test_layer_decay(host, rate):
    """Block i of L trains at rate ** (L + 1 - i), what comes before the first at rate ** (L + 1), the rest at 1.

    Another factor of a parameter is multiplied with it, and a method has the factor of its block.
    """
    backbone = PeftBackbone(base=HOSTS[host], peft=dict(type='Mona', bottleneck=8), trainable='all')
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(4, 4)))
    constructor = PeftOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        dict(layer_decay_rate=rate, custom_keys={'head': dict(lr_mult=3.0), 'norm2': dict(lr_mult=0.1)}),
    )
    groups = constructor(model).optimizer.param_groups
    factors = {id(p): group['lr'] / 0.1 for group in groups for p in group['params']}
    pattern, count = {
        'mmdet-swin': (r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.', sum(HOSTS['mmdet-swin']['depths'])),
        'mmpretrain-vit': (r'backbone\.layers\.(\d+)\.', HOSTS['mmpretrain-vit']['arch']['num_layers']),
    }[host]
    order = list(dict.fromkeys(m[0] for name in factors_by_name(model, factors) if (m := re.match(pattern, name))))
    assert len(order) == count
    for name, factor in factors_by_name(model, factors).items():
        block = re.match(pattern, name)
        if block:
            expected = rate ** (count - order.index(block[0]))
        elif name.startswith('head'):
            expected = 3.0
        elif re.match(r'backbone\.(norm\d|ln\d)\.', name):
            expected = 1.0
        elif '.downsample.' in name:  # as the block before it
            stage = re.match(r'backbone\.stages\.\d+\.', name)[0]
            expected = rate ** (count - max(i for i, path in enumerate(order) if path.startswith(stage)))
        else:
            expected = rate ** (count + 1)
        assert factor == pytest.approx(expected * (0.1 if 'norm2' in name else 1)), name


def factors_by_name(model: nn.Module, factors: dict[int, float]) -> dict[str, float]:
    return {name: factors[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_layer_decay_is_refused():
    config = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    for rate in (0, 1.5, '0.7', True):
        with pytest.raises(ConfigError, match='layer_decay_rate'):
            PeftOptimWrapperConstructor(config, dict(layer_decay_rate=rate))(PeftBackbone(base=HOSTS['mmdet-swin']))
    with pytest.raises(ConfigError, match='this model has none'):
        PeftOptimWrapperConstructor(config, dict(layer_decay_rate=0.7))(nn.Linear(2, 2))


class Recorder(Hook):
    def __init__(self, into: dict) -> None:
        self.into = into

    def before_train(self, runner):
        self.into.update(state(runner.model))


def test_optimizer_gets_only_what_trains(make_runner):
    """Frozen parameters are in no group, with and without a paramwise_cfg, and the decay exceptions hold by name."""
    for paramwise in (None, dict(custom_keys={'norm': dict(decay_mult=0.0), 'head': dict(lr_mult=0.1)})):
        runner = make_runner(mona_swin())
        wrapper = runner.build_optim_wrapper(
            dict(
                type='OptimWrapper',
                constructor='mona_mm.PeftOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5),
                paramwise_cfg=paramwise,
            )
        )
        decay = {id(p): g['weight_decay'] for g in wrapper.optimizer.param_groups for p in g['params']}
        named = {name: p for name, p in runner.model.named_parameters() if p.requires_grad}
        assert decay.keys() == {id(p) for p in named.values()}
        for name, p in named.items():
            assert decay[id(p)] == (0.0 if paramwise and 'norm' in name else 0.5), name
        rate = {id(p): g['lr'] for g in wrapper.optimizer.param_groups for p in g['params']}
        for name, p in named.items():
            assert rate[id(p)] == pytest.approx(0.01 if paramwise and 'head' in name else 0.1), name
        assert len(wrapper.optimizer.param_groups) == (3 if paramwise else 1)


def test_hook_alone_freezes_a_stock_model(make_runner):
    """On a stock config in one process the hook freezes by its rules, and the optimizer drops what it froze."""
    runner = make_runner(stock_swin(), [dict(type='mona_mm.ParamFreezeHook', trainable=['backbone.stages.1', 'head'])])
    before = {}
    runner.register_hook(Recorder(before), priority='LOWEST')
    runner.train()
    moved = {name for name, t in state(runner.model).items() if not torch.equal(t, before[name])}
    assert moved == {n for n, _ in runner.model.named_parameters() if n.startswith(('backbone.stages.1.', 'head.'))}
    held = {id(p) for g in runner.optim_wrapper.optimizer.param_groups for p in g['params']}
    assert held == {id(p) for p in runner.model.parameters() if p.requires_grad}


def test_hook_alone_refuses_a_wrapped_model(make_runner):
    """Under DDP freezing in a hook is too late: refused, and FrozenModel is named."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        runner = make_runner(
            stock_swin(), [dict(type='mona_mm.ParamFreezeHook', trainable=['head'])], wrap=MMDistributedDataParallel
        )
        with pytest.raises(FreezeError, match=r'already wrapped in MMDistributedDataParallel.*mona_mm\.FrozenModel'):
            runner.train()
    finally:
        torch.distributed.destroy_process_group()


def test_hook_rules_that_match_nothing_or_contradict(make_runner):
    with pytest.raises(ConfigError, match="trainable='hedd'.*'head'"):
        make_runner(stock_swin(), [dict(type='mona_mm.ParamFreezeHook', trainable='hedd')]).train()
    with pytest.raises(FreezeError, match='ParamFreezeHook.*PeftBackbone'):
        make_runner(mona_swin(), [dict(type='mona_mm.ParamFreezeHook', trainable=['backbone.norm0', 'head'])]).train()
    make_runner(mona_swin(), [dict(type='mona_mm.ParamFreezeHook', trainable='head')]).train()  # agrees


def test_nothing_trainable_is_an_error(make_runner):
    runner = make_runner(FrozenModel(base=SMALL_SWIN, trainable='none'), [dict(type='mona_mm.ParamFreezeHook')])
    freeze(runner.model.head, 'none')
    hook = next(h for h in runner.hooks if type(h).__name__ == 'ParamFreezeHook')
    with pytest.raises(FreezeError, match='No parameter of the model trains'):
        hook.before_train(runner)


class Vandal(Hook):
    """Changes a frozen weight behind the optimizer's back, or thaws it."""

    def __init__(self, thaw: bool) -> None:
        self.thaw = thaw

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        weight = runner.model.backbone.stages[0].blocks[0].attn.w_msa.qkv.weight
        if self.thaw:
            weight.requires_grad = True
        else:
            weight.data[3, 5] += 1e-6


@pytest.mark.parametrize('thaw', [False, True])
def test_a_changed_frozen_weight_is_found_at_the_next_checkpoint(make_runner, tmp_path, thaw):
    """One weight moved by 1e-6: training stops before the checkpoint is written, and the weight is named."""
    runner = make_runner(mona_swin(), [dict(type='mona_mm.ParamFreezeHook')], epochs=3)
    runner.register_hook(Vandal(thaw))
    with pytest.raises(FreezeError, match=r'1 parameters .*stages\.0\.blocks\.0\.attn\.w_msa\.qkv\.weight'):
        runner.train()
    assert not list((tmp_path / 'work').glob('*.pth'))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_digests_see_any_single_change(dtype):
    """Every bit flip of one element changes the digest; NaN payloads and signed zeros count, too."""
    model = nn.Linear(7, 5).to(dtype)
    freeze(model, 'none')
    reference = frozen_digests(model)['weight']
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[model.weight.element_size()]
    bits = model.weight.data.view(integers)
    for element in [(2, 3), (4, 6)]:  # the last one is beyond the last whole 64-bit word
        for bit in range(8 * model.weight.element_size()):
            flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(integers)
            bits[element] ^= flip
            assert frozen_digests(model)['weight'] != reference, (element, bit)
            bits[element] ^= flip
    assert frozen_digests(model)['weight'] == reference


# Checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(work_dir: Path) -> set[str]:
    return {p.name for p in work_dir.iterdir() if p.suffix in ('.pth', '.partial')}


def test_atomic_put_leaves_the_old_file(tmp_path, monkeypatch):
    """A write that fails half-way (a full disk) leaves the old file whole and no rubbish."""
    backend = AtomicLocalBackend()
    backend.put(b'old', tmp_path / 'file')

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        backend.put(b'new', tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_outdated_checkpoints_go_only_after_the_new_one(make_runner, tmp_path, monkeypatch):
    """With max_keep_ckpts=1 the old file is still there while the new one is written, and gone afterwards."""
    work = tmp_path / 'work'
    seen = []
    put = AtomicLocalBackend.put

    def spy(self, obj, filepath):
        if str(filepath).endswith('.pth'):
            seen.append((Path(filepath).name, checkpoints(work)))
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', spy)
    make_runner(
        mona_swin(), epochs=3, checkpoint=dict(type='mona_mm.SafeCheckpointHook', max_keep_ckpts=1, interval=1)
    ).train()
    assert seen == [('epoch_1.pth', set()), ('epoch_2.pth', {'epoch_1.pth'}), ('epoch_3.pth', {'epoch_2.pth'})]
    assert checkpoints(work) == {'epoch_3.pth'}
    assert Path((work / 'last_checkpoint').read_text()).name == 'epoch_3.pth'


def test_a_failing_save_keeps_the_last_good_checkpoint(make_runner, tmp_path, monkeypatch):
    """The disk fills while epoch 2 is saved: epoch 1 is still there, is what `last_checkpoint` names, and loads."""
    work = tmp_path / 'work'
    put = AtomicLocalBackend.put

    def fails_later(self, obj, filepath):
        if 'epoch_2' in str(filepath):
            raise OSError(28, 'No space left on device')
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', fails_later)
    hook = dict(type='mona_mm.SafeCheckpointHook', max_keep_ckpts=1, interval=1)
    with pytest.raises(OSError, match='No space left'):
        make_runner(mona_swin(), epochs=3, checkpoint=hook).train()
    assert checkpoints(work) == {'epoch_1.pth'}
    last = (work / 'last_checkpoint').read_text()
    assert read_checkpoint(last)['meta']['epoch'] == 1


def test_the_pointer_to_the_last_checkpoint_is_written_whole(make_runner, tmp_path, monkeypatch):
    """A failure while `last_checkpoint` is written leaves the one before."""
    put = AtomicLocalBackend.put
    written = []

    def fails_the_second_time(self, obj, filepath):
        if Path(filepath).name == 'last_checkpoint':
            written.append(filepath)
            if len(written) == 2:
                raise OSError(28, 'No space left on device')
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', fails_the_second_time)
    with pytest.raises(OSError, match='No space left'):
        make_runner(mona_swin(), epochs=2).train()
    assert (tmp_path / 'work' / 'last_checkpoint').read_text().endswith('epoch_1.pth')


def test_best_checkpoint_survives_too(make_runner, tmp_path, monkeypatch):
    """The previous best goes only after the new best is written; half-written files of a killed run are cleared."""
    work = tmp_path / 'work'
    work.mkdir()
    (work / 'epoch_1.pth.123.partial').write_bytes(b'half')
    seen = []
    put = AtomicLocalBackend.put

    def spy(self, obj, filepath):
        if Path(filepath).name.startswith('best'):
            seen.append({n for n in checkpoints(work) if n.startswith('best')})
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', spy)
    scores = iter([0.1, 0.2])
    monkeypatch.setattr(Score, 'compute_metrics', lambda self, results: dict(score=next(scores)))
    loader = DataLoader(Images(), batch_size=2, sampler=DefaultSampler(Images(), shuffle=False))
    make_runner(
        mona_swin(),
        epochs=2,
        checkpoint=dict(
            type='mona_mm.SafeCheckpointHook', interval=1, max_keep_ckpts=1, save_best='score', rule='greater'
        ),
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=dict(type=Score),
    ).train()
    assert seen == [set(), {'best_score_epoch_1.pth'}]
    assert checkpoints(work) == {'epoch_2.pth', 'best_score_epoch_2.pth'}


def test_other_storage_is_refused():
    with pytest.raises(ConfigError, match='local files only'):
        SafeCheckpointHook(backend_args=dict(backend='petrel'))


# Loading ---------------------------------------------------------------------------------------------------------


def test_load_from_that_does_not_fit_is_refused(make_runner, tmp_path):
    """`load_from` of a stock model fits a model with a method; another head or backbone is refused by name."""
    check = [dict(type='mona_mm.LoadCheckHook')]
    stock = Toy(stock_swin()).state_dict()
    torch.save(dict(state_dict=stock), tmp_path / 'stock.pth')
    make_runner(mona_swin(), check, load_from=str(tmp_path / 'stock.pth')).train()

    stock['head.weight'] = torch.zeros(3, 48)
    torch.save(dict(state_dict=stock), tmp_path / 'head.pth')
    with pytest.raises(CheckpointMismatchError, match=r'head\.pth .*head\.weight \(3, 48\) instead of \(1, 48\)'):
        make_runner(mona_swin(), check, load_from=str(tmp_path / 'head.pth')).train()


def test_resuming_without_the_method_is_refused(make_runner, tmp_path):
    """A checkpoint of the run without its adapters cannot be resumed."""
    runner = make_runner(mona_swin())
    runner.train()
    path = (tmp_path / 'work' / 'last_checkpoint').read_text()
    checkpoint = read_checkpoint(path)
    checkpoint['state_dict'] = {k: v for k, v in checkpoint['state_dict'].items() if '.peft.' not in k}
    torch.save(checkpoint, path)
    check = [dict(type='mona_mm.LoadCheckHook')]
    with pytest.raises(CheckpointMismatchError, match=r'missing: backbone\.stages\.0\.blocks\.0\.peft\.'):
        make_runner(mona_swin(), check, epochs=2, load_from=path, resume=True).train()
