"""Shard the frozen weights of a model over processes, and keep what trains whole on each of them.

What trains under a method is small. Whole on every process, its gradients are averaged by DistributedDataParallel as
without sharding; the optimizer's state needs no gathering; and what reads parameters outside of a forward pass (a
method's term in the loss, a decoder's queries) finds them. The frozen weights, which are most of the memory, are
gathered block by block for the forward and again for the backward pass, and have no gradients. Only where nothing is
frozen are the weights that train sharded themselves, with their gradients and the optimizer's state.

Of the frozen weights those of one dtype are sharded, the dtype of the most bytes, since FSDP1 lays the weights of a
block out as one tensor. With ``frozen_dtype`` these are the weights in half precision, 99% of the bytes.
"""

import inspect
import os.path as osp
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from mmengine.device import get_device
from mmengine.model import BaseDataPreprocessor, MMDistributedDataParallel, is_model_wrapper
from mmengine.model.wrappers import MMFullyShardedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from mona_mm.errors import ConfigError
from mona_mm.hosts import find_host, is_host
from mona_mm.nn.private import FULLY_SHARD
from mona_mm.nn.sharded import has_whole, local_state, unwrapped, whole
from mona_mm.options import checked
from mona_mm.registry import STRATEGIES
from mona_mm.strategies.optimizer import load_local_optimizer, load_optimizer, local_optimizer, whole_optimizer
from mona_mm.strategies.parts import load_part, read_part, write_part
from mona_mm.strategies.replicated import DDPStrategy, local_devices, write


