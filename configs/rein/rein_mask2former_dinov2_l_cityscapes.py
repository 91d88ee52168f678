_base_ = ['../_base_/cityscapes_mask2former_dinov2_l.py']

model = dict(
    _delete_=True,
    type='mona_mm.LinkedModel',
    base=dict(
        _base_.model,
        backbone=dict(type='mona_mm.PeftBackbone', base=_base_.model.backbone, peft=dict(type='Rein', link=256)),
    ),
)
