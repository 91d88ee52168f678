"""Train by DeepSpeed ZeRO, where mmengine supports it."""

import os.path as osp
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.runner import CheckpointLoader, weights_to_cpu

from mona_mm.checkpoint.loading import load_state_dict
from mona_mm.checkpoint.rehearsal import model_state
from mona_mm.nn.wrappers import innermost
from mona_mm.registry import STRATEGIES

_MMENGINE_STRATEGY = MMENGINE_STRATEGIES.get('DeepSpeedStrategy')


@STRATEGIES.register_module()
class DeepSpeedStrategy(_MMENGINE_STRATEGY):
    """mmengine's ``DeepSpeedStrategy``, which writes deltas and starts from files.

    A checkpoint is DeepSpeed's folder. ZeRO stages 1 and 2 keep the weights whole on every process, from which the main
    process makes the delta beside it. The arguments are those of mmengine's.
    """

    def save_checkpoint(
        self, filename: str, *, callback: Callable[[dict[str, Any]], None] | None = None, **kwargs: Any
    ) -> None:
        """Write a folder, and call the hooks of the run, of which mmengine's strategy knows nothing."""
        if callback is not None and self.rank == 0:
            state = weights_to_cpu(innermost(self.model).state_dict())
            callback(dict(state_dict=state, **(kwargs.get('extra_ckpt') or {})))
        super().save_checkpoint(filename, **kwargs)

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Load DeepSpeed's folder, or a file of any other run, a delta for one, into the model."""
        if osp.isdir(filename):
            with _classes_of_checkpoints():
                return super().load_checkpoint(filename, **kwargs)
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location='cpu')
        if kwargs.get('callback') is not None:
            kwargs['callback'](checkpoint)
        load_state_dict(innermost(self.model), model_state(checkpoint), logger=self.logger)
        refresh = getattr(getattr(self, 'optim_wrapper', None), 'optimizer', None)
        if hasattr(refresh, 'refresh_fp32_params'):  # its copies of what trains, in full precision
            refresh.refresh_fp32_params()
        return checkpoint

    def resume(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Continue from DeepSpeed's folder."""
        with _classes_of_checkpoints():
            return super().resume(filename, **kwargs)


_CLASSES = {
    'deepspeed.runtime.zero.config': ('ZeroStageEnum',),
    'deepspeed.utils.tensor_fragment': ('fragment_address',),
    'deepspeed.runtime.fp16.loss_scaler': ('LossScaler', 'DynamicLossScaler'),
}
"""The classes, by module, of which DeepSpeed has objects in its checkpoints. They hold plain values."""


@contextmanager
def _classes_of_checkpoints() -> Iterator[None]:
    """A context in which ``torch.load``, which loads weights only since torch 2.6, takes what is in a folder of
    DeepSpeed's beside tensors; older versions of DeepSpeed do not say so to torch."""
    classes = [getattr(import_module(module), name) for module, names in _CLASSES.items() for name in names]
    with torch.serialization.safe_globals([ConfigDict, *classes]):
        yield
