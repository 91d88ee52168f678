# The comparison's classification tasks: the mean of DINOv2-S's last map at 112 x 112 and a linear layer, 100 iterations
# of 8 images. A task sets the classes and the data. There are no validation images; `tools/reproduce.py run` sets some
# of the training images apart.
_base_ = ['./classifier.py', './mini_schedule.py', './dinov2_s.py']

model = dict(
    backbone={{_base_.dinov2_s}},
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=384, topk=(1,)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=112, crop_ratio_range=(0.5, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=128, edge='short'),
    dict(type='CenterCrop', crop_size=112),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=8, dataset=dict(type='CustomDataset', ann_file='train.txt', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16, dataset=dict(type='CustomDataset', ann_file='test.txt', test_mode=True, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = [val_evaluator, dict(type='SingleLabelMetric', items=('recall',), average=None)]  # of each class
