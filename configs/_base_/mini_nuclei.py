# Nuclei: instance segmentation in microscope images, at 252 x 252 with up to 120 objects in an image: DINOv2-S, Mask
# R-CNN on the simple feature pyramid, 250 iterations of 2 images.
_base_ = ['./mini_objects.py', './mask_rcnn.py']

classes = ('nucleus',)
data_root = 'data/nuclei/'
scale = (252, 252)  # the longer side gets 252 pixels, 18 patches
width = 128
strides = [7, 14, 28, 56]
extractor = dict(
    roi_layer=dict(sampling_ratio=2),
    out_channels=width,
    featmap_strides=strides,
    finest_scale=28,  # objects below 56 pixels are read from the finest map
)

model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone={{_base_.dinov2_s}},
    neck=dict(type='mona_mm.SimpleFeaturePyramid', in_channels=384, out_channels=width, scales=(2, 1, 0.5), num_outs=4),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[2], strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=len(classes)),
        mask_roi_extractor=extractor,
        mask_head=dict(num_convs=1, in_channels=width, conv_out_channels=width, num_classes=len(classes)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200), rcnn=dict(max_per_img=150)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
data = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
val_evaluator = dict(metric='segm', ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator
del data, extractor
