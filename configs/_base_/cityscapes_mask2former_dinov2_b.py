# From GTA5 to Cityscapes with DINOv2 ViT-B/14: the settings of cityscapes_mask2former_dinov2_l.py.
_base_ = ['./cityscapes_mask2former_dinov2_l.py']

model = dict(
    backbone=dict(
        arch='base',
        out_indices=(2, 5, 8, 11),
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth'),
    ),
    neck=dict(in_channels=768),
)
