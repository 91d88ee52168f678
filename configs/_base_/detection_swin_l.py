# The settings that the detection tasks share: mixed precision, the learning rate, the weight decay, and one image per
# GPU, batched with images of a similar aspect ratio.
_base_ = ['./default_runtime.py', './dense_swin_l.py', './adamw_swin.py']
default_scope = 'mmdet'

model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=dict(convert_weights=True),
    neck=dict(type='FPN', out_channels=256, num_outs=5),
)

train_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
)
val_dataloader = dict(drop_last=False)
test_dataloader = val_dataloader

optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', optimizer=dict(lr=1e-4, weight_decay=0.05))
default_hooks = dict(visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
