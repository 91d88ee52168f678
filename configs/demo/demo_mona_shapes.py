# The demo (`make demo`): Mona in Cascade Mask R-CNN, learning drawn shapes on one CPU core in about a minute.
#
# The base file is the full-size config: Swin-B, COCO, 36 epochs. This config makes its parts narrow and its images
# small. The Swin has no pretrained weights here: it stays at its random initial values, frozen, and Mona learns to use
# its features. The results are not good, but they show that every part works.
_base_ = ['../_base_/coco_cascade_mask_rcnn_swin_b.py']

# The data is a folder in COCO's layout and the names of its classes. tools/demo.py draws this data set.
data_root = 'data/demo_shapes/'
metainfo = dict(classes=('disc', 'square', 'triangle', 'star'))
num_classes = 4

image_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
in_this_process = dict(num_workers=0, persistent_workers=False)  # images this small need no workers
train_dataloader = dict(
    batch_size=2, **in_this_process, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(**in_this_process, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# Everything about the model that is not set here is as in the base file. A list replaces the whole list of the base
# file, so the three box heads of the cascade are written out.
width = 32  # channels of the FPN and of the heads; 256 in the base file


def bbox_head(stds):
    return dict(
        type='ConvFCBBoxHead',
        num_shared_convs=1,
        num_shared_fcs=1,
        in_channels=width,
        conv_out_channels=width,
        fc_out_channels=128,
        roi_feat_size=7,
        num_classes=num_classes,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type='BN'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    )


model = dict(
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base=dict(
            type='SwinTransformer',
            embed_dims=32,
            depths=[2, 2, 2, 2],
            num_heads=[2, 4, 8, 16],
            window_size=4,
            drop_path_rate=0.0,
        ),
        peft=dict(type='Mona', bottleneck=16),
        fast='static',  # the same forms everywhere, so that the demo says the same each time
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4])),  # anchors from 16 pixels
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=[
            bbox_head([0.1, 0.1, 0.2, 0.2]),
            bbox_head([0.05, 0.05, 0.1, 0.1]),
            bbox_head([0.033, 0.033, 0.067, 0.067]),
        ],
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, num_classes=num_classes),
    ),
    # There are at most four shapes in an image, so a few proposals are enough.
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=16)),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=32)),
)

# The batches are small and the learning rate is high, because training starts from scratch and is short.
max_epochs = 2
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, eta_min=0, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(save_best=None, max_keep_ckpts=1))
randomness = dict(seed=0)
