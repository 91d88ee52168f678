"""The window attention of a Swin in a faster form.

It equals the stock one within rounding, is usually faster, and keeps less for the backward pass. The stock modules do
the following in every block of every step; the fast form replaces it:

- They pad, roll and cut into windows, and back, which is four to six copies. The fast form gathers the tokens once in
  each direction, by an index that is cached for the latest sizes (:func:`window_index`); the gradient of a gather is
  the gather of the other direction.
- They build the shift mask, ``(windows, N, N)``, and the relative-position bias, ``(heads, N, N)``, and add both to
  the scores. The fast form adds one mask, which is kept until the bias table changes. Windows that share a mask lie
  together: first the whole windows, then those that the shift has cut at the right, at the bottom, and at both. A
  block keeps four masks, whatever the size of the image.
- They keep queries, keys, values, scores and probabilities. With
  :func:`~torch.nn.functional.scaled_dot_product_attention` no ``N x N`` matrix is kept.

A bias table that trains (full tuning, BitFit) is read anew in every step, with its gradient. Whether the fused
attention or the plain formula is faster depends on the device, the dtype, and on whether the table trains. It is
measured at the first call (:mod:`mona_mm.nn.choice`), and so is whether the fast form as a whole is faster than the
stock one.

The stock path also runs where the attention drops probabilities while training, where a module is hooked that the fast
form does not call, and under torch.compile and other tracers. The order of the windows differs from the stock one,
which matters only to modules that draw random numbers per window: LoRA's ``drop_path`` drops other windows for the same
seed.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mona_mm.errors import ConfigError
from mona_mm.hosts.fast import fast_form_of
from mona_mm.hosts.host import Grid
from mona_mm.nn.choice import Ways, bucket, measures, run_with_gradients
from mona_mm.nn.mixin import Mixin, mix_in, qualified_name
from mona_mm.nn.tracing import is_hooked, is_traced

_WINDOW_MSA = {
    'mmdet.models.backbones.swin.ShiftWindowMSA': 'mmdet.models.backbones.swin.WindowMSA',
    'mmseg.models.backbones.swin.ShiftWindowMSA': 'mmseg.models.backbones.swin.WindowMSA',
    'mmpretrain.models.utils.attention.ShiftWindowMSA': 'mmpretrain.models.utils.attention.WindowMSA',
}
"""The classes of modules that have a fast form, each with the only class of ``w_msa`` that the fast form supports."""

_SHIFT_MASK = -100.0
"""The value that the stock modules add to the score of two tokens that only the shift has brought together."""


@fast_form_of(*_WINDOW_MSA)
def make_window_attention_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of an attention module, in place, if its ``w_msa`` is the known one."""
    if qualified_name(type(module.w_msa)) != _WINDOW_MSA[qualified_name(type(module))]:
        return False
    mix_in(module, FastWindowAttention)
    module._masks = None  # set here, so that no thread adds an attribute while another copies the module
    return True


