_base_ = ['../_base_/vtab_convnext_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='bitfit',
    )
)
