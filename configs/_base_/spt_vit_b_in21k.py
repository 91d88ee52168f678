# ViT-B/16, supervised on ImageNet-21k, from Google's file.
_base_ = ['./spt_classification.py']

model = dict(
    backbone=dict(
        type='VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz',
        ),
    ),
    head=dict(in_channels=768),
)
