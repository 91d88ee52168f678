"""Models whose parameters are sharded: every process holds a part of each tensor (FSDP1, FSDP2).

Whoever needs whole tensors by the model's own names (checkpoints, deltas, reports) asks for them in :func:`whole`.
FSDP1 puts modules of its own around the blocks, which change the paths, and flat views in place of the parameters;
FSDP2 puts classes in front of those of the blocks, and DTensors in place of the parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, distribute_tensor

from mona_mm.nn.private import FSDP2, load_hooks
from mona_mm.nn.wrappers import innermost


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are sharded over processes."""
    return any(isinstance(module, (FSDP1, *FSDP2)) for module in model.modules())


def has_whole(model: nn.Module) -> bool:
    """Whether this process has the values of all parameters within :func:`whole`.

    The main process has them, and every process where nothing is sharded.
    """
    return not is_sharded(model) or distributed.get_rank() == 0


@contextmanager
def whole(model: nn.Module, write: bool = False) -> Iterator[nn.Module]:
    """A context in which the model inside all wrappers has the names and classes that it was built with, and its
    parameters are whole: on the main process (on the CPU, if it runs on a GPU), or with ``write`` on all.

    If anything is sharded, every process must enter it, since they exchange their parts. A model that is not sharded is
    yielded as it is.

    Args:
        model: a model in any wrappers.
        write: give the parameters whole to every process, and shard anew, at the end, what was written to them.
    """
    inside = innermost(model)
    if not is_sharded(model):
        yield inside
        return
    _reshard(model)
    with ExitStack() as stack:
        for root in _roots(model):
            # FSDP1 would free the memory of tensors that are on the CPU already, and offloads nothing of one process.
            offload = root.compute_device.type != 'cpu' and distributed.get_world_size(root.process_group) > 1
            stack.enter_context(
                FSDP1.summon_full_params(root, writeback=write, rank0_only=not write, offload_to_cpu=offload)
            )
        stack.enter_context(unwrapped(model))
        stack.enter_context(_whole_dtensors(inside, write))
        yield inside


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDP2):
            module.reshard()  # the outermost one stays whole after a forward pass without a backward pass


def _roots(model: nn.Module) -> list[FSDP1]:
    """The FSDP1 modules that are in no other one."""
    found = [module for module in model.modules() if isinstance(module, FSDP1)]
    nested = {id(child) for root in found for child in root.modules() if child is not root}
    return [module for module in found if id(module) not in nested]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model inside all wrappers has the names and classes that it was built with, while its
    parameters stay sharded."""
    inside = innermost(model)
    modules = list(inside.modules())
    replaced = [
        (parent, name, child)
        for parent in modules
        for name, child in parent._modules.items()
        if isinstance(child, FSDP1)
    ]
    classes = [(module, type(module)) for module in modules if isinstance(module, FSDP2)]
    try:
        for parent, name, child in replaced:
            parent._modules[name] = child.module
        for module, cls in classes:
            module.__class__ = cls.__bases__[1]  # fully_shard derived the class from its own and the module's
        yield inside
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child
        for module, cls in classes:
            module.__class__ = cls


@contextmanager
def _whole_dtensors(model: nn.Module, write: bool) -> Iterator[None]:
    """A context in which the DTensors among the parameters of a model are whole, see :func:`whole`."""
    keep = write or distributed.get_rank() == 0
    found: list[tuple[nn.Module, str, DTensor]] = []
    full: dict[int, nn.Parameter] = {}  # by the ids of the DTensors, which modules may share
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                found.append((module, name, parameter))
                if id(parameter) not in full:
                    values = _gathered(parameter, keep)
                    if keep:
                        full[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    hooks = [(module, *hook) for module, _, _ in found for hook in load_hooks(module).items() if _is_of_fsdp(hook[1])]
    try:
        for module, name, parameter in found:
            if keep:
                module._parameters[name] = full[id(parameter)]
        for module, key, _ in hooks:  # they expect DTensors when a state dict has been loaded
            load_hooks(module).pop(key, None)
        yield
    finally:
        for module, key, hook in hooks:
            load_hooks(module)[key] = hook
        for module, name, parameter in found:
            module._parameters[name] = parameter
    if write:
        with torch.no_grad():
            for parameter in {id(parameter): parameter for _, _, parameter in found}.values():
                scatter(full[id(parameter)], parameter)


def _is_of_fsdp(hook: Callable) -> bool:
    return str(getattr(hook, '__module__', '')).startswith('torch.distributed.fsdp')


def _gathered(tensor: DTensor, keep: bool) -> Tensor | None:
    """The whole value of a DTensor, for which all processes must ask; None unless ``keep``."""
    values = tensor.detach().full_tensor()
    return values.to('cpu', copy=True) if keep else None


def gathered(value: Tensor) -> Tensor:
    """A tensor whole and on the CPU, on every process; it may be a DTensor, for which all processes must ask."""
    return _gathered(value, True) if isinstance(value, DTensor) else value.detach().cpu()


def scatter(values: Tensor, target: DTensor) -> None:
    """Write values, which every process has, to a DTensor."""
    values = values.detach().to(target.device)
    target.to_local().copy_(distribute_tensor(values, target.device_mesh, target.placements).to_local())


def local_part(value: Any) -> Any:
    """The part of a tensor that this process holds; anything that is not a DTensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_state(model: nn.Module) -> dict[str, Any]:
    """What this process holds of the state dict of a model, by the names in the model inside all wrappers."""
    _reshard(model)
    with unwrapped(model) as inside:
        return {name: local_part(value) for name, value in inside.state_dict().items()}


def local_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parts of the parameters of a model that this process holds, by the names in the model inside all wrappers.

    They are whole where nothing is sharded.
    """
    _reshard(model)
    with unwrapped(model) as inside:
        return {name: local_part(p) for name, p in inside.named_parameters()}
