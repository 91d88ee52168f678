_base_ = ['../_base_/mini_classification.py', '../_base_/quick.py']

model = dict(backbone=dict(_delete_=True, **_base_.quick_backbone), head=dict(num_classes=2))
default_hooks = dict(checkpoint=dict(save_best='accuracy/top1'))
auto_scale_lr = dict(base_batch_size=8)
