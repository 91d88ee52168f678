# UperNet with Swin-T on data of one's own: --data names the folder, and sets the data sets and the classes.
_base_ = ['./custom_schedule.py', './custom_swin_t.py']
default_scope = 'mmseg'

norm_cfg = dict(type='SyncBN', requires_grad=True)
size = (512, 512)

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=size,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone={{_base_.swin_t}},
    decode_head=dict(
        type='UPerHead',
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=256,
        dropout_ratio=0.1,
        num_classes=2,  # set by --data, as all that depends on it
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=size, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=size, cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize, since classes are compared in the original image
    dict(type='PackSegInputs'),
]
data_root = 'data/mine/'
classes = ('background', 'foreground')


def split(name, pipeline, **options):
    prefix = dict(img_path=f'images/{name}', seg_map_path=f'annotations/{name}')
    metainfo = dict(classes=classes)
    return dict(
        type='BaseSegDataset', data_root=data_root, data_prefix=prefix, metainfo=metainfo, pipeline=pipeline, **options
    )


train_dataloader = dict(dataset=split('train', train_pipeline))
val_dataloader = dict(dataset=split('val', test_pipeline, test_mode=True))
test_dataloader = val_dataloader
del split
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='mIoU'), visualization=dict(type='SegVisualizationHook'))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
