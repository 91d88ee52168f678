# ADE20K semantic segmentation with DINOv2 ViT-B/14: UperNet on a simple feature pyramid, 160k iterations. The side of a
# crop is 518 pixels or 37 patches, the size of the published table of positions.
_base_ = ['./ade20k_upernet_swin_l.py']

model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(
        _delete_=True,
        type='mona_mm.DINOv2',  # the attention is global in every layer
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
        ),
    ),
    neck=dict(type='mona_mm.SimpleFeaturePyramid', in_channels=768, out_channels=256, scales=(4, 2, 1, 0.5)),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
    auxiliary_head=dict(in_channels=256),
)
