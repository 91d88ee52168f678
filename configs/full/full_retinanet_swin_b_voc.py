_base_ = ['../_base_/voc_retinanet_swin_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='full',
    )
)
