"""A block with sites: the mixin in front of a host's block class, and the hooks on the modules within it.

A forward pass keeps nothing on a module, so that threads may share a model. The grid is an argument of the block; for
hosts that do not pass one, :func:`mona_mm.hosts.inject.forward_on_grid` adds it. An activation checkpoint then has it
as well when it recomputes the block in the backward pass, in whichever thread. Hooks within the block find the grid in
the thread-local :data:`_RUNNING`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from mona_mm.errors import ConfigError
from mona_mm.hosts.host import BlockSpec, Grid, GridArgument, input_of
from mona_mm.hosts.sites import PeftModules
from mona_mm.nn.mixin import Mixin
from mona_mm.nn.substitute import call_substituted
from mona_mm.nn.tracing import is_traced

_NOT_TOLD = (
    'The grid of the tokens is not known here, so this method cannot run. Either a block was called without its '
    'backbone, which passes the grid to it, or an activation checkpoint covers only a part of a block: put the '
    'checkpoint around the whole block (with_cp=True does, where the backbone has it).'
)


def _why_unknown(spec: BlockSpec) -> str:
    """Why the grid of the tokens is not known in a call of a block."""
    if spec.grid is None:
        return (
            f'The grid of the tokens is not known, so this method cannot run: the description of the blocks {spec.cls} '
            '(BlockSpec) has no `grid`. Give it a GridSource, GridArgument, GridAttribute or SquareGrid.'
        )
    if isinstance(spec.grid, GridArgument):
        return (
            f'The grid of the tokens is not known, so this method cannot run: this call of a {spec.cls} has no '
            f'{" and ".join(spec.grid.names)} among its arguments, by which the grid is known '
            f'(grid=GridArgument({spec.grid.names!r}, position={spec.grid.position})).'
        )
    return _NOT_TOLD


class _UnknownGrid:
    """Stands for ``(H, W)`` where the grid is not known, and raises, with the reason, only if a method reads it."""

    def __init__(self, reason: str = _NOT_TOLD) -> None:
        self._reason = reason

    def __getitem__(self, index: int) -> int:
        raise ConfigError(self._reason)

    def __iter__(self) -> Iterator[int]:
        yield self[0]


@dataclass
class _Call:
    """The state of one call of a block, for the hooks within it.

    Args:
        block: the block that runs.
        grid: the grid ``(H, W)`` of its tokens.
        residual: the input of a hooked block's FFN, after the module at ``post_attn``.
        shift: the change that the module at ``post_attn`` has made.
        reached: the sites whose hooks have been called.
        counts: the index, from 0, of the latest call of the module that is hooked for a site.
    """

    block: PeftBlock
    grid: Grid | _UnknownGrid
    residual: Tensor | None = None
    shift: Tensor | None = None
    reached: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)


class _Running(threading.local):
    call: _Call | None = None


_RUNNING = _Running()
"""The call of the innermost block that runs in this thread."""


class StockLinear:
    """The stock linear layer or convolution, or the slice of a fused layer, that a method's module stands beside.

    Args:
        module: the layer.
        channels: the channels of its output that belong to the slice.
    """

    def __init__(self, module: nn.Module, channels: slice) -> None:
        self._module = module
        self._channels = channels

    @property
    def weight(self) -> Tensor:
        """The weight, ``(out_channels, in_channels)``. That of a convolution is flattened, so that ``in_channels`` are
        those of a patch, ``channels * height * width``."""
        return self._effective('weight')[self._channels].flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``(out_channels,)``; None if the layer has none."""
        bias = self._effective('bias')
        return None if bias is None else bias[self._channels]

    def _effective(self, name: str) -> Tensor | None:
        """The parameter that enters the layer's output: with its single weights (SPT), or of a quantized layer."""
        tensor = getattr(self._module, name)
        if callable(tensor):
            tensor = tensor()
            return tensor.dequantize() if tensor is not None and tensor.is_quantized else tensor
        changes = {} if isinstance(self._module, PeftBlock) else getattr(self._module, 'peft', {})
        return changes[name](tensor) if name in changes else tensor

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply another weight ``(c, in_channels)`` at the places where the layer, a convolution, applies its own.

        Args:
            x: the input of the convolution, ``(B, C, H, W)``.
            weight: the flattened weight.

        Returns:
            The output without a bias, ``(B, c, H', W')``.
        """
        conv = self._module
        kernel = weight.unflatten(1, conv.weight.shape[1:])
        return F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation)


@dataclass(frozen=True)
class PassedGrid:
    """The grid ``(H, W)`` as the last positional argument of a block whose stock forward has no argument for it.

    It is positional, since mmengine's wrapper for activation checkpointing passes on nothing else.
    """

    hw: Grid


class PeftBlock(Mixin):
    """Mixin in front of a host's block class. A subclass implements the forward of one block class, with its sites."""

    spec: BlockSpec
    peft: PeftModules
    hooked: frozenset[str]
    """The sites that are reached by hooks."""
    num_hooks: int = 0
    """The number of hooks on the modules of the block when it was built."""
    stream_width: int | None = None
    """The width of the stream, by the description of the block; None without a module at a stream site."""

    def train(self, mode: bool = True) -> PeftBlock:
        """Switch to training or evaluation, and hook the modules that have been replaced since the last time."""
        _hook_replaced(self)
        return super().train(mode)

    def forward_with_sites(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock block's forward, with :meth:`apply_at` at its sites."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock block's forward with the method in it. The last argument may be a :class:`PassedGrid`."""
        if getattr(self, 'with_cp', False) and torch.is_grad_enabled():
            # The stock blocks use the re-entrant form, which needs an input that requires a gradient: under a frozen
            # base the first block's does not, though the method's modules do.
            return checkpoint(self._forward_in_call, args, kwargs, use_reentrant=False)
        return self._forward_in_call(args, kwargs)

    def _forward_in_call(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Run :meth:`forward_with_sites` as this thread's call, and check that the hooks reached their sites."""
        given, grid = args, None
        if args and isinstance(args[-1], PassedGrid):
            *args, passed = args
            grid = passed.hw
        elif self.spec.grid is not None:
            grid = self.spec.grid.of_call(self, args, kwargs)
        elif self.spec.layout != 'BNC':  # for sites within the block where its tokens are (B, N, C)
            sizes = input_of(args, kwargs).shape
            grid = tuple(sizes[1:3] if self.spec.layout == 'BHWC' else sizes[2:])
        around, call = _RUNNING.call, _Call(self, _UnknownGrid(_why_unknown(self.spec)) if grid is None else grid)
        _RUNNING.call = call
        try:
            x = self.forward_with_sites(*args, **kwargs)
        finally:
            _RUNNING.call = around
        if self.spec.changed_in_place and 'post_ffn' in self.peft:
            x = x.clone()
        missed = self.hooked - call.reached
        if missed and missed & set(self.peft):
            if not self.training and _hook_replaced(self):  # in training, statistics would be updated a second time
                return self._forward_in_call(given, kwargs)
            raise self._not_reached(missed)
        return x

    def _not_reached(self, sites: set[str]) -> ConfigError:
        """The error for sites whose hooks were not called in a call of the block."""
        name, listed = type(self).__name__, ', '.join(sorted(sites))
        if sum(1 for _ in _site_hooks(self)) >= self.num_hooks:
            return ConfigError(
                f'The forward of this {name} does not call the modules that its description (BlockSpec) names for '
                f'{listed}, or not as often, so the method there is not reached. Correct the paths in `linears` '
                '(is_called=False for a layer whose weight alone is read), or the path and `call` of the Branch.'
            )
        return ConfigError(
            f'A module within this {name} was replaced after the method had been attached, so the method at {listed} '
            'is not reached. Call the train() or eval() of the model after modules have been replaced, or replace them '
            'before PeftBackbone is built.'
        )

    def apply_at(self, site: str, x: Tensor, layout: str | None = None) -> Tensor:
        """Apply the module at a stream site to ``x``; return ``x`` itself if the site has no module.

        Args:
            site: the name of the site.
            x: the stream, ``(B, N, C)`` or four-dimensional.
            layout: the layout of a four-dimensional ``x``, ``'BHWC'`` or ``'BCHW'``; by default the block's.
        """
        if site not in self.peft:
            return x
        layout = 'BNC' if x.dim() == 3 else layout or self.spec.layout
        self._check_width(site, x, layout)
        if x.dim() == 3:
            return self.peft[site](x, self._grid_of(x))
        if layout == 'BHWC':
            return self.peft[site](x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)
        grid = x.shape[2], x.shape[3]
        return self.peft[site](x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid)

    def _check_width(self, site: str, x: Tensor, layout: str) -> None:
        if self.stream_width is None or is_traced():
            return
        width = x.shape[1] if x.dim() == 4 and layout != 'BHWC' else x.shape[-1]
        if width != self.stream_width:
            raise ConfigError(
                f'The stream at {site} of this {type(self).__name__} has the shape {tuple(x.shape)}, which is not '
                f'{self.stream_width} wide in the layout {layout}. Correct the `layout` (or mid_layout, branch_layout) '
                'or the `width` in the description of the block (BlockSpec).'
            )

    def _grid_of(self, tokens: Tensor) -> Grid | _UnknownGrid:
        """The grid of tokens ``(B, N, C)``, the last ``H * W`` of which form it."""
        call = _call_of(self)
        grid = _UnknownGrid() if call is None else call.grid
        if isinstance(grid, _UnknownGrid) or is_traced() or tokens.shape[1] >= grid[0] * grid[1]:
            return grid
        return _UnknownGrid(
            f'There are {tokens.shape[1]} tokens here on a grid of {grid[0]} x {grid[1]}: the model has left some out, '
            'as a masked autoencoder does, so a method that convolves over the grid cannot run. Choose one that maps '
            'every token alone (Adapter, AdaptFormer, LoRA, LoRand).'
        )

    def add_parallel_ffn(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add the output of the module at ``parallel_ffn`` on ``residual`` to ``x``, if there is such a module."""
        return x + self.apply_at('parallel_ffn', residual) if 'parallel_ffn' in self.peft else x

    def weights(self) -> dict[str, Tensor]:
        """The weights that the stock block reads directly, with the method's additions, by path."""
        weights: dict[str, Tensor] = {}
        for path in self.spec.uncalled:
            module = self.get_submodule(path)
            for parameter, delta in getattr(module, 'peft', {}).items():
                weights[f'{path}.{parameter}'] = delta(getattr(module, parameter))
        for site, linear in self.spec.linears.items():  # which may depend on the weight, single weights included
            if site in self.peft and not linear.is_called:
                weight = weights.get(linear.weight)
                weight = _tensor(self, linear.weight) if weight is None else weight
                rows = linear.rows(weight)
                part = weight[rows]
                delta = self.peft[site].delta_weight(part.flatten(1)).view_as(part)
                before_rows = (0, 0) * (delta.dim() - 1)
                weights[linear.weight] = weight + F.pad(delta, (*before_rows, rows.start, len(weight) - rows.stop))
        return weights

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the attention module, with the method's additions in the weights that the host reads directly."""
        return call_substituted(self, self.weights(), lambda block: block.attn(*args, **kwargs))


class HookedBlock(PeftBlock):
    r"""The stock forward of a block, with sites that are reached by hooks, so that no forward has to be rewritten.

    In a block :math:`u = x + a(n_1(x)),\; y = u + f(n_2(u))` a module :math:`m` at ``post_attn`` is a hook before the
    norm :math:`n_2` that hands on :math:`u + d`, with :math:`d = m(u) - u`, and an addition of :math:`d` to what the
    block returns, which is then :math:`(u + d) + f(n_2(u + d))`. Where the residual passes a module :math:`r` of its
    own, :math:`y = r(u) + f(n_2(u))`, both :math:`r` and :math:`n_2` get :math:`m(u)` and nothing is added. A block of
    one branch has its input as residual.
    """

    def forward_with_sites(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward of the block, with the additions of its stream sites."""
        # The stock block's own checkpoint would recompute without the state of the call; see PeftBlock.forward.
        parts = {**self.weights(), **({'with_cp': False} if getattr(self, 'with_cp', False) else {})}

        def stock(block: nn.Module) -> Any:
            return super(PeftBlock, block).forward(*args, **kwargs)

        out = call_substituted(self, parts, stock)
        x, other_outputs = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        call = _call_of(self)
        middle = self.spec.mid_layout or self.spec.layout
        if call.shift is not None:
            x = x + _as_layout(call.shift, middle, self.spec.layout, call.grid)
        if self.spec.mid_norm is None:
            residual = input_of(args, kwargs)
        else:
            residual = _as_layout(call.residual, middle, self.spec.layout, call.grid)
        x = self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))
        return x if other_outputs is None else (x, *other_outputs)


def _as_layout(x: Tensor | None, layout: str, wanted: str, grid: Grid) -> Tensor | None:
    """Bring a tensor on a grid from one layout (``'BNC'``, ``'BHWC'`` or ``'BCHW'``) to another."""
    if x is None or layout == wanted:
        return x
    if layout == 'BNC':
        x, layout = x.unflatten(1, tuple(grid)), 'BHWC'
        if wanted == 'BHWC':
            return x
    if wanted == 'BNC':
        return x.flatten(1, 2) if layout == 'BHWC' else x.flatten(2).transpose(1, 2)
    return x.permute(0, 3, 1, 2) if layout == 'BHWC' else x.permute(0, 2, 3, 1)


def _tensor(module: nn.Module, path: str) -> Tensor:
    """The parameter at a path. For a parametrized one it is the tensor that enters the computation."""
    path, _, name = path.rpartition('.')
    return getattr(module.get_submodule(path), name)


def hook_sites(block: PeftBlock) -> None:
    """Register the hooks that call the modules of ``block.peft``, on modules within the block, in place."""
    hooked: list[str] = []
    middle = [site for site in ('post_attn', 'parallel_ffn') if site in block.peft]
    if middle and isinstance(block, HookedBlock) and block.spec.mid_norm is not None:
        for option in ('mid_residual', 'mid_norm'):
            path = getattr(block.spec, option)
            if path:
                module = block.spec.module_in(block, option, path)
                module.register_forward_pre_hook(partial(_map_residual, block))
        hooked += middle
    for name, branch in block.spec.branches.items():
        for site, path in ((f'{name}_branch', branch.drop_path), (f'{name}_out', '')):
            if site not in block.peft:
                continue
            module = block.spec.module_in(block, f'the branch {name!r} with', path or branch.end)
            if path:
                module.register_forward_pre_hook(partial(_map_input, block, site, branch.call))
            else:
                module.register_forward_hook(partial(_map_output, block, site, branch.call))
            hooked.append(site)
    grid = block.spec.grid
    if getattr(grid, 'is_in_block', False):
        module = block.spec.module_in(block, 'grid=GridSource', grid.path)
        module.register_forward_hook(partial(_see_grid, block, grid.find))
    sites_of_linear: dict[str, list[str]] = {}
    for site, linear in block.spec.linears.items():
        if site in block.peft and linear.is_called:
            sites_of_linear.setdefault(linear.module, []).append(site)
    for path, sites in sites_of_linear.items():
        linear = block.get_submodule(path)
        channel_axis = 1 if isinstance(linear, nn.Conv2d) else -1
        linear.register_forward_hook(partial(_add_to_linear, block, tuple(sites), channel_axis))
        hooked += sites
    block.hooked = frozenset(hooked)
    block.num_hooks = sum(1 for _ in _site_hooks(block))


def unhook_sites(block: PeftBlock) -> None:
    """Remove the hooks that :func:`hook_sites` registered."""
    for hooks, key in [*_site_hooks(block)]:
        del hooks[key]
    vars(block).pop('num_hooks', None)


def _site_hooks(block: PeftBlock) -> Iterator[tuple[dict[int, Callable], int]]:
    """Yield each hook of the block's sites as the dict of hooks that it is in, and its key there.

    Hooks of other blocks within the block, such as layers of a PeftModel, are theirs.
    """
    for module in block.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_hook_of(block, module, hook)]:
                yield hooks, key


def _hook_replaced(block: PeftBlock) -> bool:
    """Hook the sites anew if modules with hooks have been replaced, and return whether any were.

    mmengine's and torch's converters between BatchNorm and SyncBatchNorm do that, for example.
    """
    if sum(1 for _ in _site_hooks(block)) >= block.num_hooks:
        return False
    unhook_sites(block)
    hook_sites(block)
    return True


def _is_hook_of(block: PeftBlock, module: nn.Module, hook: Any) -> bool:
    """Whether a hook on a module is one of a block's; blocks are compared as :func:`_call_of` does."""
    if isinstance(hook, partial):
        return hook.func in _HOOKS and vars(hook.args[0]) is vars(block)
    return hook is keep_calling and vars(module) is vars(block)


# Hooks are partials of module-level functions: a closure would keep serving the source model after a deepcopy.


def _map_input(block: PeftBlock, site: str, call_index: int | None, module: nn.Module, args: tuple) -> tuple | None:
    if not _is_call_of_site(block, site, call_index):
        return None
    return block.apply_at(site, args[0], block.spec.branch_layout), *args[1:]


def _map_output(
    block: PeftBlock, site: str, call_index: int | None, module: nn.Module, args: tuple, out: Tensor
) -> Tensor | None:
    return block.apply_at(site, out, block.spec.branch_layout) if _is_call_of_site(block, site, call_index) else None


def _is_call_of_site(block: PeftBlock, site: str, call_index: int | None) -> bool:
    """Whether this call of a hooked module belongs to a site of the block, and not to another block or branch."""
    call = _call_of(block)
    if call is None:  # the module was called alone, or within another block that shares it
        return call_index is None and _RUNNING.call is None
    count = call.counts[site] = call.counts.get(site, -1) + 1
    if call_index is not None and count != call_index:
        return False
    call.reached.add(site)
    return True


def _map_residual(block: HookedBlock, module: nn.Module, args: tuple) -> tuple | None:
    call = _call_of(block)
    if call is None:
        return None
    call.reached.update(('post_attn', 'parallel_ffn'))
    if block.spec.mid_residual and call.residual is not None:  # mapped on its way into the module of the residual
        return call.residual, *args[1:]
    call.residual = block.apply_at('post_attn', args[0], block.spec.mid_layout)
    if 'post_attn' in block.peft and not block.spec.mid_residual:
        call.shift = call.residual - args[0]
    return call.residual, *args[1:]


def _see_grid(block: PeftBlock, find: Callable, module: nn.Module, args: tuple, out: Any) -> None:
    call = _call_of(block)
    if call is not None:
        call.grid = find(module, args, out)


def _add_to_linear(
    block: PeftBlock, sites: tuple[str, ...], channel_axis: int, linear: nn.Module, args: tuple, out: Tensor
) -> Tensor:
    call = _call_of(block)
    if call is not None:
        call.reached.update(sites)
    x = args[0]
    if isinstance(linear, nn.Conv2d):  # of a 1x1 convolution with a stride the output is of these pixels alone
        x = x[..., :: linear.stride[0], :: linear.stride[1]]
    x, out = x.movedim(channel_axis, -1), out.movedim(channel_axis, -1)
    starts, branches = [], []
    for site in sites:
        channels = block.spec.linears[site].channels(out.shape[-1])
        starts.append(channels.start)
        branches.append(block.peft[site](x, out[..., channels], StockLinear(linear, channels)))
    if branches[0].shape == out.shape:
        return (out + branches[0]).movedim(-1, channel_axis)
    if is_traced():  # tracers cannot differentiate or record _AddToSlices
        for start, branch in zip(starts, branches, strict=True):
            out = out + F.pad(branch, (start, out.shape[-1] - start - branch.shape[-1]))
        return out.movedim(-1, channel_axis)
    return _AddToSlices.apply(out, starts, *branches).movedim(-1, channel_axis)


def _call_of(block: PeftBlock) -> _Call | None:
    """This thread's call of the block, if it is the innermost one.

    Blocks are compared by their attributes, since torch.export makes other objects that share them.
    """
    call = _RUNNING.call
    return call if call is not None and vars(call.block) is vars(block) else None


def keep_calling(module: nn.Module, args: tuple, out: Any) -> None:
    """Change nothing. Fused forms, such as that of torch's ``TransformerEncoderLayer``, read the weights of layers past
    the layers' own forward, but not if a layer has a hook; this one keeps them from it."""


_HOOKS = (_map_input, _map_output, _map_residual, _see_grid, _add_to_linear)


class _AddToSlices(torch.autograd.Function):
    """Add each of the branches ``(..., c)`` to ``out (..., C)``, from its start in the last dimension.

    It makes one new tensor for all branches, and none for the gradients. With in-place additions autograd would copy
    the gradient of ``out`` for each branch, since ``out`` is a view of the result of a matrix product; forward and
    backward then take 1.1 to 2.2 times as long (measured).
    """

    @staticmethod
    def forward(out: Tensor, starts: list[int], *branches: Tensor) -> Tensor:
        dtype = out.dtype
        for branch in branches:
            dtype = torch.promote_types(dtype, branch.dtype)
        out = out.to(dtype, copy=True)
        for start, branch in zip(starts, branches, strict=True):
            out[..., start : start + branch.shape[-1]] += branch
        return out

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        _, starts, *branches = inputs
        ctx.slices = [slice(start, start + b.shape[-1]) for start, b in zip(starts, branches, strict=True)]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *(grad[..., part] for part in ctx.slices)
