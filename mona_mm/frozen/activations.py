"""Measure the activations that a backbone keeps for the backward pass, where only its later blocks train.

Autograd keeps nothing of what is computed before the first tensor that trains. With a method in the last blocks alone
(``blocks='last 6'``), or with ``trainable='partial_1'``, that is most of the backbone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mona_mm.frozen.reach import blank_image
from mona_mm.hosts import find_host, is_host
from mona_mm.nn.private import BATCH_NORMS
from mona_mm.record import record_of
from mona_mm.type_names import is_type

GB = 10**9


@dataclass(frozen=True)
class KeptActivations:
    """What a backbone keeps of one image for the backward pass, in bytes.

    Args:
        size: the image's ``(height, width)``.
        first: the path of the first block in which something trains.
        kept: what is kept from that block on.
        kept_before: what is kept of the blocks before it, which is more than nothing only if something else trains
            there or before them, such as a table of positions.
        spared: what would be kept besides, if the gradient had to reach the input of the backbone's first block, as
            with a method in all blocks. The activations of that method itself are not among it.
    """

    size: tuple[int, int]
    first: str
    kept: int
    kept_before: int
    spared: int

    def text(self) -> str:
        """Format the numbers as a line of text, in GB of 10^9 bytes."""
        height, width = self.size
        before = f'{self.kept_before / GB:.3g} GB' if self.kept_before else 'nothing'
        spared = f'; {self.spared / GB:.3g} GB more are not kept' if self.spared else ''
        return (
            f'kept for the backward pass, for one image of {height} x {width}: {self.kept / GB:.3g} GB from '
            f'{self.first} on, {before} before it{spared}'
        )


def measure_activations(backbone: nn.Module, size: tuple[int, int] | None = None) -> KeptActivations | None:
    """Measure what a backbone keeps for the backward pass, if its first blocks do not train.

    It runs forward twice on one blank image, on the device and in the form in which it trains: under the autocast that
    is active, with activation checkpoints, with the host's faster forms. The tensors that autograd saves are counted by
    their storage and freed soon, so that the measurement takes little more memory than a prediction. Parameters,
    buffers and what a module keeps between calls do not count. Random numbers and the statistics of BatchNorms are left
    as they are. Of a compiled backbone the form that is not compiled runs.

    Args:
        backbone: a backbone with its weights, on a device that computes.
        size: the image's ``(height, width)``; by default that of the backbone's configuration, or 224 x 224.

    Returns:
        The measurement; None if something trains in the first block or in none, the backbone is no host or keeps
        features between epochs (:mod:`mona_mm.frozen.feature_cache`), or it cannot run on such an image.
    """
    if not is_host(backbone) or record_of(backbone).feature_cache or any(p.is_meta for p in backbone.parameters()):
        return None
    blocks = find_host(backbone).blocks(backbone)
    tuned = {path for path, block in blocks.items() if any(p.requires_grad for p in block.parameters())}
    if not tuned or next(iter(blocks)) in tuned:
        return None
    device = next(backbone.parameters()).device
    devices = [device] if device.type == 'cuda' else []
    try:
        x = blank_image(backbone, device, size)
        with torch.random.fork_rng(devices), torch.enable_grad(), _fixed_statistics(backbone):
            actual, whole = (_Count.of(backbone, blocks, tuned, x, from_first) for from_first in (False, True))
    except Exception:  # a third-party forward may fail in any way on an image of another size, or lack memory
        return None
    spared = whole.before + whole.after - actual.before - actual.after
    return KeptActivations(tuple(x.shape[2:]), actual.first, actual.after, actual.before, spared)


class _Count:
    """The bytes that autograd saves in a forward pass, before the first tuned block and from it on.

    A tensor that several operations save counts once. Those of a block are counted at its end, and held until the end
    of the next one, so that no other tensor gets their addresses.
    """

    def __init__(self, backbone: nn.Module, tuned: set[str], from_first: bool) -> None:
        self.before = self.after = 0
        self.first = ''
        self._backbone, self._tuned, self._from_first = backbone, tuned, from_first
        self._is_first_block = True
        self._previous: dict[int, Any] = {}
        self._current: dict[int, Any] = {}

    @classmethod
    def of(
        cls, backbone: nn.Module, blocks: Mapping[str, nn.Module], tuned: set[str], x: Tensor, from_first: bool
    ) -> '_Count':
        """Count in one forward pass; with ``from_first`` as if the input of the first block trained."""
        count = cls(backbone, tuned, from_first)
        with ExitStack() as stack:
            for path, block in blocks.items():
                stack.callback(block.register_forward_pre_hook(partial(count.enter, path)).remove)
            stack.enter_context(saved_tensors_hooks(count.add, _never))
            backbone.forward(x)  # not by a call, which would run the compiled form and compile it for this size
        count.settle()
        return count

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._previous:
            self._current[storage.data_ptr()] = storage

    def enter(self, path: str, block: nn.Module, args: tuple) -> tuple:
        """Begin a block; a pre-hook of its forward."""
        self.settle()
        x = args[0]
        if self._from_first and self._is_first_block and not x.requires_grad:
            x = x.detach().requires_grad_() * 1  # no leaf, since a block may write over its input
        self._is_first_block = False
        if not self.first and path in self._tuned:
            self.first = path
        if getattr(block, 'with_cp', False) and (x.requires_grad or path in self._tuned):
            self.add(x)  # a checkpoint keeps the input of its block, and computes the rest again
        return x, *args[1:]

    def settle(self) -> None:
        """Count what has been saved since the latest block began."""
        own = {tensor.untyped_storage().data_ptr() for m in self._backbone.modules() for tensor in _tensors_of(m)}
        size = sum(storage.nbytes() for address, storage in self._current.items() if address not in own)
        if self.first:
            self.after += size
        else:
            self.before += size
        self._previous, self._current = self._current, {}


def _never(saved: Any) -> Tensor:
    raise RuntimeError('There is no backward pass of a measurement.')


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module keeps between its calls."""
    pending, seen = list(vars(module).values()), set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value


