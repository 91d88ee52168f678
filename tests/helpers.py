"""What several test modules use and that is no fixture: comparisons that hold on every processor, pairs of options,
processes of their own."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def named_pairs(actual: Tensors, expected: Tensors) -> list[tuple[str, Tensor, Tensor]]:
    """Each tensor beside the one that it is compared with; two collections must have the same names and lengths."""
    if isinstance(expected, Tensor):
        return [('the tensor', actual, expected)]
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        return [(name, actual[name], tensor) for name, tensor in expected.items()]
    assert len(actual) == len(expected) > 0
    return [(f'tensor {i}', a, b) for i, (a, b) in enumerate(zip(actual, expected, strict=True))]


def assert_near(actual: Tensors, expected: Tensors, relative: float = 1e-5, least: float = 0.0) -> None:
    """Every tensor is equal to the expected one within ``relative`` times the largest value of that one.

    A tolerance that is relative to each element, or absolute, holds on the processor that it was made on: another one
    adds the same numbers in another order, and the error of a sum is in proportion to what was added, not to what is
    left. Shapes and types must be equal.

    Args:
        actual: A tensor, or several in a sequence or by name.
        expected: The same of what is right.
        relative: The largest difference as a share of the expected tensor's largest value: 1e-5 suits float32, whose
            numbers have seven digits, and 1e-12 float64.
        least: What counts as the largest value where it is smaller. It is for tensors that are zero but for rounding,
            such as the gradient of a key's bias, or an input of zeros.
    """
    for name, a, b in named_pairs(actual, expected):
        assert a.shape == b.shape and a.dtype == b.dtype, f'{name}: {a.shape}, {a.dtype} and not {b.shape}, {b.dtype}'
        if b.numel() and not torch.equal(a, b):
            difference, scale = largest(a.double() - b.double()), max(largest(b), least)
            check(name, difference, relative * scale)


def largest(tensor: Tensor) -> float:
    """The largest absolute value of a tensor; that of a tensor with a NaN is NaN."""
    return tensor.detach().abs().max().item()


def check(name: str, difference: float, tolerance: float) -> None:
    """The comparison itself; a difference that is NaN does not pass."""
    assert difference <= tolerance, f'{name} differs by {difference:.2e}, and {tolerance:.2e} is allowed'


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    """Every tensor is equal to the expected one bit for bit, type included."""
    for name, a, b in named_pairs(actual, expected):
        assert a.dtype == b.dtype and torch.equal(a, b), f'{name} differs'


def pairwise(
    *factors: Iterable,
    possible: Callable[..., bool] = lambda *row: True,
    common: Callable[..., bool] = lambda *row: True,
) -> list:
    """Every possible combination of the factors' values, as parameters of a test.

    A fault that shows only where three options meet is rare, so `make test` covers every pair of values: a small set of
    combinations in which each possible pair occurs is left as it is, and the others are marked slow, for `make
    test-all`. The choice is made in the order of the values and is always the same.

    Args:
        factors: The values of each parameter, as mappings by their names in the test's id, or as sequences of values
            whose text is their name. Values of the test are the mapping's values.
        possible: Of the names of one combination, whether there is such a case.
        common: Of the names of one combination, whether `make test` is to have such a case at all.
    """
    named = [factor if isinstance(factor, Mapping) else {str(value): value for value in factor} for factor in factors]
    rows = [row for row in product(*named) if possible(*row)]
    covers = [set(combinations(enumerate(row), 2)) if common(*row) else set() for row in rows]
    left, chosen = set().union(*covers), set()
    while left:
        best = max(range(len(rows)), key=lambda i: (len(covers[i] & left), -i))
        left -= covers[best]
        chosen.add(best)
    return [
        pytest.param(
            *(values[name] for values, name in zip(named, row, strict=True)),
            id='-'.join(row),
            marks=[] if i in chosen else [pytest.mark.slow],
        )
        for i, row in enumerate(rows)
    ]


def command(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, from the root of the checkout unless `cwd` says another folder."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.run(
        [sys.executable, *arguments], cwd=kwargs.pop('cwd', ROOT), env=environment, capture_output=True, text=True
    )


def scores(log: str) -> list[str]:
    """The AP values of the last evaluation in a log."""
    last = [line for line in log.splitlines() if 'coco/bbox_mAP:' in line][-1]
    return re.findall(r'coco/(?:bbox|segm)_mAP\w*: [-\d.]+', last)


def in_processes(count: int, folder: Path, target: Callable, *arguments: object, seconds: int = 300) -> str:
    """What a function prints in ``count`` processes with the environment and the store that torchrun gives them.

    They are forked from this process, which has imported the libraries: that takes each process of its own ten seconds.
    Where there is a GPU, autograd has threads that do not survive this, and they are forked from a server.

    Args:
        count: The number of processes.
        folder: Where their outputs are kept.
        target: A function of a module, :func:`run_tool` for one.
        arguments: What it is called with.
        seconds: After how long a process is ended.
    """
    context = multiprocessing.get_context('forkserver' if torch.cuda.is_available() else 'fork')
    if torch.cuda.is_available():
        context.set_forkserver_preload(['mona_mm', 'mmdet.models', 'mmpretrain.models'])
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    variables = dict(WORLD_SIZE=count, MASTER_ADDR='127.0.0.1', MASTER_PORT=store.port, OMP_NUM_THREADS=1)
    variables |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    files = [folder / f'process_{rank}.txt' for rank in range(count)]
    processes = [
        context.Process(target=_run, args=(variables | dict(RANK=rank, LOCAL_RANK=rank), str(file), target, arguments))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
    output = ''.join(file.read_text() for file in files)
    assert [process.exitcode for process in processes] == [0] * count, output[-5000:]
    return output


def _run(variables: dict, file: str, target: Callable, arguments: tuple) -> None:
    """One of those processes: the two outputs go into a file, also what is written past Python."""
    with open(file, 'w') as out:
        for descriptor in (1, 2):
            os.dup2(out.fileno(), descriptor)
        sys.stdout = sys.stderr = out  # pytest's are copied into a process that is forked from it
        os.environ.update({name: str(value) for name, value in variables.items()})
        warnings.simplefilter('ignore')
        torch.set_num_threads(1)
        try:
            target(*arguments)
        except BaseException:
            traceback.print_exc()
            raise


def run_tool(name: str, *arguments: str) -> None:
    """Run a command of tools/ as if it were the program of this process."""
    os.chdir(ROOT)
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')


def strings(node) -> list[str]:
    """Every string in nested dicts, lists and tuples."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list | tuple):
        return [s for child in node for s in strings(child)]
    return [node] if isinstance(node, str) else []


def to_microsoft(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmdet's names and channel order back into those of Microsoft's Swin: written independently of the converter."""
    published = {}
    for name, tensor in state.items():
        name = name.replace('stages.', 'layers.').replace('attn.w_msa.', 'attn.')
        name = name.replace('ffn.layers.0.0.', 'mlp.fc1.').replace('ffn.layers.1.', 'mlp.fc2.')
        name = name.replace('patch_embed.projection.', 'patch_embed.proj.')
        if '.downsample.' in name:
            channels = tensor.shape[-1] // 4
            order = [4 * c + neighbour for neighbour in (0, 2, 1, 3) for c in range(channels)]
            tensor = tensor[..., order]
        if not re.match(r'norm\d', name):
            published[name] = tensor
    published['norm.weight'], published['norm.bias'] = torch.ones(192), torch.zeros(192)
    published['head.weight'], published['head.bias'] = torch.ones(10, 192), torch.zeros(10)
    published['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 49, 49)
    return published
