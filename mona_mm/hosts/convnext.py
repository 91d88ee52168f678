"""ConvNeXt, ConvNeXt V2 and EdgeNeXt of mmpretrain, whose blocks have one branch, and ConvNeXt's checkpoints."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mona_mm.hosts.block import PeftBlock
from mona_mm.hosts.formats import END, CheckpointFormat, OwnNames, rename
from mona_mm.hosts.host import OUTPUT_NORMS, BlockSpec, Branch, Host, fused_qkv, register_host, separate_linears


class ConvNeXtBlock(PeftBlock):
    """The forward of a ConvNeXt block, with sites.

    Its one branch (depthwise convolution, two linears, layer scale) counts as an FFN. The pointwise convolutions may
    be linear layers on ``(B, H, W, C)``.
    """

    def forward_with_sites(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, H, W)``."""
        residual, is_channels_last = x, self.linear_pw_conv
        layout = dict(data_format='channel_last' if is_channels_last else 'channel_first')
        x = self.depthwise_conv(x)
        x = self.norm(x.permute(0, 2, 3, 1) if is_channels_last else x, **layout)
        x = self.act(self.pointwise_conv1(x))
        x = self.pointwise_conv2(x if self.grn is None else self.grn(x, **layout))
        x = x.permute(0, 3, 1, 2) if is_channels_last else x
        x = x if self.gamma is None else x.mul(self.gamma.view(1, -1, 1, 1))
        return self.apply_at('post_ffn', self.add_parallel_ffn(residual + self.drop_path(x), residual))


def convert_convnext(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the official ConvNeXt and ConvNeXt V2 to mmpretrain's names."""
    renames = ((r'\.dwconv\.', '.depthwise_conv.'), (r'\.pwconv(\d)\.', r'.pointwise_conv\1.'), (r'^norm\.', 'norm3.'))
    converted = rename(tensors, renames)
    return {name: t.flatten() if '.grn.' in name else t for name, t in converted.items()}


def convert_convnext_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's ConvNeXt to mmpretrain's names."""
    renames = (
        (r'^stem\.', 'downsample_layers.0.'),
        (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
        (r'^stages\.(\d+)\.blocks\.', r'stages.\1.'),
        (r'\.conv_dw\.', '.depthwise_conv.'),
        (r'\.mlp\.fc(\d)\.', r'.pointwise_conv\1.'),
        (r'\.mlp\.grn\.weight', '.grn.gamma'),
        (r'\.mlp\.grn\.bias', '.grn.beta'),
        (r'^(head\.norm|norm_pre)\.', 'norm3.'),
    )
    return rename(tensors, renames)


_LINEARS = separate_linears(fc1='pointwise_conv1', fc2='pointwise_conv2')
_BLOCK = BlockSpec(
    cls='mmpretrain.models.backbones.convnext.ConvNeXtBlock',
    mixin=ConvNeXtBlock,
    linears=_LINEARS,
    branches=dict(ffn=Branch('drop_path')),
)

register_host(
    'mmpretrain.models.backbones.convnext.ConvNeXt',
    Host(
        specs=(_BLOCK,),
        output_norms=OUTPUT_NORMS,
        own_names=OwnNames(
            in_blocks=rf'stages\.\d+\.\d+\.(gamma|grn\.(gamma|beta)|(depthwise_conv|norm|pointwise_conv[12])\.{END})'
            rf'|downsample_layers\.\d+\.\d+\.{END}',
            outside=rf'norm\d\.{END}',
        ),
        formats=(
            CheckpointFormat(
                name='convnext',
                recognised_by=r'stages\.\d+\.\d+\.dwconv\.',
                convert=convert_convnext,
                left_out=r'head\.|decoder|mask_token$|proj\.|pred\.',
            ),
            CheckpointFormat(
                name='convnext-timm',
                recognised_by=r'stages\.\d+\.blocks\.\d+\.conv_dw\.',
                convert=convert_convnext_timm,
                left_out=r'head\.(?!norm)',
            ),
        ),
    ),
)

register_host(
    'mmpretrain.models.backbones.edgenext.EdgeNeXt',
    Host(
        specs=(
            replace(_BLOCK, changed_in_place=True),  # by a table of positions, if it has one
            # The block adds its input behind the two linears alone, so that there is no place behind the attention.
            BlockSpec(
                cls='mmpretrain.models.backbones.edgenext.SDTAEncoder',
                linears={**fused_qkv('csa.qkv'), **separate_linears(proj='csa.proj'), **_LINEARS},
                branches=dict(ffn=Branch('drop_path', call=1)),
                layout='BCHW',
            ),
        ),
    ),
)
