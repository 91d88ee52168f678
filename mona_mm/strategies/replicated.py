"""Train with the whole model on every process, and average the gradients of what trains."""

import os
import time
from collections.abc import Callable
from typing import Any

import mmengine
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from mmengine.registry import MODEL_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.runner import save_checkpoint, weights_to_cpu
from torch import nn

from mona_mm.checkpoint.atomic import AtomicLocalBackend  # noqa: F401  registers what backend_args names
from mona_mm.checkpoint.loading import load_state_dict
from mona_mm.checkpoint.rehearsal import model_state
from mona_mm.nn.wrappers import innermost
from mona_mm.registry import STRATEGIES

_MMENGINE_STRATEGY = MMENGINE_STRATEGIES.get('DDPStrategy')


@STRATEGIES.register_module()
class DDPStrategy(_MMENGINE_STRATEGY):
    """mmengine's ``DDPStrategy``, on CPUs as well, and with the names of the model itself in its checkpoints.

    mmengine's puts ``module.`` in front of every name, where its Runner does not. A checkpoint is written to a
    temporary file, which is then renamed, so that a stopped process cannot break one.

    Args:
        model_wrapper: the config of the wrapper of the model; by default an ``MMDistributedDataParallel``.
        sync_bn: ``'torch'`` or ``'mmcv'`` turns every BatchNorm into a SyncBN; None leaves the norms as they are.
        **kwargs: see mmengine's ``BaseStrategy``.
    """

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if is_model_wrapper(model):
            return model
        model = self.convert_model(model.to(get_device()))
        wrapper = self.model_wrapper or dict(type='MMDistributedDataParallel', broadcast_buffers=False)
        return MODEL_WRAPPERS.build(wrapper, default_args=dict(module=model, device_ids=local_devices()))

    def model_state_dict(self) -> dict[str, Any]:
        """The state dict of the model inside its wrappers, on the CPU."""
        return weights_to_cpu(innermost(self.model).state_dict())

    def load_model_state_dict(self, state_dict: dict[str, Any], *, strict: bool = False, **kwargs: Any) -> None:
        """Load a state dict, or a delta, into the model inside its wrappers, as mmengine's Runner does."""
        load_state_dict(innermost(self.model), model_state(dict(state_dict=state_dict)), strict, self.logger)

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Write a checkpoint from the main process.

        Args:
            filename: the file.
            save_optimizer: whether it has the state of the optimizer.
            save_param_scheduler: whether it has the state of the schedules.
            extra_ckpt: what else it has: ``meta`` and the state of the message hub.
            callback: a function that may change it before it is written.
        """
        if self.rank == 0:
            checkpoint = self._checkpoint(save_optimizer, save_param_scheduler, extra_ckpt, callback)
            write(checkpoint, filename)

    def _checkpoint(
        self,
        save_optimizer: bool,
        save_param_scheduler: bool,
        extra: dict[str, Any] | None,
        callback: Callable[[dict[str, Any]], None] | None,
    ) -> dict[str, Any]:
        checkpoint = dict(state_dict=self.model_state_dict())
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        checkpoint.update(extra or {})
        checkpoint['meta'] = {
            **checkpoint.get('meta', {}),
            **dict(seed=self.seed, time=time.strftime('%Y%m%d_%H%M%S'), mmengine=mmengine.__version__),
        }
        if callback is not None:
            callback(checkpoint)
        return checkpoint


def write(checkpoint: dict[str, Any], file: str) -> None:
    """Write a checkpoint, completely or not at all."""
    save_checkpoint(checkpoint, file, backend_args=dict(backend='mona_mm_atomic'))


def local_devices() -> list[int] | None:
    """The device of this process, as DistributedDataParallel takes it; None for a CPU."""
    return None if get_device() == 'cpu' else [int(os.environ['LOCAL_RANK'])]
