# A classifier on data of one's own, the mean of DINOv2-S's last map and a linear layer: --data names the folder, and
# sets the data sets and the classes.
_base_ = ['./classifier.py', './custom_schedule.py', './custom_dinov2_s.py']

size = 224
model = dict(
    backbone={{_base_.dinov2_s}},
    neck=dict(type='GlobalAveragePooling'),
    head=dict(num_classes=2, in_channels=384, topk=(1,)),  # num_classes is set by --data
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=size, crop_ratio_range=(0.3, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short'),
    dict(type='CenterCrop', crop_size=size),
    dict(type='PackInputs'),
]
data_root = 'data/mine/'
train_dataloader = dict(
    batch_size=16,
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='val', test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = [val_evaluator, dict(type='SingleLabelMetric', items=('precision', 'recall'), average=None)]
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1'), visualization=dict(type='VisualizationHook'))
auto_scale_lr = dict(base_batch_size=16)
