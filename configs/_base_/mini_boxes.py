# The comparison's detection tasks: DINOv2-S, RetinaNet on the simple feature pyramid.
_base_ = ['./mini_objects.py', './retinanet.py']

width = 128  # channels of the pyramid and the head

model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone={{_base_.dinov2_s}},
    neck=dict(type='mona_mm.SimpleFeaturePyramid', in_channels=384, out_channels=width, scales=(2, 1, 0.5), num_outs=5),
    bbox_head=dict(
        num_classes=None,  # set by the config of a task
        in_channels=width,
        stacked_convs=1,
        feat_channels=width,
        norm_cfg=dict(type='GN', num_groups=16),  # a head from scratch learns sooner with it
        anchor_generator=dict(octave_base_scale=2, strides=[7, 14, 28, 56, 112]),  # anchors from 14 pixels
    ),
    test_cfg=dict(nms_pre=500, score_thr=0.02),
)
