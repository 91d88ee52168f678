# Swin-B, supervised on ImageNet-22k. SPT's code for it was never released, so the settings are those of its ViT.
_base_ = ['./spt_classification.py']

model = dict(
    backbone=dict(
        type='SwinTransformer',
        arch='base',
        img_size=224,
        window_size=7,
        drop_path_rate=0.1,
        out_indices=(3,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
            'swin_base_patch4_window7_224_22k.pth',
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=1024),
)
