# Flowers102 classification with Swin-L. The lists of the paper were never released; here there are 2040 trainval images
# and 6149 test images. data_root holds jpg/, imagelabels.mat and setid.mat, as in the original archives.
_base_ = ['./classification_swin_l.py']

data_root = 'data/Flowers102/'

model = dict(head=dict(num_classes=102))
train_dataloader = dict(
    dataset=dict(type='Flowers102', data_root=data_root, split='trainval', pipeline=_base_.train_pipeline)
)
val_dataloader = dict(dataset=dict(type='Flowers102', data_root=data_root, split='test', pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
