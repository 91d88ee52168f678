_base_ = ['../_base_/voc_retinanet_dinov2_s.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='Rein'),
    )
)
