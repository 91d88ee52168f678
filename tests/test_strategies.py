"""Strategies: processes that share a model train as one, send what trains, and write one delta that loads anywhere."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import assert_near, in_processes
from mmengine.registry import MODELS
from strategy_runs import BACKBONES, STRATEGIES, TUNINGS, Case, run, run_and_resume, train_cases, trained

from mona_mm.checkpoint.delta_file import read_delta

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
    in_processes(world, folder, train_cases, cases, str(folder), steps)
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
    assert {case: each for case, each in found.items() if each[0] > 1e-9} == {}


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
