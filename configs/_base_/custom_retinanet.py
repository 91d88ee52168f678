# RetinaNet with Swin-T on data of one's own.
_base_ = ['./custom_boxes.py', './custom_swin_t.py', './retinanet.py']

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(convert_weights=True, **_base_.swin_t),
    neck=dict(
        type='FPN',
        in_channels=[96, 192, 384, 768],
        start_level=1,
        out_channels=256,
        add_extra_convs='on_output',
        num_outs=5,
    ),
    bbox_head=dict(
        num_classes=80,  # set by --data, as all that depends on it
        in_channels=256,
        stacked_convs=4,
        feat_channels=256,
        norm_cfg=dict(type='GN', num_groups=32),  # a head from scratch learns sooner with it
        anchor_generator=dict(octave_base_scale=4, strides=[8, 16, 32, 64, 128]),
    ),
    test_cfg=dict(nms_pre=1000, score_thr=0.05),
)
