"""Hierarchical backbones that are no more than a declaration, from TinyViT to RepLKNet."""

from torch import Tensor, nn

from mona_mm.hosts.convolutional import inverted_in_sequence
from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    BlockSpec,
    Branch,
    Grid,
    GridArgument,
    GridAttribute,
    GridSource,
    Host,
    SquareGrid,
    fused_qkv,
    register_host,
    separate_linears,
)

_MMPRETRAIN = 'mmpretrain.models.backbones'

register_host(
    f'{_MMPRETRAIN}.tinyvit.TinyViT',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.tinyvit.TinyViTBlock',
                # The attention's q, k and v are interleaved by head in one weight: no slice of it is one of them.
                linears=separate_linears(proj='attn.proj', fc1='mlp.fc1', fc2='mlp.fc2'),
                branches=SHARED_DROP_PATH,
                mid_norm='mlp',  # the MLP begins with its norm
                grid=GridAttribute('img_size'),
            ),
        ),
        recomputed=('attention_bias_idxs', '.ab'),
        not_selected=('attention_biases',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.mvit.MViT',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.mvit.MultiScaleBlock',
                linears={
                    **fused_qkv('attn.qkv'),
                    **separate_linears(proj='attn.proj', fc1='mlp.fc1', fc2='mlp.fc2'),
                },
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                grid=GridSource('attn', is_in_block=True),
            ),
        ),
        not_selected=('rel_pos',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.xcit.XCiT',
    Host(
        specs=(
            # Only the blocks with attention over channels; the last blocks, which serve the class token, stay stock.
            BlockSpec(
                cls=f'{_MMPRETRAIN}.xcit.XCABlock',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                branches=dict(attn=Branch('drop_path', call=0), ffn=Branch('drop_path', call=2)),
                mid_norm='norm2',
                grid=GridArgument(('H', 'W')),
            ),
        ),
    ),
)

for _backbone, _block in (('poolformer.PoolFormer', 'PoolFormerBlock'), ('riformer.RIFormer', 'RIFormerBlock')):
    register_host(
        f'{_MMPRETRAIN}.{_backbone}',
        Host(
            specs=(
                BlockSpec(
                    cls=f'{_MMPRETRAIN}.{_backbone.partition(".")[0]}.{_block}',
                    linears=separate_linears(fc1='mlp.fc1', fc2='mlp.fc2'),
                    branches=SHARED_DROP_PATH,
                    mid_norm='norm2',
                    layout='BCHW',
                ),
            ),
        ),
    )

_DAVIT = dict(mid_norm='norm2', grid=GridArgument(('hw_shape',)))
register_host(
    f'{_MMPRETRAIN}.davit.DaViT',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.davit.SpatialBlock',
                linears={**fused_qkv('attn.w_msa.qkv'), **separate_linears(proj='attn.w_msa.proj'), **FFN_LINEARS},
                branches=dict(attn=Branch('attn.drop'), ffn=Branch('ffn.dropout_layer')),
                **_DAVIT,
            ),
            BlockSpec(
                cls=f'{_MMPRETRAIN}.davit.ChannelBlock',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                branches=dict(attn=Branch('', end='attn'), ffn=Branch('ffn.dropout_layer')),
                **_DAVIT,
            ),
        ),
        recomputed=('attn_mask',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.hornet.HorNet',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.hornet.HorNetBlock',
                linears=separate_linears(proj='gnconv.proj_out', fc1='pwconv1', fc2='pwconv2'),
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                layout='BCHW',
                mid_layout='BHWC',
            ),
        ),
    ),
)

register_host(
    'mmseg.models.backbones.mscan.MSCAN',
    Host(
        specs=(
            BlockSpec(
                cls='mmseg.models.backbones.mscan.MSCABlock',
                linears=separate_linears(proj='attn.proj_2', fc1='mlp.fc1', fc2='mlp.fc2'),
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                mid_layout='BCHW',
                branch_layout='BCHW',
                grid=GridArgument(('H', 'W')),
            ),
        ),
    ),
)

register_host(
    f'{_MMPRETRAIN}.van.VAN',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.van.VANBlock',
                linears=separate_linears(proj='attn.proj_2', fc1='mlp.fc1', fc2='mlp.fc2'),
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                layout='BCHW',
            ),
        ),
    ),
)

register_host(
    f'{_MMPRETRAIN}.efficientformer.EfficientFormer',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.efficientformer.Meta4D',
                linears=separate_linears(fc1='mlp.fc1', fc2='mlp.fc2'),
                layout='BCHW',
                branches=SHARED_DROP_PATH,
                mid_norm='mlp',  # it has no norm
            ),
            BlockSpec(
                cls=f'{_MMPRETRAIN}.efficientformer.Meta3D',
                # The attention's q, k and v are interleaved by head in one weight: no slice of it is one of them.
                linears=separate_linears(proj='token_mixer.proj', fc1='mlp.fc1', fc2='mlp.fc2'),
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                grid=SquareGrid(),
            ),
        ),
        recomputed=('attention_bias_idxs', '.ab'),
        not_selected=('attention_biases',),
    ),
)

