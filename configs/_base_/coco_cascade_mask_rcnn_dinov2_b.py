# COCO instance segmentation with DINOv2 ViT-B/14: Cascade Mask R-CNN on a simple feature pyramid, 36 epochs. The
# settings are those of the Swin-B config, except for the pyramid, whose strides are 1/4 to 2 times the patch size.
_base_ = ['./coco_cascade_mask_rcnn_swin_b.py']

model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
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
    neck=dict(
        _delete_=True,
        type='mona_mm.SimpleFeaturePyramid',
        in_channels=768,
        out_channels=256,
        scales=(4, 2, 1, 0.5),
        num_outs=5,
    ),
    rpn_head=dict(anchor_generator=dict(strides=[3.5, 7, 14, 28, 56])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=[3.5, 7, 14, 28]),
        mask_roi_extractor=dict(featmap_strides=[3.5, 7, 14, 28]),
    ),
)
