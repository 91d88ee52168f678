_base_ = ['../_base_/mini_boxes.py', '../_base_/quick.py']

model = dict(backbone=dict(_delete_=True, **_base_.quick_backbone), bbox_head=dict(num_classes=80))
val_evaluator = dict(classwise=True)
default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'))
auto_scale_lr = dict(base_batch_size=2)
