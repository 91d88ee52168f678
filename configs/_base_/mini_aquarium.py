# Aquarium: detection of seven kinds of animals, at 224 x 168.
_base_ = ['./mini_boxes.py']

classes = ('fish', 'jellyfish', 'penguin', 'puffin', 'shark', 'starfish', 'stingray')
data_root = 'data/aquarium/'
data = dict(data_root=data_root, metainfo=dict(classes=classes))

model = dict(bbox_head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator
del data
