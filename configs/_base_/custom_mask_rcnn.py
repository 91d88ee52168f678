# Mask R-CNN with Swin-T on data of one's own. On boxes without masks --data leaves the mask head out.
_base_ = ['./custom_boxes.py', './custom_swin_t.py', './mask_rcnn.py']

strides = [4, 8, 16, 32]
extractor = dict(roi_layer=dict(sampling_ratio=0), out_channels=256, featmap_strides=strides)

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(convert_weights=True, **_base_.swin_t),
    neck=dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
    rpn_head=dict(in_channels=256, feat_channels=256, anchor_generator=dict(scales=[8], strides=[*strides, 64])),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=dict(in_channels=256, fc_out_channels=1024, num_classes=80),  # the number is set by --data
        mask_roi_extractor=extractor,
        mask_head=dict(num_convs=4, in_channels=256, conv_out_channels=256, num_classes=80),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=2000, max_per_img=1000), rcnn=dict(sampler=dict(num=256))),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(max_per_img=100)),
)
del extractor

scale = (640, 640)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=scale, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
