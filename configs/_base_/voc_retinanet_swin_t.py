# The VOC task with Swin-T, an ablation of the Mona paper. Everything else is as with Swin-L.
_base_ = ['./voc_retinanet_swin_l.py']

model = dict(
    backbone=dict(
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        init_cfg=dict(
            # v1.0.8 is the first release with ImageNet-22k weights of this size
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.8/'
            'swin_tiny_patch4_window7_224_22k.pth'
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
