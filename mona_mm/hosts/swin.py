r"""Swin: its blocks, their window attention in a faster form, and its checkpoints.

The block of mmdet's and mmseg's Swin is textually the same, and mmpretrain's has the same parts, so one forward serves
all three. SwinV2, whose checkpoints have the same names, is in :mod:`mona_mm.hosts.swin_v2`.

**The fast form of the window attention** equals the stock one within rounding, and is faster and keeps less for the
backward pass. What the stock modules do in every block of every step, and what is done here:

- Pad, roll and cut into windows, and back: four to six copies. Here one gather of tokens each way, by an index that is
  kept for the last sizes seen (:func:`window_index`); its gradient is the gather of the other direction.
- Build the shift mask, ``(windows, N, N)``, and the relative-position bias, ``(heads, N, N)``, and add them to the
  scores in turn. Here one additive mask, kept as long as the bias table is the same. Windows are ordered so that those
  that share a mask lie together: whole ones, then those that the shift has cut at the right, at the bottom, at both. A
  block keeps four masks, whatever the size of the image.
- Keep queries, keys, values, scores and probabilities. Here
  :func:`~torch.nn.functional.scaled_dot_product_attention` keeps no ``N x N`` matrix.

A bias table that trains (full tuning, BitFit) is read anew every step, with its gradient. On CPUs its attention is the
plain formula, and so is attention in half precision, whose fused backward pass there is several times slower.

The stock path is taken by attention that drops single probabilities while training, by modules within which somebody
has hooked what is left out here, by what torch.compile or another tracer sees, and on CPUs by small maps whose table
trains (:data:`_FEWEST`), where it is the faster one. The order of the windows is not the stock one, which only what
draws random numbers per window can tell: LoRA's ``drop_path`` drops other windows for the same seed.
"""

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mona_mm.errors import ConfigError
from mona_mm.hosts.block import PeftBlock
from mona_mm.hosts.fast import fast_form_of
from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.formats import END, CheckpointFormat, OwnNames, put
from mona_mm.hosts.host import (
    OUTPUT_NORMS,
    BlockSpec,
    Branch,
    Grid,
    GridArgument,
    Host,
    fused_qkv,
    register_host,
    separate_linears,
)
from mona_mm.nn.mixin import Mixin, mix_in, qualified_name
from mona_mm.nn.tracing import is_hooked, is_traced


class SwinBlock(PeftBlock):
    """The forward of a Swin block, with sites."""

    def forward_with_sites(self, x: Tensor, hw_shape: Grid) -> Tensor:
        """``(B, H*W, C) -> (B, H*W, C)``, the grid being ``hw_shape``."""
        residual = self.apply_at('post_attn', x + self.attend(self.norm1(x), hw_shape))
        x = self.ffn(self.norm2(residual), identity=residual)
        return self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))


_WINDOW_MSA = {
    'mmdet.models.backbones.swin.ShiftWindowMSA': 'mmdet.models.backbones.swin.WindowMSA',
    'mmseg.models.backbones.swin.ShiftWindowMSA': 'mmseg.models.backbones.swin.WindowMSA',
    'mmpretrain.models.utils.attention.ShiftWindowMSA': 'mmpretrain.models.utils.attention.WindowMSA',
}
"""The modules that have a fast form, by qualified name, and the only class of their ``w_msa`` that it knows."""

_SHIFT_MASK = -100.0
"""What the stock modules add to the score of two tokens that the shift has brought together."""

_FEWEST = 320_000
"""Elements of the windows, padding included, from which the fast form of a table that trains is the faster one on a
CPU. Measured on one module, forward and backward, in shares of the stock one's time: 1.03 to 1.13 up to 32 x 32 tokens
of 96 channels, 1.04 to 1.05 for 28 x 28 of 192 and 14 x 14 of 384 (a Swin-T at 224 x 224), 0.99 to 1.03 for 56 x 56 of
96 at window 7 and 0.78 at window 12 (whence the limit), 0.82 for 112 x 112 of 128."""


