# The settings that the classification tasks share: Swin-L with a linear head, 100 epochs, as in the Mona paper (its
# full fine-tuning). The learning rate here is that of every method, except for Mona on Flowers102 and OxfordPets. There
# Mona was published with twice this rate, which is in configs/mona/swin_l_{flowers102,oxfordpets}.py;
# configs/mona/fair_* are Mona with the rate here.
_base_ = ['./default_runtime.py', './classifier.py', './adamw_swin.py']

# Model -----------------------------------------------------------------------------------------------------------
model = dict(
    backbone=dict(
        type='SwinTransformer',
        arch='large',
        img_size=224,
        window_size=7,
        drop_path_rate=0.3,
        out_indices=(3,),
        pad_small_map=True,  # as in the detection Swin, which the published code uses for classification, too
        with_cp=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
            'swin_large_patch4_window7_224_22k.pth',
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        in_channels=1536,
        init_cfg=dict(type='Normal', layer='Linear', std=0.01),
        topk=(1, 5),
    ),
)

# Data ------------------------------------------------------------------------------------------------------------
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.08, 1.0), interpolation='bilinear'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', interpolation='bilinear'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

# Schedule --------------------------------------------------------------------------------------------------------
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=1)

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(lr=5e-4 * 16 / 512, eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(
        bias_decay_mult=0.0,
        dwconv_decay_mult=1.0,  # in the published runs, the biases of Mona's depthwise convolutions decay
    ),
)
# Both schedules start at iteration 0: the warm-up multiplies a schedule that is already running.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=0,
        end=100,
        T_max=100,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook'),
)
