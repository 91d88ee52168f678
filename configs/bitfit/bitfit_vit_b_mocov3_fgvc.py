_base_ = ['../_base_/fgvc_vit_b_mocov3.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        trainable='bitfit',
    )
)
