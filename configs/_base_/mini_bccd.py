# BCCD: detection of three kinds of blood cells, in the layout of VOC, at 224 x 168.
_base_ = ['./mini_boxes.py']

classes = ('RBC', 'WBC', 'Platelets')
data_root = 'data/BCCD/'
data = dict(
    type='XMLDataset',
    data_root=data_root,
    metainfo=dict(classes=classes),
    data_prefix=dict(_delete_=True, sub_data_root=''),
)

model = dict(bbox_head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=dict(ann_file='ImageSets/Main/train.txt', **data))
val_dataloader = dict(dataset=dict(ann_file='ImageSets/Main/val.txt', **data))
test_dataloader = val_dataloader
del data
