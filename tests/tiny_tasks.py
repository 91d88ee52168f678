"""A classifier and a segmentor with a narrow ViT and a Mona, their configs and a few drawn images: seconds to train."""
# ruff: noqa: E501  the configs are one text a line

from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS

from mona_mm.config.load import load_config
from mona_mm.type_names import enter_scope

HEAD = """
default_scope = '{library}'
model = dict(
    type='{model}',
    data_preprocessor={preprocessor},
    backbone=dict(
        type='mona_mm.PeftBackbone',
        base=dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
            img_size=32, patch_size=8, out_type='featmap',
        ),
        peft=dict(type='Mona', bottleneck=8),
    ),
    {rest}
)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True), dataset={data},
)
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset={test_data},
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = {metric}
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
val_cfg = dict(type='ValLoop')
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(norm_decay_mult=0.0),
)
default_hooks = dict(
    timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=1),
    param_scheduler=dict(type='ParamSchedulerHook'), checkpoint=dict(type='CheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
"""
"""A config as of a stock library, without a `_base_` of ours."""

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220))


def classifier(folder: Path) -> Path:
    """Write six images of three colours and the config of a classifier; return the config."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(('red', 'green', 'blue')):
        for number in range(2):
            image = np.clip(np.array(COLOURS[index])[::-1] + rng.normal(0, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
            write(folder / f'images/{name}/{number}.png', image)
    data = "dict(type='CustomDataset', data_root='{root}', data_prefix='images', {mode}pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), {flip}dict(type='PackInputs')])"
    return config(
        folder / 'tiny_classifier.py',
        library='mmpretrain',
        model='ImageClassifier',
        preprocessor='dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True, num_classes=3)',
        rest="neck=dict(type='GlobalAveragePooling'), head=dict(type='LinearClsHead', num_classes=3, in_channels=32, loss=dict(type='CrossEntropyLoss')),",
        data=data.format(root=folder, mode='', flip="dict(type='RandomFlip', prob=0.5, direction='horizontal'), "),
        test_data=data.format(root=folder, mode='test_mode=True, ', flip=''),
        metric="dict(type='Accuracy', topk=(1,))",
    )


def segmentor(folder: Path) -> Path:
    """Write four images of coloured rectangles with their label maps and the config of a segmentor; return the config."""
    rng = np.random.default_rng(0)
    for number in range(4):
        labels = np.zeros((40, 48), np.uint8)
        for index in (1, 2):
            y, x = rng.integers(0, 24, 2)
            labels[y : y + 16, x : x + 20] = index
        colours = np.array(COLOURS)[labels][..., ::-1] + rng.normal(0, 15, (40, 48, 3))
        write(folder / f'images/{number}.png', np.clip(colours, 0, 255).astype(np.uint8))
        write(folder / f'labels/{number}.png', labels)
    data = "dict(type='BaseSegDataset', data_root='{root}', data_prefix=dict(img_path='images', seg_map_path='labels'), img_suffix='.png', seg_map_suffix='.png', metainfo=dict(classes=('ground', 'box', 'lid')), {mode}pipeline=[dict(type='LoadImageFromFile'), {steps}, dict(type='PackSegInputs')])"
    load, resize = "dict(type='LoadAnnotations')", "dict(type='Resize', scale=(32, 32), keep_ratio=False)"
    return config(
        folder / 'tiny_segmentor.py',
        library='mmseg',
        model='EncoderDecoder',
        preprocessor="dict(type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=(32, 32))",
        rest="decode_head=dict(type='FCNHead', in_channels=32, in_index=0, channels=16, num_convs=1, concat_input=False, num_classes=3, norm_cfg=dict(type='BN'), align_corners=False), train_cfg=dict(), test_cfg=dict(mode='whole'),",
        data=data.format(root=folder, mode='', steps=f'{load}, {resize}'),
        test_data=data.format(root=folder, mode='test_mode=True, ', steps=f'{resize}, {load}'),
        metric="dict(type='IoUMetric', iou_metrics=['mIoU'])",
    )


def config(file: Path, **parts: str) -> Path:
    file.write_text(HEAD.format(**parts))
    return file


def write(file: Path, image: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), image)


def checkpoint_of(config: Path, noise: float = 0.2) -> Path:
    """A whole checkpoint of a config's model, whose random weights make predictions that differ."""
    cfg = load_config(str(config))
    enter_scope(cfg)
    torch.manual_seed(3)
    model = MODELS.build(cfg.model)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    file = config.with_suffix('.pth')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('x', 'y', 'z')))), file)
    return file
