"""The state of an optimizer of sharded parameters, whole, in the form in which one process has it."""

from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, distribute_tensor

from mona_mm.nn.sharded import gathered, local_part, unwrapped


def whole_optimizer(model: nn.Module, wrapper: OptimWrapper) -> dict[str, Any]:
    """The state dict of an optimizer wrapper with whole tensors, on the main process; all processes must ask for it.

    Args:
        model: the model, in its wrappers, whose parameters the optimizer has.
        wrapper: the wrapper of the optimizer.
    """
    state = wrapper.state_dict()
    if isinstance(model, FSDP1):
        names = _names(model, wrapper)
        with _full(model, rank0_only=True):
            by_name = FSDP1.optim_state_dict(model, wrapper.optimizer, wrapper.optimizer.state_dict()).get('state', {})
        state['state'] = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
        return state
    state['state'] = {
        index: {key: gathered(value) if isinstance(value, DTensor) else value for key, value in each.items()}
        for index, each in state['state'].items()
    }
    return state


def load_optimizer(model: nn.Module, wrapper: OptimWrapper, state: Mapping[str, Any]) -> None:
    """Load the state that :func:`whole_optimizer`, or one process, has saved, and shard it as the parameters are."""
    state = dict(state)
    if isinstance(model, FSDP1):
        names = _names(model, wrapper)
        groups = [{**group, 'params': [names[i] for i in group['params']]} for group in state['param_groups']]
        by_name = dict(state={names[i]: each for i, each in state['state'].items()}, param_groups=groups)
        with _full(model, rank0_only=False):
            state |= FSDP1.optim_state_dict_to_load(model, wrapper.optimizer, by_name)
    else:
        parameters = _parameters(wrapper)
        state['state'] = {
            index: {key: _sharded_like(value, parameters[index]) for key, value in each.items()}
            for index, each in state['state'].items()
        }
    wrapper.load_state_dict(state)


def local_optimizer(wrapper: OptimWrapper) -> dict[str, Any]:
    """What this process holds of the state dict of an optimizer wrapper."""
    state = wrapper.state_dict()
    local = {i: {key: local_part(value) for key, value in each.items()} for i, each in state['state'].items()}
    return {**state, 'state': local}


def load_local_optimizer(wrapper: OptimWrapper, state: Mapping[str, Any]) -> None:
    """Load what :func:`local_optimizer` has saved in this process, of a run on as many processes."""
    parameters = _parameters(wrapper)
    placed = {i: {k: _as_part_of(v, parameters[i]) for k, v in each.items()} for i, each in state['state'].items()}
    wrapper.load_state_dict({**state, 'state': placed})


def _parameters(wrapper: OptimWrapper) -> list[Tensor]:
    return [p for group in wrapper.optimizer.param_groups for p in group['params']]


def _as_part_of(value: Any, parameter: Tensor) -> Any:
    is_part = isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.dim() > 0
    if not is_part:
        return value
    shape, stride = parameter.shape, parameter.stride()
    local = value.to(parameter.device)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def _full(model: FSDP1, rank0_only: bool) -> Any:
    return FSDP1.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=rank0_only),
        FullOptimStateDictConfig(rank0_only=rank0_only, offload_to_cpu=model.compute_device.type != 'cpu'),
    )


def _names(model: nn.Module, wrapper: OptimWrapper) -> list[str]:
    """The names of the optimizer's parameters in the model itself, in the order of their numbers in its state."""
    with unwrapped(model) as inside:
        names = {id(p): name for name, p in inside.named_parameters()}
    return [names[id(p)] for p in _parameters(wrapper)]


def _sharded_like(value: Any, parameter: Tensor) -> Any:
    is_alike = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    if not (is_alike and isinstance(parameter, DTensor)):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
