"""PVT and PVTv2 of mmdet and MixVisionTransformer of mmseg, and the checkpoints of PVTv2.

The branches of these blocks add their residual themselves.
"""

from collections.abc import Mapping

from torch import Tensor

from mona_mm.errors import CheckpointMismatchError
from mona_mm.hosts.block import PeftBlock
from mona_mm.hosts.formats import END, CheckpointFormat, OwnNames
from mona_mm.hosts.host import (
    MMCV_BRANCHES,
    TORCH_ATTENTION,
    TORCH_UNCALLED,
    BlockSpec,
    Grid,
    GridArgument,
    Host,
    register_host,
    separate_linears,
)


class PVTBlock(PeftBlock):
    """The forward of a PVTv2 layer, with sites."""

    def forward_with_sites(self, x: Tensor, hw_shape: Grid) -> Tensor:
        """Map ``(B, H*W, C)`` on the grid ``hw_shape`` to ``(B, H*W, C)``."""
        residual = self.apply_at('post_attn', self.attend(self.norm1(x), hw_shape, identity=x))
        x = self.ffn(self.norm2(residual), hw_shape, identity=residual)
        return self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))


def convert_pvt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the official PVT and PVTv2 by mmdet's own function."""
    from mmdet.models.backbones.pvt import pvt_convert  # imported here, since no other format needs mmdet

    try:
        return dict(pvt_convert(tensors))
    except (LookupError, ValueError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f'The checkpoint has names of PVT but is incomplete: {type(error).__name__} {error}.'
        ) from error


_LAYER = dict(branches=MMCV_BRANCHES, grid=GridArgument(('hw_shape',)), uncalled=TORCH_UNCALLED)

register_host(
    'mmdet.models.backbones.pvt.PyramidVisionTransformerV2',
    Host(
        specs=(
            BlockSpec(
                cls='mmdet.models.backbones.pvt.PVTEncoderLayer',
                mixin=PVTBlock,
                linears={**TORCH_ATTENTION, **separate_linears(fc1='ffn.layers.0', fc2='ffn.layers.4')},
                **_LAYER,
            ),
        ),
        reads_checkpoint=True,
        own_names=OwnNames(
            in_blocks=rf'layers\.\d+\.(0\.(projection|norm)\.{END}|2\.{END}|1\.0\.pos_embed|1\.\d+\.(norm[12]\.{END}'
            rf'|attn\.(sr|norm)\.{END}|attn\.attn\.(in_proj_{END}|out_proj\.{END})|ffn\.layers\.\d\.{END}))',
            outside=r'(?!)',
        ),
        formats=(
            CheckpointFormat(
                name='pvt',
                recognised_by=r'block\d+\.\d+\.attn\.',
                convert=convert_pvt,
                left_out=r'head|norm\.|cls_token',
            ),
        ),
        position_tables=('pos_embed',),
    ),
)

register_host(
    'mmdet.models.backbones.pvt.PyramidVisionTransformer',
    Host(
        specs=(
            BlockSpec(
                cls='mmdet.models.backbones.pvt.PVTEncoderLayer',
                mixin=PVTBlock,
                linears={**TORCH_ATTENTION, **separate_linears(fc1='ffn.layers.0', fc2='ffn.layers.3')},
                **_LAYER,
            ),
        ),
        reads_checkpoint=True,
        position_tables=('pos_embed',),
    ),
)

register_host(
    'mmseg.models.backbones.mit.MixVisionTransformer',
    Host(
        specs=(
            BlockSpec(
                cls='mmseg.models.backbones.mit.TransformerEncoderLayer',
                linears={**TORCH_ATTENTION, **separate_linears(fc1='ffn.layers.0', fc2='ffn.layers.4')},
                mid_norm='norm2',
                **_LAYER,
            ),
        ),
        reads_checkpoint=True,
    ),
)
