_base_ = ['../_base_/flowers102_swin_l.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='SPT', budget='0.5%', structured=dict(type='Adapter', bottleneck=8)),
    )
)