@contextmanager
def _fixed_statistics(backbone: nn.Module) -> Iterator[None]:
    """A context in which no BatchNorm updates its statistics."""
    training = [m for m in backbone.modules() if isinstance(m, BATCH_NORMS) and m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


# The size of the images of a config ----------------------------------------------------------------------------------


def training_size(cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """The ``(height, width)`` of the largest image that the training pipeline of a config makes; None if it tells none.

    It is that of the last step that resizes or crops, padded as the config's data preprocessor does.
    """
    sizes = [size for size in map(_size_after, _pipelines(cfg.get('train_dataloader') or {})) if size]
    if not sizes:
        return None
    preprocessor = (cfg.get('model') or {}).get('data_preprocessor') or {}
    divisor, least = preprocessor.get('pad_size_divisor') or 1, preprocessor.get('size') or (0, 0)
    height, width = (-(-max(pair) // divisor) * divisor for pair in zip(sizes[-1], least, strict=True))
    return height, width


def _pipelines(dataset: Any) -> list[list]:
    """The pipelines of a data set's config, and before each those of the data sets within it."""
    if isinstance(dataset, list | tuple):
        return [pipeline for each in dataset for pipeline in _pipelines(each)]
    if not isinstance(dataset, dict):
        return []
    within = [pipeline for key in ('datasets', 'dataset') for pipeline in _pipelines(dataset.get(key))]
    return [*within, *([dataset['pipeline']] if dataset.get('pipeline') else [])]


_SIZES: dict[str, Callable[[int, int], tuple[int, int]]] = {
    **dict.fromkeys(('scale', 'scales', 'img_scale'), lambda width, height: (height, width)),
    **dict.fromkeys(('size', 'crop_size'), lambda height, width: (height, width)),
}
"""The options of transforms that say the size of an image, and the height and width of their two numbers."""


def _size_after(steps: Any) -> tuple[int, int] | None:
    """The largest size after a pipeline's steps."""
    size = None
    for step in steps if isinstance(steps, list | tuple) else [steps]:
        if isinstance(step, dict) and not is_type(step, 'Pad'):
            found = [each for key, order in _SIZES.items() for each in _sizes(step.get(key), order)]
            choices = step.get('transforms') or []
            found += filter(None, map(_size_after, choices if isinstance(choices, list | tuple) else []))
            size = max(found, key=prod, default=size)
    return size


def _sizes(value: Any, order: Callable[[int, int], tuple[int, int]]) -> Iterator[tuple[int, int]]:
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) == 2 and all(isinstance(number, int) and number > 0 for number in values):
        yield order(*values)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield value, value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _sizes(each, order)
