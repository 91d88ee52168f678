"""Hierarchical backbones that are no more than a declaration: TinyViT, MViT, XCiT, PoolFormer, DaViT, HorNet, MSCAN."""

from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    BlockSpec,
    Branch,
    GridArgument,
    GridAttribute,
    GridSource,
    Host,
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

register_host(
    f'{_MMPRETRAIN}.poolformer.PoolFormer',
    Host(
        specs=(
            BlockSpec(
                cls=f'{_MMPRETRAIN}.poolformer.PoolFormerBlock',
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
