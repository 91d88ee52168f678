_base_ = ['../_base_/ade20k_upernet_dinov2_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='Rein'),
    )
)
