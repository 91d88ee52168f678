r"""Tune single weights of parameters; only as many values are stored and optimised as weights are chosen.

A parameter :math:`W` of a module stays frozen, and the module computes with

.. math:: W' = W + \mathrm{scatter}(\delta), \qquad \delta \in \mathbb{R}^K,\ \delta = 0 \text{ at the start}

:func:`attach_sparse` puts :class:`SparseModule` in front of the module's class, as :mod:`mona_mm.hosts` does with
blocks, and adds the :class:`SparseDelta` to the new child ``peft``; the base's parameters keep their names. For any
module whose forward reads the parameter as its attribute (LayerNorm, convolutions, biases, tables) autograd computes
the gradient. For the weight of a linear layer it would compute the gradient of the whole matrix, so
:func:`sparse_weight_grad` computes

.. math:: \partial L / \partial \delta_j = \sum_n G_{n, \mathrm{row}(j)}\, X_{n, \mathrm{column}(j)}

at the chosen weights only, in :math:`O(KN)`, or by a matrix product where that is cheaper. The effective matrix exists
only while the forward or the backward uses it; the forward saves only the input, as an ordinary linear layer does.

A delta trains with weight decay 0: decoupled decay would pull the *change* to zero, whereas ordinary tuning pulls the
weight; the published code has none on single weights. Without it, SGD and AdamW take the steps of ordinary tuning.

Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available as _has_autocast  # not on every device: none on meta
from torch.autograd.function import FunctionCtx, once_differentiable

from mona_mm.errors import ConfigError
from mona_mm.hosts import PeftModules
from mona_mm.nn.autocast import no_autocast
from mona_mm.nn.choice import Ways, bucket
from mona_mm.nn.mixin import Mixin, mix_in, mix_out, stock_class
from mona_mm.nn.substitute import call_substituted, substitute
from mona_mm.nn.tracing import is_traced

# torch warns about the CSR format, of which only the sampled product is used, with indices that SparseDelta checks.
warnings.filterwarnings('ignore', message='Sparse (CSR tensor support is in beta|invariant checks are implicitly)')


class SparseDelta(nn.Module):
    """Changes of ``K`` single elements of one parameter.

    Both tensors are in the state dict, since values mean nothing without their places. A delta file holds the values,
    and a fingerprint of the places, which come from the plan.

    Attributes:
        values: the additions to the elements, ``(K,)``, a parameter.
        indices: the ascending positions of the elements in the flattened parameter, ``(K,)``, a buffer.
        shape: the shape of the parameter.

    Raises:
        ConfigError: if there is no index, or the indices are not whole numbers of different elements of the parameter.
    """

    def __init__(self, parameter: Tensor, indices: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(parameter.shape)
        indices = torch.as_tensor(indices, device='cpu')
        if indices.ndim != 1 or indices.numel() == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ConfigError(
                f'indices must be a list of at least one whole number, not {indices.dtype} of shape '
                f'{tuple(indices.shape)}.'
            )
        indices = indices.long().sort().values
        wrong = _describe_invalid(indices, self.shape)
        if wrong:
            raise ConfigError(wrong)
        small = parameter.numel() <= torch.iinfo(torch.int32).max
        indices = indices.to(parameter.device, torch.int32 if small else torch.int64)
        self.register_buffer('indices', indices)
        self.values = nn.Parameter(torch.zeros(len(indices), dtype=parameter.dtype, device=parameter.device))

    def reset_parameters(self) -> None:
        """Set the values to zero, so that the parameter has the base's own weights."""
        nn.init.zeros_(self.values)

    def forward(self, base: Tensor) -> Tensor:
        """Compute the effective parameter, a new tensor of the shape of ``base``."""
        return _add(base, self.values, self.indices)

    def extra_repr(self) -> str:
        return f'{len(self.indices)} of {tuple(self.shape)}'

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        given = state_dict.get(f'{prefix}indices')
        if given is not None and given.shape == self.indices.shape and not given.is_meta:
            wrong = _describe_invalid(given.long(), self.shape)
            if wrong:
                args[-1].append(f'{prefix}indices: {wrong}')  # the list of errors that load_state_dict raises
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _describe_invalid(indices: Tensor, shape: tuple[int, ...]) -> str:
    """Describe why sorted indices into a parameter of ``shape`` are invalid; empty if they are valid."""
    size = torch.Size(shape).numel()
    if indices[0] < 0 or indices[-1] >= size:
        return f'indices from {indices[0]} to {indices[-1]} lie outside of a parameter of shape {shape}.'
    if (indices[1:] <= indices[:-1]).any():
        return f'indices into a parameter of shape {shape} must be ascending, each element once.'
    return ''


