"""Swin: its blocks and its checkpoints.

The block of mmdet's and mmseg's Swin is textually the same, and mmpretrain's has the same parts, so one forward serves
all three. Its window attention has a faster form in :mod:`mona_mm.hosts.window_attention`. SwinV2, whose checkpoints
have the same names, is in :mod:`mona_mm.hosts.swin_v2`.
"""

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts.block import PeftBlock
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


class SwinBlock(PeftBlock):
    """The forward of a Swin block, with sites."""

    def forward_with_sites(self, x: Tensor, hw_shape: Grid) -> Tensor:
        """Map ``(B, H*W, C)`` on the grid ``hw_shape`` to ``(B, H*W, C)``."""
        residual = self.apply_at('post_attn', x + self.attend(self.norm1(x), hw_shape))
        x = self.ffn(self.norm2(residual), identity=residual)
        return self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))


_ATTENTION = (
    rf'(qkv|proj)\.{END}|q_bias|v_bias|logit_scale|cpb_mlp\.\d\.{END}|relative_position_bias_table'
    r'|relative_position_index|relative_coords_table'
)
OWN_NAMES = OwnNames(
    in_blocks=rf'stages\.\d+\.(downsample\.(norm|reduction)\.{END}'
    rf'|blocks\.\d+\.(norm[123]\.{END}|ffn\.layers\.(0\.0|1)\.{END}|attn\.w_msa\.({_ATTENTION})|attn_mask))',
    outside=rf'patch_embed\.(projection|norm)\.{END}|absolute_pos_embed|norm\d\.{END}|.*\.attn_mask',
)
"""The names of the tensors of a Swin or SwinV2."""

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
    """Convert Microsoft's and timm's Swin and SwinV2 to the names of the OpenMMLab libraries.

    Patch merging is at the end of a stage in Microsoft's code and the libraries' Swin, and at the beginning of the next
    stage in newer versions of timm and in mmpretrain's SwinV2. The order of the merged neighbours differs, see
    :func:`_reorder_neighbours`.
    """
    is_second_version = any(name.endswith('.attn.logit_scale') for name in tensors)
    stages = {int(match[1]) for name in tensors if (match := re.match(r'layers\.(\d+)\.downsample\.', name))}
    is_at_beginning = bool(stages) and 0 not in stages
    shift = is_second_version - is_at_beginning
    converted: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        name = source
        if '.downsample.' in name:
            if not (is_second_version and '.norm.' in name):  # SwinV2's norm comes after the reduction
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
    """Bring the channels of four merged neighbours from the published order to mmdet's.

    The published ``(..., 4C)`` holds the neighbours (0,0), (1,0), (0,1), (1,1) one after another; ``nn.Unfold`` in
    mmdet's PatchMerging yields them per channel, row by row: ``(..., C, 4)`` with (0,0), (0,1), (1,0), (1,1).
    """
    neighbours = tensor.unflatten(-1, (4, -1))  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()


def _restore_neighbours(tensor: Tensor) -> Tensor:
    """The inverse of :func:`_reorder_neighbours`."""
    neighbours = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def resize_position_tables(given: dict[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Interpolate tables of relative positions ``((2w-1)^2, heads)`` from another window size, in place."""
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
