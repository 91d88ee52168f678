# VOC2007 classification, Swin-L, one label an image and top-1, as in the Mona paper. VOC itself is multi-label (that is
# voc2007_multilabel_swin_l.py), and how the paper made its labels and split was never released. So this task needs two
# lists of "000005.jpg 8" lines. They can be made, for one, with the largest object's class as the label; scores then
# compare among methods here, not with the paper. Run in data/VOCdevkit/VOC2007:
#
#   import xml.etree.ElementTree as ET
#   names = ('aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person '
#            'pottedplant sheep sofa train tvmonitor').split()
#   def area(obj):
#       xmin, ymin, xmax, ymax = (float(obj.find(f'bndbox/{side}').text) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
#       return (xmax - xmin) * (ymax - ymin)
#   for split in ('trainval', 'test'):
#       with open(f'ImageSets/Main/{split}.txt') as ids, open(f'ImageSets/Main/{split}_one_label.txt', 'w') as out:
#           for image in ids.read().split():
#               largest = max(ET.parse(f'Annotations/{image}.xml').findall('object'), key=area)
#               out.write(f'{image}.jpg {names.index(largest.find("name").text)}\n')
_base_ = ['./classification_swin_l.py']

data_root = 'data/VOCdevkit/VOC2007/'
metainfo = dict(
    classes=(
        *('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog'),
        *('horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor'),
    )
)

model = dict(head=dict(num_classes=20))
train_dataloader = dict(
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='ImageSets/Main/trainval_one_label.txt',
        data_prefix='JPEGImages',
        metainfo=metainfo,
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='ImageSets/Main/test_one_label.txt',
        data_prefix='JPEGImages',
        metainfo=metainfo,
        test_mode=True,
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