def _add(base: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    dtype = torch.promote_types(base.dtype, values.dtype)  # a base in half precision would round small changes away
    return base.flatten().to(dtype).index_add(0, indices, values.to(dtype)).view(base.shape)


class SparseModule(Mixin):
    """Mixin in front of a module's class, whose forward then uses the effective parameters."""

    peft: PeftModules
    """A :class:`SparseDelta` for every parameter that has one, by its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if 'weight' in self.peft and _is_linear(stock_class(self)):
            return self._linear(*args, **kwargs)

        def stock(module: nn.Module) -> Any:
            return super().forward(*args, **kwargs)

        return call_substituted(self, self._effective_parameters(), stock)

    def effective(self) -> nn.Module:
        """Make a stand-in for this module that has the effective parameters, for one call."""
        return substitute(self, self._effective_parameters())

    def _effective_parameters(self) -> dict[str, Tensor]:
        return {name: delta(getattr(self, name)) for name, delta in self.peft.items()}

    def _linear(self, input: Tensor) -> Tensor:
        delta, bias = self.peft['weight'], self.bias
        if 'bias' in self.peft:
            bias = self.peft['bias'](bias)
        if is_traced():
            return F.linear(input, delta(self.weight), bias)
        dtype = self.weight.dtype
        device = input.device.type
        # The casts that autocast makes for F.linear, made here so that that of the input is part of the graph.
        if _has_autocast(device) and torch.is_autocast_enabled(device) and torch.float64 not in (dtype, input.dtype):
            dtype = torch.get_autocast_dtype(device)
            input = input.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _SparseLinear.apply(input, self.weight, bias, delta.values, delta.indices, dtype)


@cache
def _is_linear(module_class: type) -> bool:
    """Whether a class's forward is F.linear. A subclass of Linear may have another forward."""
    from mmcv.cnn.bricks.wrappers import Linear as MmcvLinear  # imported here, since it takes a second

    return module_class.forward in (nn.Linear.forward, MmcvLinear.forward)


def attach_sparse(module: nn.Module, indices: Tensor | Sequence[int], name: str = 'weight') -> SparseDelta:
    """Let single elements of one parameter of ``module`` train, in place; the parameter itself is frozen.

    Args:
        module: any module whose forward reads the parameter as ``self.<name>``; a linear's weight is the fast case.
        indices: the positions in the flattened parameter, in any order, each once. The row of a weight
            ``(out_features, in_features)`` is ``index // in_features``, also in a fused qkv.
        name: the name of the parameter in ``module``.

    Returns:
        The delta, which is ``module.peft[name]``. It starts at zero, so that the module computes the same as before.

    Raises:
        ConfigError: if the module has no such parameter, the parameter already has a delta, or the indices are invalid
            (see :class:`SparseDelta`).
    """
    parameter = module._parameters.get(name)
    class_name = stock_class(module).__name__
    if parameter is None:
        names = ', '.join(n for n, p in module._parameters.items() if p is not None)
        raise ConfigError(f'{class_name} has no parameter {name!r} of its own to tune; it has {names or "none"}.')
    sparse = isinstance(module, SparseModule)
    if sparse and name in module.peft:
        raise ConfigError(f'The {name} of this {class_name} already has a sparse delta; give it all indices at once.')
    if not sparse and hasattr(module, 'peft'):
        raise ConfigError(f'This {class_name} already has a child `peft`; sparse deltas need a stock module.')
    delta = SparseDelta(parameter, indices)
    parameter.requires_grad = False
    if not sparse:
        mix_in(module, SparseModule)
        module.peft = PeftModules()
    module.peft[name] = delta
    return delta


def sparse_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """The deltas in ``model``, by the full names of their parameters."""
    return {
        f'{path}.{name}' if path else name: delta
        for path, m in model.named_modules()
        if isinstance(m, SparseModule)
        for name, delta in m.peft.items()
    }


@torch.no_grad()
def merge_sparse(model: nn.Module) -> list[str]:
    """Add every delta in ``model`` to its parameter and remove it, in place, so that the modules are stock ones again.

    A merged parameter equals the effective one of the forward, bit for bit. A parameter in half precision gets the
    dtype of its delta.

    Returns:
        The names of the parameters that changed.
    """
    names = list(sparse_deltas(model))
    for module in [m for m in model.modules() if isinstance(m, SparseModule)]:
        for name, delta in module.peft.items():
            parameter = module._parameters[name]
            effective = delta(parameter)
            if effective.dtype == parameter.dtype:
                parameter.copy_(effective)
            else:
                parameter.data = effective
        del module.peft
        mix_out(module)
    return names


class _SparseLinear(torch.autograd.Function):
    """``F.linear`` with single weights that train. It can be differentiated once."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values)
        # Not by save_for_backward: DDP writes the same buffers again at every forward, which would count as a change.
        ctx.indices = indices
        with no_autocast(x.device.type):
            return F.linear(x, _add(weight, values, indices).to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = grad_values = None
        with no_autocast(grad.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _add(weight, values, ctx.indices).to(grad.dtype)
            grad, x = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])  # (N, out), (N, in)
            if ctx.needs_input_grad[1]:  # the whole matrix trains as well
                grad_weight = (grad.t() @ x).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0)
            if ctx.needs_input_grad[3]:
                grad_values = sparse_weight_grad(grad, x, ctx.indices).to(values.dtype)
        return grad_x, grad_weight, grad_bias, grad_values, None, None


_ROWS = 512
"""The rows of N that the sampled product on a CPU processes at once, so that the factors stay in the cache."""

_ELEMENTS = 1 << 24
"""The elements of each factor that the gather form processes at once: at most 128 MiB for both in single precision."""


def sparse_weight_grad(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Compute ``(grad.T @ x).flatten()[indices]`` by the fastest form for the device and the number of indices.

    Args:
        grad: the gradient of the linear's output, ``(N, out)``.
        x: the linear's input, ``(N, in)``, of the same dtype.
        indices: ascending positions in the flattened weight, ``(K,)``.

    Returns:
        The elements ``(K,)``, in single precision if the form accumulates in it, or else in the dtype of ``grad``.
    """
    if not grad.numel():
        return grad_by_dense_product(grad, x, indices)
    is_cpu = grad.device.type == 'cpu'
    ways = _ON_CPU if is_cpu else _ELSEWHERE
    key = grad.dtype, grad.shape[1], x.shape[1], bucket(len(grad)), bucket(len(indices))
    return ways(grad, x, indices, key=key)


def grad_by_dense_product(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Compute the whole ``(out, in)`` matrix product and take its elements at ``indices``, in ``O(out * in * N)``."""
    return (grad.t() @ x).flatten().index_select(0, indices)


def grad_by_gather(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Compute ``(grad[:, rows] * x[:, columns]).sum(0)`` in pieces of bounded memory, in ``O(K N)``."""
    rows, columns = rows_and_columns(indices, x.shape[1])
    grad, x = grad.t().contiguous(), x.t().contiguous()  # so that the N factors of a weight are adjacent
    size = max(1, _ELEMENTS // max(1, grad.shape[1]))
    parts = [
        torch.linalg.vecdot(_single(grad[rows[i : i + size]]), _single(x[columns[i : i + size]]))
        for i in range(0, len(indices), size)
    ]
    return torch.cat(parts)


def grad_by_sampled_product(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Compute the sums by torch's sampled matrix product, without copies of ``K x N`` numbers, in ``O(K N)``."""
    rows, columns = rows_and_columns(indices, x.shape[1])
    starts = torch.searchsorted(rows, torch.arange(grad.shape[1] + 1, device=rows.device))
    grad, x = _single(grad), _single(x)
    total = torch.sparse_csr_tensor(
        starts, columns, grad.new_zeros(len(indices)), (grad.shape[1], x.shape[1]), check_invariants=False
    )
    for g, part in zip(grad.split(_ROWS), x.split(_ROWS), strict=True):
        total = torch.sparse.sampled_addmm(total, g.t(), part)
    return total.values()


_ON_CPU = Ways('sparse_gradient', sampled=grad_by_sampled_product, dense=grad_by_dense_product)
_ELSEWHERE = Ways('sparse_gradient_cuda', gather=grad_by_gather, dense=grad_by_dense_product)


def rows_and_columns(indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The row and the column of each flat index into a matrix with ``width`` columns, both ``(K,)``, int64."""
    indices = indices.long()
    rows = torch.div(indices, width, rounding_mode='floor')
    return rows, indices - rows * width


def _single(x: Tensor) -> Tensor:
    """Cast half precision to single, since products and sums of thousands of them would lose too much precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
