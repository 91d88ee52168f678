# CamVid (street scenes with 11 classes), small enough for a CPU: DINOv2-S at 168 x 224, a light head, 100 iterations.
_base_ = ['./mini_schedule.py', './dinov2_s.py']
default_scope = 'mmseg'

classes = (
    'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian', 'Bicyclist',
)  # fmt: skip
size = (168, 224)  # height and width, multiples of the patch size 14

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=size,
    ),
    backbone={{_base_.dinov2_s}},
    decode_head=dict(
        type='FCNHead',
        in_channels=384,
        in_index=0,
        channels=128,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=len(classes),
        norm_cfg=dict(type='BN'),
        align_corners=False,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

dataset_type = 'BaseSegDataset'
data_root = 'data/camvid/'
metainfo = dict(classes=classes)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(224, 168), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 168), keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize, since classes are compared in the original image
    dict(type='PackSegInputs'),
]


def _split(name, pipeline, **options):
    prefix = dict(img_path=f'images/{name}', seg_map_path=f'annotations/{name}')
    return dict(
        type=dataset_type, data_root=data_root, data_prefix=prefix, metainfo=metainfo, pipeline=pipeline, **options
    )


train_dataloader = dict(dataset=_split('train', train_pipeline))
val_dataloader = dict(batch_size=4, dataset=_split('val', test_pipeline, test_mode=True))
test_dataloader = dict(batch_size=4, dataset=_split('test', test_pipeline, test_mode=True))
del _split
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

default_hooks = dict(visualization=dict(type='SegVisualizationHook'))
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
