"""Small configs in mmengine's pure-Python style, one a library: types are imported classes, bases are imported modules.

They are written beside the data that they name, since mmengine reads such configs from files alone.
"""

from pathlib import Path

RUNTIME = """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import SGD

from mona_mm.hooks import DeltaCheckpointHook, IterationSeedHook, LoadCheckHook, ParamFreezeHook, SafeCheckpointHook
from mona_mm.optim.constructor import PeftOptimWrapperConstructor
from mona_mm.optim.schedule import WarmupCosineLR

default_scope = None
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=SafeCheckpointHook, interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [
    dict(type=ParamFreezeHook), dict(type=LoadCheckHook), dict(type=DeltaCheckpointHook), dict(type=IterationSeedHook)
]
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=SGD, lr=1e-3, weight_decay=0.05),
    constructor=PeftOptimWrapperConstructor,
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [dict(type=WarmupCosineLR, warmup=1, start_ratio=0.1, end_ratio=0.0, end=2, by_epoch=True)]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=2)
"""

MMDET = """
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import FPN, DetDataPreprocessor, RetinaHead, RetinaNet, SwinTransformer
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import (
    AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
)
from mmdet.visualization import DetLocalVisualizer
from mmengine.visualization import LocalVisBackend
from mmcv.transforms import LoadImageFromFile
from torch.nn import SyncBatchNorm

from mona_mm import PeftBackbone
from mona_mm.@ROOM@ import @METHOD@

data_root = '@ROOT@/'
metainfo = dict(classes=('disc', 'square', 'triangle', 'star'))
default_hooks.update(visualization=dict(type=DetVisualizationHook))
visualizer = dict(type=DetLocalVisualizer, name='visualizer', vis_backends=[dict(type=LocalVisBackend)])
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(
        type=PeftBackbone,
        base=dict(
            type=SwinTransformer, embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), drop_path_rate=0.1
        ),
        peft=dict(type=@METHOD@@OPTIONS@),
    ),
    neck=dict(
        type=FPN, in_channels=[24, 48, 96, 192], start_level=1, out_channels=16, num_outs=4,
        norm_cfg=dict(type=SyncBatchNorm),
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=4,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16, 32, 64]
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(nms_pre=100, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
)
pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(96, 96), keep_ratio=True),
    dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CocoDataset,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        indices=2,
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=CocoMetric, ann_file=data_root + 'annotations/instances_val2017.json', metric='bbox')
test_evaluator = val_evaluator
"""

MMSEG = """
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor, SwinTransformer
from mmseg.models.losses import CrossEntropyLoss
from mmcv.transforms import LoadImageFromFile
from torch.nn import SyncBatchNorm

from mona_mm import PeftBackbone
from mona_mm.@ROOM@ import @METHOD@

data_root = '@ROOT@/'
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(64, 64)),
    backbone=dict(
        type=PeftBackbone,
        base=dict(type=SwinTransformer, embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
        peft=dict(type=@METHOD@@OPTIONS@),
    ),
    decode_head=dict(
        type=FCNHead, in_channels=192, in_index=3, channels=8, num_convs=1, num_classes=3,
        norm_cfg=dict(type=SyncBatchNorm), loss_decode=dict(type=CrossEntropyLoss),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
pipeline = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackSegInputs)]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=BaseSegDataset,
        data_root=data_root,
        metainfo=dict(classes=('a', 'b', 'c')),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=pipeline,
    ),
)
val_dataloader = dict(train_dataloader)
test_dataloader = val_dataloader
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator
"""

MMPRETRAIN = """
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import ClsDataPreprocessor, ImageClassifier, LinearClsHead, VisionTransformer
from mmpretrain.models.losses import CrossEntropyLoss

from mona_mm import PeftBackbone
from mona_mm.@ROOM@ import @METHOD@

data_root = '@ROOT@/'
model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(type=ClsDataPreprocessor),
    backbone=dict(
        type=PeftBackbone,
        base=dict(
            type=VisionTransformer,
            arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
            img_size=32,
        ),
        peft=dict(type=@METHOD@@OPTIONS@),
    ),
    head=dict(type=LinearClsHead, num_classes=2, in_channels=32, loss=dict(type=CrossEntropyLoss)),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CustomDataset,
        data_root=data_root,
        ann_file='list.txt',
        data_prefix='images',
        metainfo=dict(classes=('a', 'b')),
        pipeline=[dict(type=LoadImageFromFile), dict(type=PackInputs)],
    ),
)
val_dataloader = dict(train_dataloader)
test_dataloader = val_dataloader
val_evaluator = dict(type=Accuracy, topk=(1,))
test_evaluator = val_evaluator
"""

LIBRARIES = dict(mmdet=MMDET, mmseg=MMSEG, mmpretrain=MMPRETRAIN)


def write_pure_config(folder: Path, library: str, root: Path, method: str = 'Mona', options: str = '') -> str:
    """Write a library's config and its base into ``folder``; returns its path.

    Args:
        folder: which exists.
        library: a key of :data:`LIBRARIES`.
        root: of the data: the demo's for mmdet, for the others ``images``, ``labels`` and ``list.txt``.
        method: a class of :mod:`mona_mm.methods`.
        options: of the method, as Python has them behind its type: ``', rank=4'``.
    """
    (folder / 'runtime.py').write_text(RUNTIME)
    room = 'spt' if method == 'SPT' else 'methods'
    text = LIBRARIES[library].replace('@ROOT@', str(root)).replace('@METHOD@', method).replace('@OPTIONS@', options)
    text = text.replace('@ROOM@', room)
    file = folder / f'{library}_{method}.py'.lower()
    file.write_text(text)
    return str(file)
