"""BEiT, MAE and EVA-02: vision transformers whose blocks have one DropPath for both branches."""

from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    BlockSpec,
    GridArgument,
    GridSource,
    Host,
    Linear,
    fused_qkv,
    register_host,
    separate_linears,
)

# The attention has biases of q and v only, so it reads the weight of qkv and does not call the layer.
_QKV = {
    site: Linear('attn.qkv.weight', f'attn.{site}_bias' if site != 'k' else None, index, is_called=False)
    for index, site in enumerate('qkv')
}

for _backbone, _block in (
    ('mmpretrain.models.backbones.beit.BEiTViT', 'BEiTTransformerEncoderLayer'),
    ('mmseg.models.backbones.beit.BEiT', 'BEiTTransformerEncoderLayer'),
    ('mmseg.models.backbones.mae.MAE', 'MAETransformerEncoderLayer'),
):
    register_host(
        _backbone,
        Host(
            specs=(
                BlockSpec(
                    cls=f'{_backbone.rpartition(".")[0]}.{_block}',
                    linears={**_QKV, **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                    branches=SHARED_DROP_PATH,
                    mid_norm='ln2',
                    grid=GridSource('patch_embed'),
                    uncalled=('attn.qkv',),
                ),
            ),
            recomputed=('relative_position_index',),
            position_tables=('relative_position_bias_table', 'pos_embed'),
            not_selected=('relative_position_bias_table',),
            reads_checkpoint=_backbone.startswith('mmseg'),
        ),
    )

register_host(
    'mmpretrain.models.backbones.vit_eva02.ViTEVA02',
    Host(
        specs=(
            BlockSpec(
                cls='mmpretrain.models.backbones.vit_eva02.EVA02EndcoderLayer',
                linears={
                    **fused_qkv('attn.qkv'),
                    **separate_linears(proj='attn.proj', fc1='mlp.w12', fc2='mlp.w3'),
                },
                branches=SHARED_DROP_PATH,
                mid_norm='norm2',
                grid=GridArgument(('patch_resolution',)),
            ),
        ),
        position_tables=('pos_embed',),
    ),
)
