# VOC2007 classification with Swin-L, multi-label as VOC defines it. It is the alternative to voc2007_swin_l.py that
# needs only public data; its mAP is not comparable with the top-1 accuracy of the paper.
_base_ = ['./classification_swin_l.py']

data_root = 'data/VOCdevkit/VOC2007/'

test_pipeline = [
    *_base_.test_pipeline[:-1],
    dict(type='PackInputs', meta_keys=('sample_idx', 'img_path', 'ori_shape', 'img_shape', 'gt_label_difficult')),
]

model = dict(
    data_preprocessor=dict(num_classes=20, to_onehot=True),
    head=dict(
        _delete_=True,
        type='MultiLabelLinearClsHead',
        num_classes=20,
        in_channels=1536,
        init_cfg=dict(type='Normal', layer='Linear', std=0.01),
        loss=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
)
train_dataloader = dict(dataset=dict(type='VOC', data_root=data_root, split='trainval', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    dataset=dict(type='VOC', data_root=data_root, split='test', test_mode=True, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='VOCAveragePrecision')
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='multi-label/mAP'))
