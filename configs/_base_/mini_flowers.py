# Flowers: classification of photographs of five kinds.
_base_ = ['./mini_classification.py']

classes = ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')
data_root = 'data/flowers/'
data = dict(data_root=data_root, metainfo=dict(classes=classes))

model = dict(head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
del data
