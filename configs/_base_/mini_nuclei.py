# Nuclei: instance segmentation in microscope images, with up to 120 objects in an image.
_base_ = ['./mini_masks.py']

classes = ('nucleus',)
data_root = 'data/nuclei/'
data = dict(data_root=data_root, metainfo=dict(classes=classes))

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator
del data
