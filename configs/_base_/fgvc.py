# The data of FGVC: five fine-grained tasks with the lists of VPT. Each task has a folder (or a link to one) in
# data_root, with train.json, val.json and test.json (image to class) beside the images as their archives unpack. Choose
# the task with --cfg-options task=dogs, which sets the paths, the number of classes and the default work dir.
# To select settings without the test images: --cfg-options val_dataloader.dataset.ann_file=val.json
_base_ = ['./spt_data.py']

tasks = dict(
    cub=dict(num_classes=200, data_prefix='images'),
    nabirds=dict(num_classes=555, data_prefix='images'),
    flowers=dict(num_classes=102, data_prefix=''),
    dogs=dict(num_classes=120, data_prefix='Images'),
    cars=dict(num_classes=196, data_prefix=''),
)
task = 'cub'
data_root = 'data/fgvc/'

train_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='Resize', scale=(256, 256), interpolation='bicubic', backend='pillow'),  # antialiased, as in torchvision
    dict(type='RandomCrop', crop_size=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='Resize', scale=(256, 256), interpolation='bicubic', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataset = dict(
    type='mona_mm.FGVCJson',
    data_root=data_root + task + '/',
    data_prefix=tasks[task]['data_prefix'],
    ann_file='train.json',
    pipeline=train_pipeline,
)
train_dataloader = dict(dataset=train_dataset)
sensitivity_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(
    dataset=dict(
        type='mona_mm.FGVCJson',
        data_root=data_root + task + '/',
        data_prefix=tasks[task]['data_prefix'],
        ann_file='test.json',
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
del train_dataset
