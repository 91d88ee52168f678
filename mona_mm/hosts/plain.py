"""Backbones of mmpretrain with tokens of one resolution that are no more than a declaration: T2T-ViT, TNT, MlpMixer,
Conformer."""

from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import (
    MMCV_BRANCHES,
    TORCH_ATTENTION,
    TORCH_UNCALLED,
    BlockSpec,
    Branch,
    GridSource,
    Host,
    fused_qkv,
    grid_of_map,
    register_host,
    separate_linears,
)

_MMPRETRAIN = 'mmpretrain.models.backbones'
_VIT_LAYER = dict(
    linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
    branches=dict(attn=Branch('attn.out_drop'), ffn=Branch('ffn.dropout_layer')),
    mid_norm='ln2',
)

register_host(
    f'{_MMPRETRAIN}.t2t_vit.T2T_ViT',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.t2t_vit.T2TTransformerLayer',
                grid=GridSource('tokens_to_token'),
                **_VIT_LAYER,
            ),
        ),
        position_tables=('pos_embed',),
    ),
)

register_host(
    f'{_MMPRETRAIN}.tnt.TNT',
    Host(
        specs=(
            # One class of blocks for the pixels of each patch and for the patches: two grids, of which none is known.
            BlockSpec(
                cls=f'{_MMPRETRAIN}.tnt.TransformerBlock',
                linears={**TORCH_ATTENTION, **FFN_LINEARS},
                branches=MMCV_BRANCHES,
                mid_norm='norm_ffn',
                uncalled=TORCH_UNCALLED,
                row_major=False,
                changed_in_place=True,
            ),
        ),
    ),
)

register_host(
    f'{_MMPRETRAIN}.mlp_mixer.MlpMixer',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.mlp_mixer.MixerBlock',
                linears=separate_linears(fc1='channel_mix.layers.0.0', fc2='channel_mix.layers.1'),
                branches=dict(ffn=Branch('channel_mix.dropout_layer')),  # the other ends with tokens as channels
                mid_norm='ln2',
                grid=GridSource('patch_embed'),
            ),
        ),
    ),
)

register_host(
    f'{_MMPRETRAIN}.conformer.Conformer',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.vision_transformer.TransformerEncoderLayer',
                grid=GridSource('trans_patch_conv', find=grid_of_map),
                **_VIT_LAYER,
            ),
            BlockSpec(
                cls=f'{_MMPRETRAIN}.conformer.ConvBlock',
                linears=separate_linears(fc1='conv1', fc2='conv3'),
                branches={},
                layout='BCHW',
                without=('parallel_ffn',),
            ),
        ),
    ),
)
