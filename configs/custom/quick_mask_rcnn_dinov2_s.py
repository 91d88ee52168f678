_base_ = ['../_base_/mini_nuclei.py', '../_base_/quick.py']  # whose data --data replaces

model = dict(
    backbone=dict(_delete_=True, **_base_.quick_backbone),
    roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)),
)
val_evaluator = dict(classwise=True)
default_hooks = dict(checkpoint=dict(save_best='coco/segm_mAP'))
auto_scale_lr = dict(base_batch_size=2)
