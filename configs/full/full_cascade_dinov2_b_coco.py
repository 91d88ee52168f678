_base_ = ['../_base_/coco_cascade_mask_rcnn_dinov2_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='full',
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))  # as ViTDet's for ViT-B
