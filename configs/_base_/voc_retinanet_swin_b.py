# The VOC task with Swin-B, an ablation of the Mona paper. Everything else is as with Swin-L.
_base_ = ['./voc_retinanet_swin_l.py']

model = dict(
    backbone=dict(
        embed_dims=128,
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
            'swin_base_patch4_window7_224_22k.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
