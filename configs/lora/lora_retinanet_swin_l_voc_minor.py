_base_ = ['../_base_/voc_retinanet_swin_l.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.model.backbone}},
        peft=dict(type='LoRA', rank=64, alpha=64, init='minor'),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.peft.': dict(decay_mult=0.0)}))
