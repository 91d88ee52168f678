# A classifier with a linear head, and the mean and standard deviation of ImageNet. The config of a task sets the
# backbone, the neck and the classes.
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=None,  # set by the config of a task
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
