r"""Keep frozen weights in half precision, which halves their memory and saves their casts in every autocast step.

These are the frozen weights of linear layers, convolutions and torch's attention, which take 99% of a backbone's bytes.
Norms, biases, position tables, and all parameters that train stay in float32.

Once its weights have been rounded, such a backbone computes the same as one in float32 under autocast, bit for bit.
Where autocast is off (mmengine validates without it, even if it trains with it), the backbone enables it for itself,
and returns its outputs in the dtype of its input. A cast of the whole model (``half()``, ``to(torch.bfloat16)``,
``float()``, ``double()``) casts the frozen weights as well. Autocast then uses the half-precision dtype that they have,
or the configured one if they are in float32; with float64 it stays off.
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
    """Keep the frozen weights of ``backbone``'s linear layers and convolutions in ``dtype`` from now on, in place.

    Args:
        backbone: a backbone that :func:`mona_mm.frozen.rules.freeze` has frozen.
        dtype: one of :data:`DTYPES`, which becomes the ``frozen_dtype`` of the backbone's record.

    Raises:
        ConfigError: if ``dtype`` is not one of them, or no such weight is frozen.
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
    # A bound method would be pickled by its name, and would become this forward itself when it is loaded.
    inner = vars(backbone).get('forward') or partial(type(backbone).forward, backbone)
    backbone.forward = partial(_forward_in_autocast, backbone, inner)


def kept_weights(backbone: nn.Module) -> list[nn.Parameter]:
    """The frozen parameters that :func:`keep_frozen` keeps in half precision."""
    return list(_kept_weights(backbone))


def _kept_weights(backbone: nn.Module) -> Iterator[nn.Parameter]:
    for module in backbone.modules():
        for name in _weight_names(module) if isinstance(module, _KEPT) else ():
            weight = getattr(module, name, None)
            if isinstance(weight, nn.Parameter) and not weight.requires_grad:
                yield weight


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    attention = ('in_proj_weight', 'q_proj_weight', 'k_proj_weight', 'v_proj_weight')
    return attention if isinstance(module, nn.MultiheadAttention) else ('weight',)


@contextmanager
def in_float32(backbone: nn.Module) -> Iterator[None]:
    """A context in which the frozen weights are in float32, to initialise, load or check them; then they are rounded.

    Thus random initial values equal those of a backbone without ``frozen_dtype``, and a plan of SPT recognises its
    base.
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
                weight.copy_(single)  # into the same memory, of which other code may hold a view


def _forward_in_autocast(backbone: nn.Module, inner: partial, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    device = x.device.type
    dtype = _autocast_dtype(backbone)
    if dtype is None or not is_autocast_available(device) or torch.is_autocast_enabled(device):
        return inner(x, *args, **kwargs)
    with torch.autocast(device, dtype):
        outputs = inner(x, *args, **kwargs)
    return _cast(outputs, x.dtype)


def _autocast_dtype(backbone: nn.Module) -> torch.dtype | None:
    """The dtype for autocast, which follows a cast of the whole model; None to compute in the dtype of the weights."""
    weight = next(_kept_weights(backbone), None)
    if weight is None or weight.dtype == torch.float32:
        return DTYPES[record_of(backbone).frozen_dtype]
    return weight.dtype if weight.dtype in DTYPES.values() else None


def _cast(outputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(outputs, list | tuple):
        return type(outputs)(_cast(output, dtype) for output in outputs)
    return outputs.to(dtype)
