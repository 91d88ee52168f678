# Mona with the learning rate that every other method has on this task.
_base_ = ['../_base_/oxfordpets_swin_l.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='Mona', bottleneck=64),
    )
)
