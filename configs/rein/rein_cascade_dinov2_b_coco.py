_base_ = ['../_base_/coco_cascade_mask_rcnn_dinov2_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='Rein'),
    )
)
