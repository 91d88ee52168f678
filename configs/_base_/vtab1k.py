# The data of VTAB-1k: 19 tasks of 1000 training images, in the layout that NOAH, FacT and SPT use. Each task has a
# folder with images, train800.txt, val200.txt, train800val200.txt and test.txt (lines of "path label"). Choose the task
# with --cfg-options task=clevr_count, which sets the paths, the number of classes and the default work dir.
# To select settings without the test images:
#   --cfg-options train_dataloader.dataset.ann_file=train800.txt val_dataloader.dataset.ann_file=val200.txt
_base_ = ['./spt_data.py']

tasks = dict(
    # natural
    cifar=dict(num_classes=100),
    caltech101=dict(num_classes=102),
    dtd=dict(num_classes=47),
    oxford_flowers102=dict(num_classes=102),
    oxford_iiit_pet=dict(num_classes=37),
    svhn=dict(num_classes=10),
    sun397=dict(num_classes=397),
    # specialized
    patch_camelyon=dict(num_classes=2),
    eurosat=dict(num_classes=10),
    resisc45=dict(num_classes=45),
    diabetic_retinopathy=dict(num_classes=5),
    # structured
    clevr_count=dict(num_classes=8),
    clevr_dist=dict(num_classes=6),
    dmlab=dict(num_classes=6),
    kitti=dict(num_classes=4),
    dsprites_loc=dict(num_classes=16),
    dsprites_ori=dict(num_classes=16),
    smallnorb_azi=dict(num_classes=18),
    smallnorb_ele=dict(num_classes=9),
)
task = 'cifar'
data_root = 'data/vtab-1k/'

pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='Resize', scale=(224, 224), interpolation='bicubic', backend='pillow'),  # antialiased, as in torchvision
    dict(type='PackInputs'),
]
dataset = dict(type='CustomDataset', data_root=data_root + task + '/', pipeline=pipeline)
train_dataloader = dict(dataset=dict(ann_file='train800val200.txt', **dataset))
# The images for SPT's sensitivity are those of train800.txt, a part of the training images.
sensitivity_dataloader = dict(dataset=dict(ann_file='train800.txt', **dataset))
val_dataloader = dict(dataset=dict(ann_file='test.txt', test_mode=True, **dataset))
test_dataloader = val_dataloader
del dataset
