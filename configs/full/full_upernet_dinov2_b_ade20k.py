_base_ = ['../_base_/ade20k_upernet_dinov2_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='full',
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))  # as BEiT's for ViT-B
