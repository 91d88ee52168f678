"""transformers' models in :class:`mona_mm.models.HFBackbone`. Nothing here needs transformers."""

from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    BlockSpec,
    Branch,
    GridArgument,
    GridSource,
    Host,
    fused_qkv,
    grid_of_map,
    register_host,
    separate_linears,
)

_MODELS = 'transformers.models'
_MLP = separate_linears(fc1='mlp.fc1', fc2='mlp.fc2')
_UP_AND_DOWN = separate_linears(fc1='mlp.up_proj', fc2='mlp.down_proj')
"""An FFN of other names, or a SwiGLU of three linear layers, of which the gate ``gate_proj`` is at no site."""
_ATTENTION = separate_linears(q='attention.q_proj', k='attention.k_proj', v='attention.v_proj', proj='attention.o_proj')


def _dino(module: str, layer: str, patches: str, family: str) -> tuple[BlockSpec, ...]:
    return tuple(
        BlockSpec(
            cls=f'{_MODELS}.{module}.modeling_{module}.{layer}',
            has=('attention.q_proj', linears['fc2'].module),
            linears={**_ATTENTION, **linears},
            branches=SHARED_DROP_PATH,
            mid_norm='norm2',
            grid=GridSource(patches, grid_of_map),
            family=family,
        )
        for linears in (_MLP, _UP_AND_DOWN)
    )


def _convnext(module: str, layer: str, linear: str, family: str) -> BlockSpec:
    return BlockSpec(
        cls=f'{_MODELS}.{module}.modeling_{module}.{layer}',
        linears=separate_linears(fc1=f'{linear}1', fc2=f'{linear}2'),
        branches=dict(ffn=Branch('drop_path')),
        layout='BCHW',
        family=family,
    )


register_host(
    'mona_mm.models.hf_backbone.HFBackbone',
    Host(
        specs=(
            *_dino('dinov2', 'Dinov2Layer', 'embeddings.patch_embeddings.projection', 'Dinov2'),
            *_dino(
                'dinov2_with_registers',
                'Dinov2WithRegistersLayer',
                'embeddings.patch_embeddings.projection',
                'Dinov2WithRegisters',
            ),
            *_dino('dinov3_vit', 'DINOv3ViTLayer', 'embeddings.patch_embeddings', 'DINOv3ViT'),
            BlockSpec(
                cls=f'{_MODELS}.swin.modeling_swin.SwinLayer',
                has='attention.q_proj',
                linears={**_ATTENTION, **_MLP},
                # the FFN ends with the Dropout that the attention has called before
                branches=dict(attn=Branch('drop_path'), ffn=Branch('dropout', call=1)),
                mid_norm='layernorm_after',
                grid=GridArgument(('input_dimensions',)),
                family='Swin',
            ),
            _convnext('convnext', 'ConvNextLayer', 'pwconv', 'ConvNext'),
            _convnext('convnextv2', 'ConvNextV2Layer', 'pwconv', 'ConvNextV2'),
            _convnext('dinov3_convnext', 'DINOv3ConvNextLayer', 'pointwise_conv', 'DINOv3ConvNext'),
            BlockSpec(
                cls=f'{_MODELS}.hiera.modeling_hiera.HieraLayer',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **_MLP},
                branches=SHARED_DROP_PATH,
                mid_norm='layernorm_after',
                row_major=False,
                family='Hiera',
            ),
        ),
        recomputed=('relative_position_index', 'inv_freq'),
        position_tables=('relative_position_bias_table', 'position_embeddings'),
        not_selected=('relative_position_bias_table',),
    ),
)