class _ShardedStrategy(DDPStrategy):
    """What FSDP1 and FSDP2 have in common."""

    @checked
    def __init__(
        self,
        *,
        checkpoints: Literal['whole', 'sharded'] = 'whole',
        find_unused_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.checkpoints = checkpoints
        self.find_unused_parameters = find_unused_parameters
        self._loads_parts = False

    def _shard(self, model: nn.Module, parameters: set[nn.Parameter]) -> nn.Module:
        raise NotImplementedError

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if is_model_wrapper(model):
            return model
        model = self.convert_model(model)
        for module in model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(get_device())
        parameters = sharded_parameters(model)
        trains = any(p.requires_grad for p in parameters)
        size, rest = (sum(p.nbytes for p in group) for group in (parameters, set(model.parameters()) - parameters))
        self.logger.info(
            f'{size / 2**20:,.1f} MiB of {"all" if trains else "frozen"} weights are sharded over {self.world_size} '
            f'processes; {rest / 2**20:,.1f} MiB are whole on each.'
        )
        others = [p for p in model.parameters() if p not in parameters]
        model = self._shard(model, parameters)  # block by block, since the whole may not fit on one device
        for p in others:
            p.data = p.data.to(get_device())
        if trains:
            return model
        # What is sharded must not be sent around at the start, and all processes have initialised or loaded the same.
        return MMDistributedDataParallel(
            model,
            device_ids=local_devices(),
            init_sync=False,
            broadcast_buffers=False,
            find_unused_parameters=self.find_unused_parameters,
        )

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> OptimWrapper:
        """Build the optimizer for the model's own names, by which ``paramwise_cfg`` selects parameters."""
        with unwrapped(model) as inside:
            return super().build_optim_wrapper(optim_wrapper, inside)

    def model_state_dict(self) -> dict[str, Any]:
        """The state dict of the whole model on the CPU of the main process, for which all processes must ask.

        Of a sharded checkpoint it is what this process holds.
        """
        if self.checkpoints == 'sharded':
            return _on_cpu(local_state(self.model))
        keep = has_whole(self.model)
        with whole(self.model) as model:
            if not keep:
                return {}
            return _on_cpu(model.state_dict())

    def load_model_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Load a state dict, or a delta, into the whole model, and shard it anew."""
        with whole(self.model, write=True):
            super().load_model_state_dict(state_dict, **kwargs)

    def optim_state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, whole, as one process has it; of a sharded checkpoint what this one holds."""
        if self.checkpoints == 'sharded':
            return local_optimizer(self.optim_wrapper)
        return whole_optimizer(self.model, self.optim_wrapper)

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer: whole, of a run on any number of processes, or the part of this process."""
        if self._loads_parts:
            load_local_optimizer(self.optim_wrapper, state_dict)
        else:
            load_optimizer(self.model, self.optim_wrapper, state_dict)

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Load a whole checkpoint, a delta, or the part of this process in a sharded checkpoint.

        Raises:
            CheckpointMismatchError: if a sharded checkpoint is one of another number of processes or another model.
        """
        self._loads_parts = osp.isdir(filename)
        if not self._loads_parts:
            return super().load_checkpoint(filename, **kwargs)
        checkpoint = read_part(filename, self.rank, self.world_size)
        if kwargs.get('callback') is not None:
            kwargs['callback'](checkpoint)
        load_part(local_state(self.model), checkpoint.pop('state_dict'), filename)
        return checkpoint

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Gather a whole checkpoint, which all processes must do, and write it from the main process; or write the part
        of each process.

        The callback is called in every process, since hooks gather as well.
        """
        checkpoint = self._checkpoint(save_optimizer, save_param_scheduler, extra_ckpt, callback)
        if self.checkpoints == 'sharded':
            write_part(checkpoint, filename, self.rank)
        elif self.rank == 0:
            write(checkpoint, filename)
        distributed.barrier()


@STRATEGIES.register_module()
class FSDPStrategy(_ShardedStrategy):
    """Shard the frozen weights by FSDP1; see the module's docstring.

    Args:
        checkpoints: ``'whole'`` gathers checkpoints, which are those of one process then, and resume on any number of
            processes under any strategy; ``'sharded'`` writes a folder with a file of each process, which resumes on as
            many processes under the same strategy. Deltas are whole in either case.
        find_unused_parameters: see :class:`torch.nn.parallel.DistributedDataParallel`, which averages the gradients.
        model_wrapper: options of :class:`torch.distributed.fsdp.FullyShardedDataParallel`, such as
            ``dict(cpu_offload=True)``.
        sync_bn: see :class:`DDPStrategy`.
        **kwargs: see mmengine's ``BaseStrategy``.
    """

    def _shard(self, model: nn.Module, parameters: set[nn.Parameter]) -> nn.Module:
        blocks = {id(block) for block in _blocks_with(model, parameters)}
        device = get_device()
        return MMFullyShardedDataParallel(
            module=model,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: id(module) in blocks),
            ignored_states=[p for p in model.parameters() if p not in parameters],
            device_id=torch.device('cpu') if device == 'cpu' else local_devices()[0],
            **(self.model_wrapper or {}),
        )


@STRATEGIES.register_module()
class FSDP2Strategy(_ShardedStrategy):
    """Shard the frozen weights by FSDP2 (``fully_shard``), with which the modules keep their names; see the module's
    docstring and :class:`FSDPStrategy`.

    Args:
        checkpoints: see :class:`FSDPStrategy`.
        find_unused_parameters: see :class:`FSDPStrategy`.
        model_wrapper: options of ``torch.distributed.fsdp.fully_shard``, such as ``dict(reshard_after_forward=False)``.
        sync_bn: see :class:`DDPStrategy`.
        **kwargs: see mmengine's ``BaseStrategy``.

    Raises:
        ConfigError: if this torch has no ``fully_shard`` that can leave parameters whole (2.7 has).
    """

    def _shard(self, model: nn.Module, parameters: set[nn.Parameter]) -> nn.Module:
        if FULLY_SHARD is None or 'ignored_params' not in inspect.signature(FULLY_SHARD).parameters:
            raise ConfigError(
                f'strategy fsdp2: fully_shard of torch {torch.__version__} cannot leave parameters whole; that of '
                'torch 2.7 can. Use strategy fsdp.'
            )
        ignored = {p for p in model.parameters() if p not in parameters}
        mesh = init_device_mesh(get_device(), (self.world_size,))
        for module in [*_blocks_with(model, parameters), model]:
            FULLY_SHARD(module, mesh=mesh, ignored_params=ignored, **(self.model_wrapper or {}))
        return model


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict on the CPU, which outlives what FSDP has gathered."""
    return {name: value.to('cpu', copy=True) if torch.is_tensor(value) else value for name, value in state.items()}


def sharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model that are sharded.

    They are those of the frozen ones whose dtype has the most bytes, or all, if none is frozen.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not frozen:
        return set(model.parameters())
    sizes: Counter[torch.dtype] = Counter()
    for p in frozen:
        sizes[p.dtype] += p.nbytes
    dtype = max(sizes, key=sizes.get)
    return {p for p in frozen if p.dtype == dtype}


def _blocks_with(model: nn.Module, parameters: set[nn.Parameter]) -> list[nn.Module]:
    """The blocks of the backbones in a model that have some of these parameters."""
    hosts = [module for module in model.modules() if is_host(module)]
    blocks = dict.fromkeys(block for host in hosts for block in find_host(host).blocks(host).values())
    return [block for block in blocks if any(p in parameters for p in block.parameters())]
