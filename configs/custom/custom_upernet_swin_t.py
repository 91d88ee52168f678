_base_ = ['../_base_/custom_upernet.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='Mona', bottleneck=64),
    )
)