# A block is one branch: attention, whose q, k and v are interleaved by head in one weight, or an MLP.
_LEVIT = dict(cls=f'{_MMPRETRAIN}.levit.Residual', grid=SquareGrid())
register_host(
    f'{_MMPRETRAIN}.levit.LeViT',
    Host(
        specs=(
            BlockSpec(
                has='block.qkv',
                linears=separate_linears(proj='block.proj.1.linear'),
                branches=dict(attn=Branch('drop_path')),
                width='block.proj.1.linear.weight',
                **_LEVIT,
            ),
            BlockSpec(
                has='block.linear1',
                linears=separate_linears(fc1='block.linear1.linear', fc2='block.linear2.linear'),
                branches=dict(ffn=Branch('drop_path')),
                **_LEVIT,
            ),
        ),
        recomputed=('attention_bias_idxs', '.ab'),
        not_selected=('attention_biases',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.mixmim.MixMIMTransformer',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.mixmim.MixMIMBlock',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                branches=dict(attn=Branch('drop_path'), ffn=Branch('ffn.dropout_layer')),
                mid_norm='ln2',
                grid=GridAttribute('input_resolution'),
            ),
        ),
        recomputed=('relative_position_index',),
        not_selected=('relative_position_bias_table',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.repmlp.RepMLPNet',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.repmlp.RepMLPNetUnit',
                linears=separate_linears(fc1='ffn_block.ffn_fc1.conv', fc2='ffn_block.ffn_fc2.conv'),
                branches=dict(attn=Branch('', end='repmlp_block'), ffn=Branch('', end='ffn_block')),
                mid_norm='norm2',
                layout='BCHW',
            ),
        ),
    ),
)

# A block is one branch: a large depthwise convolution between two 1x1 convolutions, or an FFN of two.
_REPLK = dict(
    linears=separate_linears(fc1='pw1.conv', fc2='pw2.conv'), branches=dict(ffn=Branch('drop_path')), layout='BCHW'
)
register_host(
    f'{_MMPRETRAIN}.replknet.RepLKNet',
    Host(
        specs=(
            BlockSpec(cls=f'{_MMPRETRAIN}.replknet.RepLKBlock', **_REPLK),
            BlockSpec(cls=f'{_MMPRETRAIN}.replknet.ConvFFN', **_REPLK),
        ),
    ),
)

# A block is one branch between two 1x1 convolutions: attention over a graph of the nearest neighbours, or an FFN.
_VIG = dict(linears=separate_linears(fc1='fc1.0', fc2='fc2.0'), branches=dict(ffn=Branch('drop_path')), layout='BCHW')
for _backbone in ('Vig', 'PyramidVig'):
    register_host(
        f'{_MMPRETRAIN}.vig.{_backbone}',
        Host(
            specs=(
                BlockSpec(cls=f'{_MMPRETRAIN}.vig.Grapher', **_VIG),
                BlockSpec(cls=f'{_MMPRETRAIN}.vig.FFN', **_VIG),
            ),
        ),
    )


def grid_of_patches(child: nn.Module, args: tuple, output: Tensor) -> Grid:
    """The grid of the patches into which a patch embedding divides an image ``(B, C, H, W)``."""
    return tuple(side // patch for side, patch in zip(args[0].shape[2:], child.patch_size, strict=True))


register_host(
    f'{_MMPRETRAIN}.hivit.HiViT',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.hivit.BlockWithRPE',
                has='attn',
                linears={
                    **fused_qkv('attn.qkv'),
                    **separate_linears(proj='attn.proj', fc1='mlp.fc1', fc2='mlp.fc2'),
                },
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                grid=GridSource('patch_embed', find=grid_of_patches),
            ),
            # The blocks before the last stage have no attention, and the tokens of each patch apart: (B, N, s, s, C).
            BlockSpec(
                cls=f'{_MMPRETRAIN}.hivit.BlockWithRPE',
                linears=separate_linears(fc1='mlp.fc1', fc2='mlp.fc2'),
                branches={},
                without=('post_ffn', 'parallel_ffn'),
            ),
        ),
        recomputed=('relative_position_index',),
        not_selected=('relative_position_bias_table',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.mobilevit.MobileViT',
    Host(
        specs=(
            *inverted_in_sequence(f'{_MMPRETRAIN}.mobilenet_v2.InvertedResidual'),
            # Its tokens are every second pixel. A method at post_ffn is in the convolutional blocks around it alone.
            BlockSpec(
                cls=f'{_MMPRETRAIN}.vision_transformer.TransformerEncoderLayer',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                branches=dict(attn=Branch('attn.out_drop'), ffn=Branch('ffn.dropout_layer')),
                mid_norm='ln2',
                row_major=False,
                without=('post_attn', 'post_ffn'),
            ),
        ),
    ),
)
