# From GTA5 to Cityscapes, as in the Rein paper: Mask2Former, DINOv2 ViT-L/14, trained on images of a game and evaluated
# on those of cities. From the paper are the 40k iterations of 4 images, the learning rate of the head and of what a
# method adds, and crops of 512 pixels (here 37 patches, 518). The feature pyramid, the layers that it reads and the
# size of the test images are of this package. Both data sets have the 19 train ids of Cityscapes as labels:
# data/gta/images/00001.png with data/gta/labels/00001_labelTrainIds.png, and data/cityscapes as published, with the
# *_gtFine_labelTrainIds.png that its scripts write.
_base_ = ['./default_runtime.py']
default_scope = 'mmseg'

# Model -----------------------------------------------------------------------------------------------------------
width = 256
num_classes = 19
crop_size = (518, 518)


def attention(**options):
    return dict(embed_dims=width, num_heads=8, batch_first=True, **options)


def ffn(channels):
    return dict(
        embed_dims=width,
        feedforward_channels=channels,
        num_fcs=2,
        ffn_drop=0.0,
        act_cfg=dict(type='ReLU', inplace=True),
    )


def loss_of_masks(kind, **options):
    return dict(type=f'mmdet.{kind}', use_sigmoid=True, reduction='mean', loss_weight=5.0, **options)


positions = dict(num_feats=width // 2, normalize=True)
decoder_attention = attention(attn_drop=0.0, proj_drop=0.0, dropout_layer=None)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
        test_cfg=dict(size_divisor=14),
    ),
    backbone=dict(
        type='mona_mm.DINOv2',
        arch='large',
        out_indices=(7, 11, 15, 23),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
        ),
    ),
    neck=dict(type='mona_mm.SimpleFeaturePyramid', in_channels=1024, out_channels=width, scales=(4, 2, 1, 0.5)),
    decode_head=dict(
        type='Mask2FormerHead',
        in_channels=[width] * 4,
        feat_channels=width,
        out_channels=width,
        num_classes=num_classes,
        num_queries=100,
        num_transformer_feat_level=3,
        align_corners=False,
        pixel_decoder=dict(
            type='mmdet.MSDeformAttnPixelDecoder',
            num_outs=3,
            norm_cfg=dict(type='GN', num_groups=32),
            act_cfg=dict(type='ReLU'),
            encoder=dict(
                num_layers=6,
                layer_cfg=dict(
                    self_attn_cfg=attention(num_levels=3, num_points=4, dropout=0.0), ffn_cfg=ffn(4 * width)
                ),
            ),
            positional_encoding=positions,
        ),
        positional_encoding=positions,
        transformer_decoder=dict(
            return_intermediate=True,
            num_layers=9,
            layer_cfg=dict(self_attn_cfg=decoder_attention, cross_attn_cfg=decoder_attention, ffn_cfg=ffn(8 * width)),
        ),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=2.0,
            reduction='mean',
            class_weight=[1.0] * num_classes + [0.1],
        ),
        loss_mask=loss_of_masks('CrossEntropyLoss'),
        loss_dice=loss_of_masks('DiceLoss', activate=True, naive_dice=True, eps=1.0),
        train_cfg=dict(
            num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type='mmdet.HungarianAssigner',
                match_costs=[
                    dict(type='mmdet.ClassificationCost', weight=2.0),
                    dict(type='mmdet.CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
                    dict(type='mmdet.DiceCost', weight=5.0, pred_act=True, eps=1.0),
                ],
            ),
            sampler=dict(type='mmdet.MaskPseudoSampler'),
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
del attention, ffn, loss_of_masks

# Data ------------------------------------------------------------------------------------------------------------
dataset_type = 'CityscapesDataset'
data_root = 'data/'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomChoiceResize',
        scales=[51 * step for step in range(5, 21)],
        resize_type='ResizeShortestEdge',
        max_size=2048,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize, as classes are compared in the original image
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root + 'gta/',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        seg_map_suffix='_labelTrainIds.png',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root + 'cityscapes/',
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# Schedule --------------------------------------------------------------------------------------------------------
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
_undecayed = dict(decay_mult=0.0)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mona_mm.PeftOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        custom_keys=dict(query_embed=_undecayed, query_feat=_undecayed, level_embed=_undecayed),
        norm_decay_mult=0.0,
    ),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000)]
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=4000, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
