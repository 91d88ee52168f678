# Oxford-IIIT Pets classification with Swin-L: 3680 trainval images and 3669 test images.
# data_root holds images/ and annotations/, as in the original archives.
_base_ = ['./classification_swin_l.py']

data_root = 'data/Oxford-IIIT_Pets/'

model = dict(head=dict(num_classes=37))
train_dataloader = dict(
    dataset=dict(type='OxfordIIITPet', data_root=data_root, split='trainval', pipeline=_base_.train_pipeline)
)
val_dataloader = dict(
    dataset=dict(type='OxfordIIITPet', data_root=data_root, split='test', pipeline=_base_.test_pipeline)
)
test_dataloader = val_dataloader