@fast_form_of(*_WINDOW_MSA)
def make_window_attention_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of an attention module, in place, if its ``w_msa`` is the known one."""
    if qualified_name(type(module.w_msa)) != _WINDOW_MSA[qualified_name(type(module))]:
        return False
    mix_in(module, FastWindowAttention)
    module._masks = None  # from the start: a thread that copies the module meets no attribute that another one adds
    return True


class WindowIndex(NamedTuple):
    """Where the tokens of a batch of grids are in its windows. Rows of ``(B*H*W, C)`` and of ``(windows*N, C)``.

    ``there`` is for every row of the windows the token's, ``back`` for every token its row of the windows; ``padding``
    the rows of the windows that are no token's, None if all are. ``groups`` is the number of windows that are whole,
    and cut by the shift at the right, at the bottom, at both; they lie in this order. Without a shift all are whole.
    """

    there: Tensor
    back: Tensor
    padding: Tensor | None
    groups: tuple[int, ...]


# Enough for the eight kinds of block of a Swin at eight image sizes; the largest ones take 1 MiB each.
@lru_cache(maxsize=64)
def window_index(batch: int, hw: tuple[int, int], window: int, shift: int, device: torch.device) -> WindowIndex:
    """The index of ``batch`` grids of ``(H, W)``, padded to whole windows of ``window x window`` tokens.

    Args:
        batch: ``B``.
        hw: ``(H, W)``.
        window: side of a window.
        shift: by how many tokens the padded grid is rolled up and to the left.
        device: of the index.
    """
    with torch.inference_mode(False):  # what is made in inference mode could not be used for training later
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
        there = torch.cat([part.flatten() for part in parts])
        padding = (there < 0).nonzero()[:, 0] if len(there) > batch * height * width else None
        back = torch.empty(batch * height * width, dtype=torch.int32, device=device)
        place = torch.arange(len(there), dtype=torch.int32, device=device)
        real = there >= 0
        back[there[real]] = place[real]
        groups = tuple(part.numel() // window**2 for part in parts)
        return WindowIndex(there.clamp(min=0).int(), back, padding, groups)


@cache
def shift_masks(window: int, shift: int, device: torch.device) -> Tensor:
    """Of windows that the shift has cut at the right, at the bottom, at both: ``(3, N, N)``."""
    with torch.inference_mode(False):
        moved = (torch.arange(window, device=device) >= window - shift).int()
        column, row = moved.repeat(window), moved.repeat_interleave(window)
        apart = torch.stack([region[:, None] != region for region in (column, row, column + 2 * row)])
        return torch.where(apart, _SHIFT_MASK, 0.0)


class _Gather(torch.autograd.Function):
    """Rows of ``x`` by ``index``, those at ``blank`` zero; ``reverse`` is the same of the other direction."""

    @staticmethod
    def forward(
        x: Tensor, index: Tensor, blank: Tensor | None, reverse: Tensor, reverse_blank: Tensor | None
    ) -> Tensor:
        rows = x.index_select(0, index)
        return rows if blank is None else rows.index_fill_(0, blank, 0)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        _, *ctx.directions = inputs  # not saved: they belong to window_index and are no activations

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, blank, reverse, reverse_blank = ctx.directions
        return _Gather.apply(grad, reverse, reverse_blank, index, blank), None, None, None, None


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``(windows, heads, N, d)`` each, the mask broadcast over windows."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    # The product would copy them by itself, but for a single window, of which it would keep all of q, k and v alive.
    k, v = k.contiguous(), v.contiguous()
    return ((q * scale) @ k.transpose(-2, -1) + mask).softmax(-1) @ v


def _is_observed(inner: nn.Module) -> bool:
    """Whether a ``WindowMSA`` drops single probabilities, or somebody has hooked what the fast form does not call."""
    drop = inner.attn_drop
    return is_hooked(inner, inner.softmax, drop) or (drop.training and drop.p > 0)


class FastWindowAttention(Mixin):
    """Mixin in front of a ``ShiftWindowMSA``.

    Attributes:
        _masks: the masks that were made last, and what they were made of.
    """

    _masks: tuple[tuple, Tensor, list[Tensor]] | None = None

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H*W, C) -> (B, H*W, C)``, the grid being ``hw_shape``."""
        inner = self.w_msa
        if is_traced() or _is_observed(inner) or query.is_meta:  # whose values say no window's tokens
            return super().forward(query, hw_shape)
        (batch, tokens, channels), (height, width), window = query.shape, hw_shape, self.window_size
        if tokens != height * width:
            raise ValueError(f'There are {tokens} tokens, and the grid is {height} x {width}.')
        if self._is_small(query, height, width):
            return super().forward(query, hw_shape)
        shift = self._shift(min(height, width))
        index = window_index(batch, (int(height), int(width)), window, shift, query.device)
        x = query.reshape(-1, channels)
        x = _Gather.apply(x, index.there, index.padding, index.back, None).view(-1, window**2, channels)
        x = self._attend(inner.effective() if hasattr(inner, 'effective') else inner, x, index.groups, shift)
        x = _Gather.apply(x.view(-1, channels), index.back, None, index.there, index.padding)
        return self.drop(x.view(batch, tokens, channels))

    def _is_small(self, x: Tensor, height: int, width: int) -> bool:
        """Whether the stock form is the faster one for ``x (B, H*W, C)``."""
        window = self.window_size
        padded = -(-height // window) * -(-width // window) * window**2
        trains = self.w_msa.relative_position_bias_table.requires_grad and torch.is_grad_enabled()
        return trains and x.device.type == 'cpu' and x.shape[0] * padded * x.shape[2] < _FEWEST

    def _shift(self, side: int) -> int:
        """The shift on a grid whose smaller side is so long."""
        if getattr(self, 'pad_small_map', True):  # mmdet and mmseg always do
            return self.shift_size
        if side < self.window_size:
            raise ConfigError(
                f'The feature map is {side} tokens high or wide, less than the window of {self.window_size}. Set '
                'pad_small_map=True in the backbone, or give it larger images.'
            )
        return self.shift_size if side > self.window_size else 0

    def _attend(self, inner: nn.Module, x: Tensor, groups: tuple[int, ...], shift: int) -> Tensor:
        """``(windows, N, C) -> (windows, N, C)``, as the ``WindowMSA`` ``inner`` does."""
        count, length, _ = x.shape
        qkv = inner.qkv(x).reshape(count, length, 3, inner.num_heads, -1).permute(2, 0, 3, 1, 4)
        table = inner.relative_position_bias_table
        trains = table.requires_grad and torch.is_grad_enabled()
        attend = _plain if qkv.device.type == 'cpu' and (trains or qkv.dtype.itemsize < 4) else _fused
        dtype = qkv.dtype if attend is _fused else table.dtype
        masks = self._make_masks(table, dtype, shift) if trains else self._kept_masks(table, dtype, shift)
        parts = qkv.split(groups, 1) if len(groups) > 1 else (qkv,)
        # By unbind: the gradient of three selections would be three tensors of all three, mostly zeros, added up.
        parts = [
            attend(*part.unbind(0), mask, inner.scale).transpose(1, 2).flatten(2)
            for part, mask in zip(parts, masks, strict=True)
            if part.shape[1]
        ]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return inner.proj_drop(inner.proj(x))

    def _kept_masks(self, table: Tensor, dtype: torch.dtype, shift: int) -> list[Tensor]:
        if table.is_inference():
            return self._make_masks(table, dtype, shift)
        # The table's storage is kept beside the masks, so that its address can be no other table's.
        key = (table.data_ptr(), table._version, table.device, dtype, shift)
        kept = self._masks  # looked at once: another thread may exchange them at any time
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kept = key, table.detach(), self._make_masks(table, dtype, shift)
            self._masks = kept
        return kept[2]

    def _make_masks(self, table: Tensor, dtype: torch.dtype, shift: int) -> list[Tensor]:
        """Of every group of windows, ``(1, heads, N, N)``."""
        index = self.w_msa.relative_position_index
        length = len(index)
        bias = table[index.flatten()].view(1, length, length, -1).permute(0, 3, 1, 2).to(dtype)
        masks = [bias]
        if shift:
            masks += [bias + cut for cut in shift_masks(self.window_size, shift, table.device).to(dtype)]
        if (
            table.device.type != 'cpu'
        ):  # rows of a multiple of 8: kernels would copy any other mask to such at every call
            masks = [F.pad(mask, (0, -length % 8))[..., :length] for mask in masks]
        return masks

    def train(self, mode: bool = True) -> nn.Module:
        """``nn.Module.train``. Between training and evaluation, tables may be exchanged in ways that leave no trace
        (mmengine's EMAHook writes to ``.data``): the masks are made anew."""
        self._masks = None
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        new, arguments, state = super().__reduce_ex__(protocol)
        return new, arguments, {**state, '_masks': None}


_ATTENTION = (
    rf'(qkv|proj)\.{END}|q_bias|v_bias|logit_scale|cpb_mlp\.\d\.{END}|relative_position_bias_table'
    r'|relative_position_index|relative_coords_table'
)
OWN_NAMES = OwnNames(
    in_blocks=rf'stages\.\d+\.(downsample\.(norm|reduction)\.{END}'
    rf'|blocks\.\d+\.(norm[123]\.{END}|ffn\.layers\.(0\.0|1)\.{END}|attn\.w_msa\.({_ATTENTION})|attn_mask))',
    outside=rf'patch_embed\.(projection|norm)\.{END}|absolute_pos_embed|norm\d\.{END}|.*\.attn_mask',
)
"""The names of a Swin and of a SwinV2."""

# Microsoft's names, which timm and the published Mona code share, and those of the OpenMMLab libraries.
_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'(\.blocks\.\d+)\.attn\.', r'\1.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
_RENAMES_BACK = (
    (r'\.attn\.w_msa\.', '.attn.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^stages\.', 'layers.'),
)


def convert_from_microsoft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's Swin and SwinV2, and timm's, for the OpenMMLab libraries.

    The merging of patches is the end of a stage with Microsoft and in Swin, the beginning of the next one in the newer
    timm and in mmpretrain's SwinV2. Its neighbours come in another order, see :func:`_reorder_neighbours`.
    """
    is_second_version = any(name.endswith('.attn.logit_scale') for name in tensors)
    stages = {int(match[1]) for name in tensors if (match := re.match(r'layers\.(\d+)\.downsample\.', name))}
    is_at_beginning = bool(stages) and 0 not in stages
    shift = is_second_version - is_at_beginning
    converted: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        name = source
        if '.downsample.' in name:
            if not (is_second_version and '.norm.' in name):  # which there comes after the reduction
                tensor = _reorder_neighbours(tensor)
            name = re.sub(r'^layers\.(\d+)', lambda match: f'layers.{int(match[1]) + shift}', name)
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        put(converted, name, tensor, source)
    return converted


def convert_to_microsoft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_from_microsoft` for a Swin of the first version."""
    converted: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        name, tensor = source, _restore_neighbours(tensor) if '.downsample.' in source else tensor
        for pattern, replacement in _RENAMES_BACK:
            name = re.sub(pattern, replacement, name)
        put(converted, name, tensor, source)
    return converted


def _reorder_neighbours(tensor: Tensor) -> Tensor:
    """From the published order of the four merged neighbours' channels to mmdet's.

    ``(..., 4C)`` holds the neighbours (0,0), (1,0), (0,1), (1,1) one after another; ``nn.Unfold`` in mmdet's
    PatchMerging yields them per channel, row by row: ``(..., C, 4)`` with (0,0), (0,1), (1,0), (1,1).
    """
    neighbours = tensor.unflatten(-1, (4, -1))  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()


def _restore_neighbours(tensor: Tensor) -> Tensor:
    """The inverse of :func:`_reorder_neighbours`."""
    neighbours = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def resize_position_tables(given: dict[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Interpolate the tables of relative positions ``((2w-1)^2, heads)`` of another window size, in place."""
    for name, table in list(given.items()):
        if not name.endswith('relative_position_bias_table') or name not in current:
            continue
        length, heads = current[name].shape
        if table.shape[0] == length or table.shape[1] != heads:
            continue
        old, new = round(table.shape[0] ** 0.5), round(length**0.5)
        grid = table.T.reshape(1, heads, old, old).float()
        resized = F.interpolate(grid, size=(new, new), mode='bicubic')
        given[name] = resized.view(heads, length).T.contiguous().to(table.dtype)
        given.pop(name.replace('bias_table', 'index'), None)


MICROSOFT = CheckpointFormat(
    name='swin',
    recognised_by=r'layers\.\d+\.blocks\.\d+\.',
    convert=convert_from_microsoft,
    # A classifier's head and norm (the OpenMMLab backbones have norms of their own at their outputs), and masks that
    # every library computes.
    left_out=r'head\.|norm\.|.*\.attn_mask$',
)
"""The checkpoints of Microsoft's Swin and SwinV2, of timm's, and of the published Mona code."""

CHECKPOINTS = dict(
    own_names=OWN_NAMES,
    formats=(MICROSOFT,),
    fit_checkpoint=resize_position_tables,
    output_norms=OUTPUT_NORMS,
    recomputed=('relative_position_index', 'relative_coords_table', 'attn_mask'),
    position_tables=('relative_position_bias_table',),
    not_selected=('relative_position_bias_table', 'cpb_mlp'),  # as ViT's position embedding is
)
"""What the hosts of this family know about their checkpoints and what of them SPT selects from."""


def _last_output(backbone: nn.Module, x: Tensor, hw: Grid) -> Tensor:
    x = getattr(backbone, f'norm{len(backbone.stages) - 1}')(x)
    return x.view(-1, *hw, x.shape[-1]).permute(0, 3, 1, 2).contiguous()


for _module, _reads_checkpoint in (
    ('mmdet.models.backbones.swin', True),
    ('mmseg.models.backbones.swin', True),
    ('mmpretrain.models.backbones.swin_transformer', False),
):
    register_host(
        f'{_module}.SwinTransformer',
        Host(
            specs=(
                BlockSpec(
                    cls=f'{_module}.SwinBlock',
                    mixin=SwinBlock,
                    linears={**fused_qkv('attn.w_msa.qkv'), **separate_linears(proj='attn.w_msa.proj'), **FFN_LINEARS},
                    branches=dict(attn=Branch('attn.drop'), ffn=Branch('ffn.dropout_layer')),
                    grid=GridArgument(('hw_shape',)),
                ),
            ),
            last_output=_last_output,
            reads_checkpoint=_reads_checkpoint,
            **CHECKPOINTS,
        ),
    )
