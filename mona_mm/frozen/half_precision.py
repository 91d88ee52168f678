r"""Frozen weights kept in half precision: half their memory, and no cast of them in every step of mixed precision.

What is kept so are the frozen matrices and kernels, :math:`W` of linear layers, convolutions and torch's attention:
99% of a backbone's bytes. Norms, biases, position tables, and all that trains stay in float32.

Such a backbone computes what the same one in float32 computes under autocast, bit for bit, once its weights have been
rounded. Where no autocast is on (mmengine validates without, whatever it trains with), the backbone switches one on for
itself, and gives its outputs the type of its input. A cast of the whole model (``half()``, ``to(torch.bfloat16)``,
``float()``, ``double()``) casts the frozen weights as well. Autocast is then in the half type that they have; over
weights in float32 it stays in the configured one, and over float64 there is none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from mona_mm.errors import ConfigError
from mona_mm.nn.private import CONVOLUTIONS
from mona_mm.record import make_record, record_of

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16)
_KEPT = (nn.Linear, *CONVOLUTIONS, nn.MultiheadAttention)


def keep_frozen(backbone: nn.Module, dtype: str) -> None:
    """Keep the frozen matrices and kernels of ``backbone`` in ``dtype`` from now on, in place.

    Args:
        backbone: given to :func:`mona_mm.frozen.rules.freeze`.
        dtype: one of :data:`DTYPES`; it is then the ``frozen_dtype`` of the backbone's record.

    Raises:
        ConfigError: if it is another, or nothing that could be kept so is frozen.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(
            f"frozen_dtype={dtype!r} must be 'bfloat16', 'float16' or None (the frozen weights stay in float32)."
        )
    if not kept_weights(backbone):
        raise ConfigError(
            f'frozen_dtype={dtype!r}: every linear layer and convolution of this {type(backbone).__name__} trains '
            f'(trainable={list(record_of(backbone).freeze.rules)}), and what trains stays in float32. Leave '
            'frozen_dtype out.'
        )
    make_record(backbone).frozen_dtype = dtype
    for weight in kept_weights(backbone):
        weight.data = weight.data.to(DTYPES[dtype])
    # By the class, and not as a bound method: that would be pickled by its name, and come back as what it is now.
    inner = vars(backbone).get('forward') or partial(type(backbone).forward, backbone)
    backbone.forward = partial(_forward, backbone, inner)


def kept_weights(backbone: nn.Module) -> list[nn.Parameter]:
    """The frozen parameters that :func:`keep_frozen` keeps in half precision."""
    return list(_kept_weights(backbone))


def _kept_weights(backbone: nn.Module) -> Iterator[nn.Parameter]:
    for module in backbone.modules():
        for name in _names(module) if isinstance(module, _KEPT) else ():
            weight = getattr(module, name, None)
            if isinstance(weight, nn.Parameter) and not weight.requires_grad:
                yield weight


def _names(module: nn.Module) -> tuple[str, ...]:
    attention = ('in_proj_weight', 'q_proj_weight', 'k_proj_weight', 'v_proj_weight')
    return attention if isinstance(module, nn.MultiheadAttention) else ('weight',)


@contextmanager
def in_float32(backbone: nn.Module) -> Iterator[None]:
    """In this context the frozen weights are in float32, for who initialises, loads or checks them; then rounded.

    So random values are those of a backbone without ``frozen_dtype``, and a plan of SPT knows its base again.
    """
    weights = kept_weights(backbone) if record_of(backbone).frozen_dtype else []
    halves = [weight.data for weight in weights]
    for weight, half in zip(weights, halves, strict=True):
        weight.data = half.float()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, half in zip(weights, halves, strict=True):
                single, weight.data = weight.data, half
                weight.copy_(single)  # where it was: others may hold a view of it


def _forward(backbone: nn.Module, inner: partial, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    device = x.device.type
    dtype = _autocast_dtype(backbone)
    if dtype is None or not is_autocast_available(device) or torch.is_autocast_enabled(device):
        return inner(x, *args, **kwargs)
    with torch.autocast(device, dtype):
        outputs = inner(x, *args, **kwargs)
    return _cast(outputs, x.dtype)


def _autocast_dtype(backbone: nn.Module) -> torch.dtype | None:
    """The type to compute in, which depends on whether the model has been cast since; None for that of the weights."""
    weight = next(_kept_weights(backbone), None)
    if weight is None or weight.dtype == torch.float32:
        return DTYPES[record_of(backbone).frozen_dtype]
    return weight.dtype if weight.dtype in DTYPES.values() else None


def _cast(outputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(outputs, list | tuple):
        return type(outputs)(_cast(each, dtype) for each in outputs)
    return outputs.to(dtype)
