# CamVid: semantic segmentation of street scenes with 11 classes.
_base_ = ['./mini_maps.py']

classes = (
    'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol', 'Fence', 'Car', 'Pedestrian', 'Bicyclist',
)  # fmt: skip
dataset_type = 'BaseSegDataset'
data_root = 'data/camvid/'
metainfo = dict(classes=classes)

model = dict(decode_head=dict(num_classes=len(classes)))


def _split(name):
    prefix = dict(img_path=f'images/{name}', seg_map_path=f'annotations/{name}')
    return dict(data_root=data_root, data_prefix=prefix, metainfo=metainfo)


train_dataloader = dict(dataset=_split('train'))
val_dataloader = dict(dataset=_split('val'))
test_dataloader = dict(dataset=_split('test'))
del _split
