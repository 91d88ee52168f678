"""Memory, descriptors and threads of long runs stay as they were at their beginning."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_models import METHODS, build, trained
from small_runs import by_iterations, config, finished, make_pictures

from mona_mm import load_delta, save_delta

SWITCHES = int(os.environ.get('SWITCHES', 1000))
"""The number of switches between deltas; docs/reliability.md has the figures of one measurement."""


def usage() -> tuple[float, int, int]:
    """The memory in MiB, the open files and the threads of this process."""
    status = Path('/proc/self/status').read_text()
    memory = int(status.partition('VmRSS:')[2].split()[0]) / 1024
    return memory, len(os.listdir('/proc/self/fd')), threading.active_count()


@HOOKS.register_module()
class Usage(Hook):
    """Prints what the process uses, every hundred iterations."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % 100 == 0:
            print('usage', *usage(), flush=True)


@pytest.mark.slow
def test_a_thousand_iterations(tmp_path):
    """With a checkpoint and a delta every ten, two workers, and the hooks of tools/train.py."""
    made = config(make_pictures(tmp_path / 'pictures'), tmp_path / 'work', **by_iterations(1000, every=10))
    made['train_dataloader'].update(num_workers=1, persistent_workers=True)
    made['custom_hooks'].append(dict(type='Usage'))
    run = finished(made)
    assert run.status == [0], run.text[-2000:]
    used = [[float(value) for value in line.split()[1:]] for line in run.lines if line.startswith('usage')]
    print(used)
    assert len(used) == 10
    assert used[-1][0] - used[1][0] < 10 and used[-1][1:] == used[1][1:]


@pytest.mark.slow
def test_many_switches(base_file, tmp_path):
    """Of the deltas of two tasks in one model."""
    for name, method in (('a', dict(METHODS['mona'])), ('b', dict(METHODS['mona'], fast=True))):
        save_delta(trained(base_file, method), tmp_path / f'{name}.delta.safetensors')
    model = build(base_file, METHODS['mona'])
    used = []
    for i in range(SWITCHES):
        load_delta(model, tmp_path / f'{"ab"[i % 2]}.delta.safetensors')
        if (i + 1) % (SWITCHES // 10) == 0:
            used.append(usage())
    print(used)
    assert used[-1][0] - used[1][0] < 10 and used[-1][1:] == used[1][1:]


SIZES = """
import torch
from mona_mm.nn.products import linear
from pathlib import Path

def memory():
    return int(Path('/proc/self/status').read_text().partition('VmRSS:')[2].split()[0]) / 1024

torch.set_num_threads(1)
weights = [torch.randn(shape) for shape in ((288, 96), (96, 384))]
tokens = {weight.shape[1]: torch.randn(800, weight.shape[1]) for weight in weights}
with torch.no_grad():
    for size in range(100, 700):
        for weight in weights:
            linear(tokens[weight.shape[1]][:size], weight)
        if size in (160, 699):
            print(memory())
"""


@pytest.mark.slow
def test_six_hundred_sizes_of_images():
    """What grows on a CPU with every new size of an image are two caches of oneDNN, for 1,024 products each, which two
    variables make smaller: it stays flat then."""
    small = dict(ONEDNN_PRIMITIVE_CACHE_CAPACITY='8', LRU_CACHE_CAPACITY='8')
    environment = {**os.environ, **small, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'}
    result = subprocess.run([sys.executable, '-c', SIZES], env=environment, capture_output=True, text=True, check=True)
    first, last = (float(line) for line in result.stdout.split())
    assert last - first < 20
