# As published: five times the usual learning rate, and weight decay of the norms in the backbone.
_base_ = ['../_base_/ade20k_upernet_swin_l.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='ParaX', rank=128),
        trainable='output_norms',
    )
)
optim_wrapper = dict(optimizer=dict(lr=3e-4), paramwise_cfg=dict(custom_keys={'backbone': dict(decay_mult=1.0)}))
