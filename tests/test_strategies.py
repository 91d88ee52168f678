"""Strategies: processes that share a model train as one, send what trains, and write one delta that loads anywhere."""

from itertools import product

import pytest
import torch
from helpers import assert_near, in_processes
from strategy_runs import BACKBONES, STRATEGIES, TUNINGS, Case, train_cases, trained
from suite import supports


def check(cases: list[Case], folder, world: int, steps: int) -> dict[Case, float]:
    """Several processes end, in every case, where one on the whole batches does."""
    in_processes(world, folder, train_cases, cases, str(folder), steps)
    largest, expected = {}, {}
    for number, case in enumerate(cases):
        alone = Case(**{**vars(case), 'strategy': 'ddp'})
        if alone not in expected:
            expected[alone] = trained(alone, folder, steps)
        found = torch.load(folder / f'{number}.pt')
        assert found.keys() == expected[alone].keys()
        differences = {
            name: (found[name] - t).abs().max().item() / max(t.abs().max().item(), 0.01)
            for name, t in expected[alone].items()
        }
        name = max(differences, key=differences.get)
        print(case, f'{differences[name]:.1e}', name)
        largest[case] = differences[name]
    return largest


def test_two(tmp_path):
    cases = [
        Case('swin', 'mona', 'fsdp', 'adamw', checkpointed=True, accumulated=2, norm=True),
        Case('vit', 'spt-lora', 'fsdp2', 'sgd'),
        Case('vit', 'lora-bfloat16', 'fsdp', 'sgd'),
        Case('vit', 'lora-bfloat16', 'fsdp2', 'sgd'),
        Case('swin', 'full', 'fsdp', 'sgd', checkpointed=True, accumulated=2, norm=True),
        Case('swin', 'full', 'fsdp2', 'sgd', checkpointed=True, accumulated=2, norm=True),
    ]
    print(check(cases, tmp_path, 2, 10))
