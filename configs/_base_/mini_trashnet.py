# TrashNet: classification of photographs of six kinds of waste.
_base_ = ['./mini_classification.py']

classes = ('cardboard', 'glass', 'metal', 'paper', 'plastic', 'trash')
data_root = 'data/trashnet/'
data = dict(data_root=data_root, metainfo=dict(classes=classes))

model = dict(head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
del data
