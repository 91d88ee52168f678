"""Find the parameters that no output of a backbone depends on, as after the last stage that ``out_indices`` names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mona_mm.hosts import find_host, is_host

_SIDE = 224  # side of the image for a backbone without img_size, in pixels


def unreached(module: nn.Module) -> set[str]:
    """Find the parameters that train in the backbones of ``module`` (or in it, if it is one) without any effect on
    their outputs.

    They are found by a forward and a backward pass on the meta device, which take no memory. If a backbone cannot run
    there, none of its parameters counts.
    """
    found: set[str] = set()
    for path, backbone in module.named_modules():
        if _may_end_early(backbone) and any(p.requires_grad for p in backbone.parameters()):
            found |= {f'{path}.{name}' if path else name for name in _without_gradient(backbone)}
    return found


def _may_end_early(module: nn.Module) -> bool:
    if not isinstance(getattr(module, 'out_indices', None), list | tuple):
        return False
    return not (is_host(module) and find_host(module).ends_with_last_block(module))


def _without_gradient(backbone: nn.Module) -> set[str]:
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    stand_ins: dict[int, Tensor] = {}
    state = {}
    # Every module by one name alone: functional_call leaves one that is given by several with the meta tensors.
    for path, module in backbone.named_modules():
        own = dict(recurse=False, remove_duplicate=False)
        for name, tensor in [*module.named_parameters(path, **own), *module.named_buffers(path, **own)]:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            blank = torch.empty(tensor.shape, dtype=dtype, device='meta').requires_grad_(name in trains)
            state[name] = stand_ins.setdefault(id(tensor), blank)
    try:
        with _deterministic(backbone), torch.enable_grad():
            outputs = functional_call(backbone, state, blank_image(backbone, 'meta'), tie_weights=False)
            total = sum(output.sum() for output in _tensors_in(outputs) if output.requires_grad)
            if not isinstance(total, Tensor):
                return trains
            wanted = [state[name] for name in trains]
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    except Exception:  # a third-party forward may fail in any way on tensors without values
        return set()
    return {name for name, gradient in zip(trains, gradients, strict=True) if gradient is None}


def blank_image(backbone: nn.Module, device: str | torch.device, size: tuple[int, int] | None = None) -> Tensor:
    """An image ``(1, channels, height, width)`` of zeros, by default of the size of a backbone's configuration."""
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    if any(type(m).__name__ == 'Focus' for m in backbone.modules()):  # it puts 2 x 2 pixels into the channels
        channels //= 4
    size = size or getattr(backbone, 'img_size', None) or _SIDE
    return torch.zeros(1, channels, *(size if isinstance(size, list | tuple) else (size, size)), device=device)


@contextmanager
def _deterministic(backbone: nn.Module) -> Iterator[None]:
    """A context without randomness and activation checkpoints."""
    before = [(m, m.training, m.__dict__.get('with_cp')) for m in backbone.modules()]
    for m, _, with_cp in before:
        m.training = False
        if with_cp:
            m.with_cp = False
    try:
        yield
    finally:
        for m, training, with_cp in before:
            m.training = training
            if with_cp:
                m.with_cp = with_cp


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple | Mapping):
        for output in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors_in(output)
