"""Strategies: processes that share a model train as one, send what trains, and write one delta that loads anywhere."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import assert_equal, assert_near, in_processes, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from strategy_runs import (
    BACKBONES,
    STRATEGIES,
    TUNINGS,
    Case,
    batch,
    build,
    count_sent,
    run,
    run_and_resume,
    run_in_parts,
    train_cases,
    trained,
)

from mona_mm.checkpoint.delta import load_delta, save_delta
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.loading import load_from_delta
from mona_mm.commands.cli import join_process_group
from mona_mm.config.strategy import use_strategy
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.frozen.half_precision import kept_weights
from mona_mm.hooks import LoadCheckHook
from mona_mm.strategies.parts import load_part, read_part
from mona_mm.strategies.sharded import sharded_parameters
from mona_mm.type_names import enter_scope

# Methods of every kind, on one of the hosts by one of the strategies in turn, which also meet a checkpointed backbone,
# accumulated gradients and a synchronised norm in turn.
SOME = [
    Case(
        host=list(BACKBONES)[i % 2],
        tuning=tuning,
        strategy=list(STRATEGIES)[i % 3],
        optimizer='adamw',
        checkpointed=i % 4 < 2,
        accumulated=1 + i % 2,
        dtype='float64',
        norm=i % 5 < 2,
    )
    for i, tuning in enumerate(('full', 'mona', 'colin', 'parax', 'rein', 'partial-1', 'spt-lora', 'bitfit'))
]


def differences(cases: list[Case], folder: Path, world: int, steps: int) -> dict[Case, tuple[float, str]]:
    """The largest difference, as a share of its tensor's largest value, between what several processes end with and
    what one does on the whole batches, and the name of that tensor."""
    in_processes(world, folder, train_cases, cases, str(folder), steps, seconds=550)
    found, expected = {}, {}
    for number, case in enumerate(cases):
        alone = replace(case, strategy='ddp')
        if alone not in expected:
            expected[alone] = trained(alone, folder, steps)
        tensors = torch.load(folder / f'{number}.pt')
        assert tensors.keys() == expected[alone].keys()
        found[case] = max(
            ((tensors[name] - t).abs().max().item() / max(t.abs().max().item(), 0.01), name)
            for name, t in expected[alone].items()
        )
    return found


def test_two_processes_equal_one(tmp_path):
    """Under every strategy two processes end, after steps of AdamW, where one on the joint batches does."""
    found = differences(SOME, tmp_path, 2, 3)
    assert {case: each for case, each in found.items() if each[0] > 1e-6} == {}


def test_weights_in_half_precision_are_sharded(tmp_path):
    """With frozen_dtype the weights in half precision are sharded, by FSDP1 too, and the steps are those of DDP."""
    cases = [Case('vit', 'lora-bfloat16', strategy) for strategy in STRATEGIES]
    in_processes(2, tmp_path, train_cases, cases, str(tmp_path), 2)
    ddp, fsdp, fsdp2 = (torch.load(tmp_path / f'{number}.pt') for number in range(3))
    assert_near(fsdp, ddp, 1e-6, least=0.01)
    assert_near(fsdp2, ddp, 1e-6, least=0.01)
    model = build(cases[0], tmp_path)
    assert {p.dtype for p in sharded_parameters(model)} == {torch.bfloat16}
    assert sharded_parameters(model) == set(kept_weights(model.backbone))


@pytest.mark.slow
@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('tuning', [tuning for tuning in TUNINGS if tuning != 'lora-bfloat16'])
def test_every_method_under_every_strategy(tuning, world, tmp_path):
    """Two and four processes after ten steps of AdamW, with activation checkpoints, accumulated gradients and, on the
    Swin, a synchronised norm in the head."""
    cases = [
        Case(host, tuning, strategy, 'adamw', checkpointed=True, accumulated=2, dtype='float64', norm=host == 'swin')
        for host, strategy in product(BACKBONES, STRATEGIES)
    ]
    found = differences(cases, tmp_path, world, 10)
    for case, (difference, name) in found.items():
        print(f'{world} processes, {case.host}, {tuning}, {case.strategy}: {difference:.1e}, {name}')
    assert {case: each for case, each in found.items() if each[0] > 1e-6} == {}


def test_runs_deltas_and_resuming(tmp_path):
    """A run by each strategy writes one delta for each checkpoint, equal to that of the others and of one process, on
    the same base; a run that one strategy began another finishes as if nothing had happened; and the delta of one is
    what another starts from."""
    base = tmp_path / 'base.pth'
    cases = [Case('vit', 'mona', strategy, dtype='float64') for strategy in STRATEGIES]
    torch.save(MODELS.build(BACKBONES['vit']).double().state_dict(), base)
    in_processes(2, tmp_path, run_and_resume, cases, str(tmp_path), str(base))
    run(cases[0], tmp_path, 2, 'alone', str(base))
    expected = read_delta(tmp_path / 'alone/epoch_2.delta.safetensors')
    for number in range(len(cases)):
        for name in ('whole', 'resumed'):
            found = read_delta(tmp_path / f'{number}-{name}/epoch_2.delta.safetensors')
            assert_near(found.tensors, expected.tensors, 1e-9, least=0.01)
            assert found.header.base == expected.header.base and found.header.progress['iter'] == 4
        files = {path.name for path in (tmp_path / f'{number}-whole').iterdir() if path.is_file()}
        assert {'epoch_1.pth', 'epoch_2.pth', 'epoch_1.delta.safetensors', 'epoch_2.delta.safetensors'} <= files
        assert not any(name.endswith('.partial') for name in files)
        assert (tmp_path / f'{number}-from-delta/epoch_1.delta.safetensors').exists()


def test_what_a_step_sends(tmp_path):
    """What trains is averaged once, byte for byte; of sharded weights every block is gathered for the forward pass and
    again for the backward pass; where all trains and is sharded, its gradients are scattered instead."""
    cases = [Case(host, 'mona', strategy) for host in BACKBONES for strategy in STRATEGIES]
    cases += [Case('vit', 'partial-1', 'ddp'), Case('vit', 'full', 'fsdp'), Case('vit', 'full', 'fsdp2')]
    in_processes(2, tmp_path, count_sent, cases, str(tmp_path))
    found = pickle.loads((tmp_path / 'sent.pickle').read_bytes())
    for case, sent in found.items():
        print(case.host, case.tuning, case.strategy, sent)
        padding = 1.05  # of shards of unequal size
        if case.tuning == 'full':
            assert sent.averaged == 0 and sent.sharded == sent.trained
            assert sent.trained <= sent.scattered <= padding * sent.trained
        else:
            assert sent.averaged == sent.trained and sent.scattered == 0
        assert (sent.gathered == 0) == (case.strategy == 'ddp')
        assert sent.sharded <= sent.gathered <= 2 * padding * sent.sharded or not sent.sharded


@pytest.mark.slow
def test_a_model_whose_trained_weights_are_sharded(tmp_path):
    """Where nothing is frozen the weights and the state of the optimizer are gathered for a checkpoint, which goes on
    under another strategy, or on one process, as on its own."""
    base = tmp_path / 'base.pth'
    cases = [Case('vit', 'full', strategy, dtype='float64') for strategy in ('fsdp2', 'fsdp')]
    torch.save(MODELS.build(BACKBONES['vit']).double().state_dict(), base)
    in_processes(2, tmp_path, run_and_resume, cases, str(tmp_path), str(base), False)
    run(cases[0], tmp_path, 2, 'alone', str(base))
    expected = torch.load(tmp_path / 'alone/epoch_2.pth', weights_only=False)
    for name in ('0-whole', '0-resumed', '1-whole', '1-resumed'):
        found = torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)
        assert_near(found['state_dict'], expected['state_dict'], 1e-9, least=0.01)
        assert found['optimizer']['state'].keys() == expected['optimizer']['state'].keys()
        for number, state in expected['optimizer']['state'].items():
            assert_near(found['optimizer']['state'][number]['exp_avg'], state['exp_avg'], 1e-9, least=1e-3)
    alone = run(cases[0], tmp_path, 2, 'resumed', str(base), load_from=f'{tmp_path}/1-whole/epoch_1.pth', resume=True)
    assert_near(alone.state_dict(), expected['state_dict'], 1e-9, least=0.01)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('c++') is None, reason='DeepSpeed compiles what it sends by on a CPU')
def test_deepspeed(demo_data, tmp_path, monkeypatch):
    """A run by DeepSpeed on two processes, stopped after one of two epochs and resumed from its folder, writes the
    deltas of one by mmengine's own Runner on two, as near as two sums of two numbers are."""
    pytest.importorskip('deepspeed')
    monkeypatch.setenv('DS_ACCELERATOR', 'cpu')
    settings = [
        '--cfg-options',
        f'data_root={demo_data}',
        'train_cfg.val_interval=9',
        'randomness.seed=0',
        'default_hooks.checkpoint.max_keep_ckpts=-1',
    ]

    def train(name: str, *options: str) -> None:
        file = str(ROOT / 'configs/demo/demo_mona_shapes.py')
        command = ['bash', str(ROOT / 'tools/dist_train.sh'), file, '2', '--work-dir', str(tmp_path / name)]
        done = subprocess.run(
            [*command, *options, *settings], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]

    environment = dict(os.environ, PYTHON=sys.executable, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    train('plain')
    train('deepspeed', '--strategy', 'deepspeed')
    whole = read_delta(tmp_path / 'deepspeed/epoch_2.delta.safetensors').tensors
    assert_near(whole, read_delta(tmp_path / 'plain/epoch_2.delta.safetensors').tensors, 1e-5, least=1e-3)
    shutil.rmtree(tmp_path / 'deepspeed/epoch_2.pth')
    (tmp_path / 'deepspeed/last_checkpoint').write_text(str(tmp_path / 'deepspeed/epoch_1.pth'))
    train('deepspeed', '--strategy', 'deepspeed', '--resume')
    assert_equal(read_delta(tmp_path / 'deepspeed/epoch_2.delta.safetensors').tensors, whole)


@pytest.mark.slow
def test_sharded_checkpoints(tmp_path):
    """Each process writes its part, from which a run goes on bit for bit, and the delta beside it is whole; the parts
    are refused on another number of processes, and for another model."""
    base = tmp_path / 'base.pth'
    cases = [
        Case('vit', tuning, strategy, dtype='float64') for tuning in ('full', 'mona') for strategy in ('fsdp', 'fsdp2')
    ]
    torch.save(MODELS.build(BACKBONES['vit']).double().state_dict(), base)
    in_processes(2, tmp_path, run_in_parts, cases, str(tmp_path), str(base))
    for number, case in enumerate(cases):
        first, again = (torch.load(tmp_path / f'{number}-{name}.pt') for name in ('whole', 'resumed'))
        assert_equal(again, first)
        files = sorted(path.name for path in (tmp_path / f'{number}-whole/epoch_2.pth').iterdir())
        assert files == ['rank0.pth', 'rank1.pth']
        delta = tmp_path / f'{number}-whole/epoch_2.delta.safetensors'
        assert delta.exists() == (case.tuning == 'mona')
        if delta.exists():
            tensors = read_delta(delta).tensors
            assert_equal(tensors, {name: first[name] for name in tensors})
    folder = str(tmp_path / '0-whole/epoch_1.pth')
    with pytest.raises(CheckpointMismatchError, match='parts of 2 processes, and there are 4'):
        read_part(folder, 0, 4)
    with pytest.raises(CheckpointMismatchError, match='another name or shape'):
        load_part(build(Case('vit', 'mona'), tmp_path).state_dict(), read_part(folder, 0, 2)['state_dict'], folder)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_the_command_line(strategy, detector_config, tmp_path):
    """tools/train.py trains, validates and resumes the demo's detector by every strategy, on two processes; the delta,
    which is written once, is one of one process's model."""
    detector_config.train_cfg.max_epochs = 2
    detector_config.train_cfg.val_interval = 2
    detector_config.dump(tmp_path / 'config.py')
    arguments = str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work')
    options = '--launcher', 'pytorch', '--strategy', strategy
    out = in_processes(2, tmp_path, run_tool, 'train.py', *arguments, *options)
    assert out.count('frozen parameters are unchanged') == 1 and 'coco/bbox_mAP' in out
    deltas = sorted(path.name for path in (tmp_path / 'work').glob('*.delta.safetensors'))
    assert deltas == ['epoch_2.delta.safetensors']
    in_processes(
        2, tmp_path, run_tool, 'train.py', *arguments, *options, '--resume', '--cfg-options', 'train_cfg.max_epochs=3'
    )
    enter_scope(detector_config)
    model = MODELS.build(detector_config.model)
    load_delta(model, tmp_path / 'work/epoch_3.delta.safetensors', allow_other_base=True)
    whole = torch.load(tmp_path / 'work/epoch_3.pth', weights_only=False)['state_dict']
    assert model.state_dict().keys() == whole.keys()
    assert_equal(
        {name: t for name, t in model.state_dict().items() if '.peft.' in name},
        {name: t for name, t in whole.items() if '.peft.' in name},
    )


@pytest.mark.slow
def test_where_float32_leaves_adamw(tmp_path):
    """In float32 two processes equal one to 1e-6 too, but for the keys' biases under AdamW. Softmax does not see what
    is added to all scores, so their gradients are nothing but rounding, which AdamW divides by its own size; and the
    outputs do not see it either."""
    cases = [Case('vit', tuning, 'ddp', 'adamw') for tuning in ('partial-1', 'bitfit')]
    in_processes(2, tmp_path, train_cases, cases, str(tmp_path), 10)
    for number, case in enumerate(cases):
        expected, found = trained(case, tmp_path, 10), torch.load(tmp_path / f'{number}.pt')
        outputs = []
        for tensors in (expected, found):
            model = build(case, tmp_path)
            model.load_state_dict(tensors, strict=False)
            outputs.append(model.eval()(batch(20, case.dtype)['inputs']).detach())
        assert_near(outputs[1], outputs[0], 1e-6)
        for name in [name for name in expected if name.endswith('qkv.bias')]:
            for tensors in (expected, found):
                tensors[name].view(3, -1)[1] = 0
        assert_near(found, expected, 1e-6, least=0.01)

    for dtype, most in (('float32', 1e-6), ('float64', 1e-15)):
        model = build(replace(cases[0], dtype=dtype), tmp_path)
        model(**batch(0, dtype), mode='loss')['loss'].backward()
        query, key, value = model.backbone.layers[-1].attn.qkv.bias.grad.view(3, -1).abs().amax(1)
        assert key < most * min(query, value)


def test_names_of_mmengines_own_strategies(tmp_path):
    """A state dict with `module.` before every name, as mmengine's DDPStrategy hands to hooks, makes the same delta;
    its FSDPStrategy, which would skip most of a delta, is refused one."""
    model = build(Case('vit', 'mona'), tmp_path)
    averaged = {f'module.{name}': t + 1 for name, t in model.state_dict().items()}
    save_delta(model, tmp_path / 'a.delta.safetensors', state_dict=averaged)
    for name, tensor in read_delta(tmp_path / 'a.delta.safetensors').tensors.items():
        assert_equal(tensor, model.state_dict()[name] + 1)
    strategy = object.__new__(MMENGINE_STRATEGIES.get('FSDPStrategy'))
    runner = SimpleNamespace(strategy=strategy, cfg={}, _resume=False, _load_from='a.delta.safetensors')
    with pytest.raises(ConfigError, match='mona_mm.FSDPStrategy'):
        LoadCheckHook().after_load_checkpoint(runner, load_from_delta(str(tmp_path / 'a.delta.safetensors')))


@pytest.mark.parametrize(
    ('strategy', 'settings', 'message'),
    [
        ('ddp', {}, 'for several processes.*dist_train.sh'),
        ('fsdp', dict(launcher='pytorch', custom_hooks=[dict(type='EMAHook')]), 'EMAHook.*--strategy ddp'),
        ('deepspeed', dict(launcher='pytorch'), 'pip install'),
    ],
)
def test_what_the_command_line_refuses(strategy, settings, message, monkeypatch):
    """One process, a hook that averages a sharded model, a package that is not there: one line with the way out."""
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=message):
        use_strategy(Config(settings), strategy)


@pytest.mark.parametrize('launcher', ['slurm', 'mpi', 'pytorch'])
def test_launchers_on_cpus(launcher, monkeypatch):
    """Each launcher's variables say which process this is; without them the command that sets them is named."""
    names = dict(slurm=('SLURM_PROCID', 'SLURM_NTASKS'), mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'))
    command = dict(slurm='srun', mpi='mpirun', pytorch='torchrun')[launcher]
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr('mona_mm.commands.cli.has_accelerator', lambda: False)
    with pytest.raises(ConfigError, match=command):
        join_process_group(Config(dict(launcher=launcher)))
    if launcher != 'pytorch':
        for name, value in zip((*names[launcher], names[launcher][0].replace('PROCID', 'LOCALID')), '010', strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '0')
        monkeypatch.setattr('torch.distributed.init_process_group', lambda backend: None)
        monkeypatch.setattr('torch.distributed.is_initialized', lambda: 'RANK' in os.environ)
        join_process_group(Config(dict(launcher=launcher)))
        assert (os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK']) == ('0', '1', '0')
