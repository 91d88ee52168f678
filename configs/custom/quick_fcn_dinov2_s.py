_base_ = ['../_base_/mini_camvid.py', '../_base_/quick.py']  # whose data --data replaces

model = dict(backbone=dict(_delete_=True, **_base_.quick_backbone), decode_head=dict(num_classes=2))
# The best of three rates in docs/which_method.md: of every method, and where the whole backbone trains.
optim_wrapper = dict(optimizer=dict(lr=2.5e-3))
recipe = dict(full_learning_rate=1e-4)
default_hooks = dict(checkpoint=dict(save_best='mIoU'))
auto_scale_lr = dict(base_batch_size=4)
val_dataloader = dict(batch_size=1)  # images of any size
test_dataloader = dict(batch_size=1)
