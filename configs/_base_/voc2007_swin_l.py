# VOC2007 classification with Swin-L, with one label per image and top-1 accuracy, as in the Mona paper. VOC itself is
# multi-label (as in voc2007_multilabel_swin_l.py), and the labels and the split of the paper were never released. This
# task therefore needs two lists of lines such as "000005.jpg 8". One way to make them is to take the class of the
# largest object as the label; the scores are then comparable among methods here, but not with the paper. To do so, run
# in data/VOCdevkit/VOC2007:
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
