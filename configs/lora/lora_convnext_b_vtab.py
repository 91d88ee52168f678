_base_ = ['../_base_/vtab_convnext_b.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='LoRA', rank=8, alpha=8, sites=['fc1', 'fc2']),  # LoRA-8, scale 1; it has no attention
    )
)
