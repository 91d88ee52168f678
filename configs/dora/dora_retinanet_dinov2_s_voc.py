_base_ = ['../_base_/voc_retinanet_dinov2_s.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='DoRA', rank=16, alpha=16),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.magnitude': dict(decay_mult=0.0)}))
