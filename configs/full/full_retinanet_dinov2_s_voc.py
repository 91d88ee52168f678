_base_ = ['../_base_/voc_retinanet_dinov2_s.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='full',
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))  # as ViTDet's for ViT-B
