# Pascal VOC detection with DINOv2 ViT-S/14: RetinaNet on a simple feature pyramid, whose strides are half the patch to
# eight times the patch. Everything else is as with Swin-L.
_base_ = ['./voc_retinanet_swin_l.py']

model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(
        _delete_=True,
        type='mona_mm.DINOv2',  # the attention is global in every layer
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
        ),
    ),
    neck=dict(
        _delete_=True,
        type='mona_mm.SimpleFeaturePyramid',
        in_channels=384,
        out_channels=256,
        scales=(2, 1, 0.5),
        num_outs=5,
    ),
    bbox_head=dict(anchor_generator=dict(strides=[7, 14, 28, 56, 112])),
)