class WindowIndex(NamedTuple):
    """The positions of the tokens ``(B*H*W, C)`` of a batch of grids in its windows ``(windows*N, C)``.

    Args:
        token_of_slot: for every row of the windows, the row of its token.
        slot_of_token: for every token, its row of the windows.
        padding: the rows of the windows that hold no token; None if there are none.
        groups: the numbers of windows that are whole, and that the shift has cut at the right, at the bottom, and at
            both; the windows lie in this order. Without a shift all are whole, and there is one number.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    padding: Tensor | None
    groups: tuple[int, ...]


# Enough for the eight kinds of block of a Swin at eight image sizes; the largest ones take 1 MiB each.
@lru_cache(maxsize=64)
def window_index(batch: int, hw: tuple[int, int], window: int, shift: int, device: torch.device) -> WindowIndex:
    """The index of ``batch`` grids of ``(H, W)``, padded to whole windows of ``window x window`` tokens.

    Args:
        batch: the batch size ``B``.
        hw: the grid ``(H, W)``.
        window: the side of a window, in tokens.
        shift: the number of tokens by which the padded grid is rolled up and to the left.
        device: the device of the index.
    """
    with torch.inference_mode(False):  # tensors made in inference mode could not be used for training later
        height, width = hw
        rows, columns = -(-height // window), -(-width // window)
        token = torch.arange(batch * height * width, device=device).view(batch, height, width)
        token = F.pad(token, (0, columns * window - width, 0, rows * window - height), value=-1)
        token = token.roll((-shift, -shift), (1, 2))
        token = token.view(batch, rows, window, columns, window).transpose(2, 3).flatten(3)  # (B, rows, columns, N)
        parts = [token]
        if shift:
            whole, right = token[:, :-1].split((columns - 1, 1), 2)
            bottom, corner = token[:, -1:].split((columns - 1, 1), 2)
            parts = [whole, right, bottom, corner]
        token_of_slot = torch.cat([part.flatten() for part in parts])
        padding = (token_of_slot < 0).nonzero()[:, 0] if len(token_of_slot) > batch * height * width else None
        slot_of_token = torch.empty(batch * height * width, dtype=torch.int32, device=device)
        slot = torch.arange(len(token_of_slot), dtype=torch.int32, device=device)
        is_token = token_of_slot >= 0
        slot_of_token[token_of_slot[is_token]] = slot[is_token]
        groups = tuple(part.numel() // window**2 for part in parts)
        return WindowIndex(token_of_slot.clamp(min=0).int(), slot_of_token, padding, groups)


@cache
def shift_masks(window: int, shift: int, device: torch.device) -> Tensor:
    """The masks ``(3, N, N)`` of windows that the shift has cut at the right, at the bottom, and at both."""
    with torch.inference_mode(False):
        moved = (torch.arange(window, device=device) >= window - shift).int()
        column, row = moved.repeat(window), moved.repeat_interleave(window)
        apart = torch.stack([region[:, None] != region for region in (column, row, column + 2 * row)])
        return torch.where(apart, _SHIFT_MASK, 0.0)


class _Gather(torch.autograd.Function):
    """Gather the rows of ``x`` at ``index``, with zeros at ``blank``.

    ``reverse`` and ``reverse_blank`` are the same for the other direction, which the gradient takes.
    """

    @staticmethod
    def forward(
        x: Tensor, index: Tensor, blank: Tensor | None, reverse: Tensor, reverse_blank: Tensor | None
    ) -> Tensor:
        rows = x.index_select(0, index)
        return rows if blank is None else rows.index_fill_(0, blank, 0)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        _, *ctx.directions = inputs  # not by save_for_backward: they belong to window_index and are no activations

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, blank, reverse, reverse_blank = ctx.directions
        return _Gather.apply(grad, reverse, reverse_blank, index, blank), None, None, None, None


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Fused attention of ``q``, ``k``, ``v (windows, heads, N, d)``, with a mask that is broadcast over windows."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    # The product copies k and v anyway, except for a single window, where their views would keep q, k and v alive.
    k, v = k.contiguous(), v.contiguous()
    return ((q * scale) @ k.transpose(-2, -1) + mask).softmax(-1) @ v


_FUSED_FIRST = Ways('window_attention', fused=_fused, plain=_plain)
_PLAIN_FIRST = Ways('plain_first_window_attention', plain=_plain, fused=_fused)


def _needs_stock_path(w_msa: nn.Module) -> bool:
    """Whether a ``WindowMSA`` drops probabilities, or has hooks on modules that the fast form does not call."""
    drop = w_msa.attn_drop
    return is_hooked(w_msa, w_msa.softmax, drop) or (drop.training and drop.p > 0)


class FastWindowAttention(Mixin):
    """Mixin in front of a ``ShiftWindowMSA``.

    Attributes:
        _masks: the key of the latest masks, the table that they were made from, and the masks.
    """

    _masks: tuple[tuple, Tensor, list[Tensor]] | None = None

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Map ``(B, H*W, C)`` on the grid ``hw_shape`` to ``(B, H*W, C)``."""
        w_msa = self.w_msa
        if is_traced() or _needs_stock_path(w_msa) or query.is_meta:  # an index on the meta device has no values
            return super().forward(query, hw_shape)
        tokens, (height, width) = query.shape[1], hw_shape
        if tokens != height * width:
            raise ValueError(f'There are {tokens} tokens, but the grid is {height} x {width}.')
        return self._choose(query, hw_shape)(self, query, hw_shape)

    def _choose(self, x: Tensor, hw: Grid) -> Callable[['FastWindowAttention', Tensor, Grid], Tensor]:
        """The faster form for the shape of ``x``."""
        if not measures():
            return FastWindowAttention._fast
        parts = [*self.modules()][1:]
        if is_hooked(*parts) or any(isinstance(part, Mixin) for part in parts):  # a trial would run a hook or a method
            return FastWindowAttention._fast
        w_msa, windows = self.w_msa, (self.w_msa.num_heads, self.window_size, self.shift_size)
        weight = w_msa.qkv.weight  # that of a dynamically quantized layer is a method
        trained = w_msa.relative_position_bias_table.requires_grad, isinstance(weight, Tensor) and weight.requires_grad
        key = x.shape[-1], *windows, *trained, bucket(x.shape[0]), *map(bucket, hw)
        return _FORMS.choose_form(self, x, hw, key=key)

    def _stock(self, query: Tensor, hw: Grid) -> Tensor:
        return super().forward(query, hw)

    def _fast(self, query: Tensor, hw: Grid) -> Tensor:
        w_msa, window = self.w_msa, self.window_size
        (batch, tokens, channels), (height, width) = query.shape, hw
        shift = self._shift(min(height, width))
        index = window_index(batch, (int(height), int(width)), window, shift, query.device)
        x = query.reshape(-1, channels)
        x = _Gather.apply(x, index.token_of_slot, index.padding, index.slot_of_token, None)
        x = x.view(-1, window**2, channels)
        x = self._attend(w_msa.effective() if hasattr(w_msa, 'effective') else w_msa, x, index.groups, shift)
        x = _Gather.apply(x.view(-1, channels), index.slot_of_token, None, index.token_of_slot, index.padding)
        return self.drop(x.view(batch, tokens, channels))

    def _shift(self, side: int) -> int:
        """The shift on a grid whose smaller side is ``side`` tokens long."""
        if getattr(self, 'pad_small_map', True):  # mmdet and mmseg always do
            return self.shift_size
        if side < self.window_size:
            raise ConfigError(
                f'The feature map is {side} tokens high or wide, less than the window of {self.window_size}. Set '
                'pad_small_map=True in the backbone, or use larger images.'
            )
        return self.shift_size if side > self.window_size else 0

    def _attend(self, w_msa: nn.Module, x: Tensor, groups: tuple[int, ...], shift: int) -> Tensor:
        """Map ``(windows, N, C)`` to ``(windows, N, C)`` as the ``WindowMSA`` does."""
        count, length, _ = x.shape
        qkv = w_msa.qkv(x).reshape(count, length, 3, w_msa.num_heads, -1).permute(2, 0, 3, 1, 4)
        table = w_msa.relative_position_bias_table
        trains = table.requires_grad and torch.is_grad_enabled()
        attend = self._choose_attention(qkv, table, trains, w_msa.scale)
        dtype = qkv.dtype if attend is _fused else table.dtype
        masks = self._make_masks(table, dtype, shift) if trains else self._kept_masks(table, dtype, shift)
        parts = qkv.split(groups, 1) if len(groups) > 1 else (qkv,)
        # unbind has one gradient; that of three selections would be the sum of three tensors that are mostly zeros.
        parts = [
            attend(*part.unbind(0), mask, w_msa.scale).transpose(1, 2).flatten(2)
            for part, mask in zip(parts, masks, strict=True)
            if part.shape[1]
        ]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return w_msa.proj_drop(w_msa.proj(x))

    def _choose_attention(self, qkv: Tensor, table: Tensor, trains: bool, scale: float) -> Callable[..., Tensor]:
        """The faster form of the attention of ``qkv (3, windows, heads, N, d)``."""
        _, windows, heads, length, width = qkv.shape
        is_training = torch.is_grad_enabled() and qkv.requires_grad
        key = qkv.device.type, qkv.dtype, heads, length, width, bucket(windows), trains, is_training

        def run(attend: Callable[..., Tensor]) -> None:
            mask = table.new_zeros(1, heads, length, length, dtype=qkv.dtype if attend is _fused else table.dtype)
            mask.requires_grad_(trains)
            run_with_gradients(lambda parts: attend(*parts.unbind(0), mask, scale), qkv, [mask])

        ways = _PLAIN_FIRST if trains or qkv.dtype.itemsize < 4 else _FUSED_FIRST
        return ways.choose(key, run)

    def _kept_masks(self, table: Tensor, dtype: torch.dtype, shift: int) -> list[Tensor]:
        if table.is_inference():
            return self._make_masks(table, dtype, shift)
        # The table's storage is kept beside the masks, so that no other table can get its address.
        key = (table.data_ptr(), table._version, table.device, dtype, shift)
        kept = self._masks  # read once, since another thread may replace them at any time
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kept = key, table.detach(), self._make_masks(table, dtype, shift)
            self._masks = kept
        return kept[2]

    def _make_masks(self, table: Tensor, dtype: torch.dtype, shift: int) -> list[Tensor]:
        """Make the mask ``(1, heads, N, N)`` of every group of windows."""
        index = self.w_msa.relative_position_index
        length = len(index)
        bias = table[index.flatten()].view(1, length, length, -1).permute(0, 3, 1, 2).to(dtype)
        masks = [bias]
        if shift:
            masks += [bias + cut for cut in shift_masks(self.window_size, shift, table.device).to(dtype)]
        if table.device.type != 'cpu':
            # With rows of a multiple of 8; the kernels would copy any other mask into that form at every call.
            masks = [F.pad(mask, (0, -length % 8))[..., :length] for mask in masks]
        return masks

    def train(self, mode: bool = True) -> nn.Module:
        """``nn.Module.train``, which also discards the masks.

        Between training and evaluation, tables may be changed without a trace (mmengine's EMAHook writes to ``.data``).
        """
        self._masks = None
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        new, arguments, state = super().__reduce_ex__(protocol)
        return new, arguments, {**state, '_masks': None}


_FORMS = Ways('window_msa', fast=FastWindowAttention._fast, stock=FastWindowAttention._stock)
