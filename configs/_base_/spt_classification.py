# The settings that VTAB-1k and FGVC share, except for the backbone (spt_*.py) and the data; they are those of SPT's
# published code. The learning rates of its baselines, and those of all methods on FGVC, were never released. All of
# them have SPT's learning rate on VTAB-1k here.
_base_ = ['./default_runtime.py', './classifier.py']

# Model -----------------------------------------------------------------------------------------------------------
model = dict(
    head=dict(
        # This is also for ViT, because mmpretrain's own head starts at zero, where no sensitivity can be measured.
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        topk=(1,),
    ),
)

# Schedule --------------------------------------------------------------------------------------------------------
# The model is evaluated every 10 epochs and after each of the last 10. The published score is that of the epoch that is
# best on the test set.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=10, dynamic_intervals=[(91, 1)])

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mona_mm.PeftOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,  # no decay on other vectors either, such as ConvNeXt's layer scales
        custom_keys={
            'cls_token': dict(decay_mult=0.0),
            'pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),  # Swin's position embedding
        },
    ),
)
# The learning rate rises from 1e-6 to 1e-3 in 10 epochs, and falls to 1e-5 in the last epoch of the training, however
# many there are.
param_scheduler = [
    dict(type='mona_mm.WarmupCosineLR', warmup=10, start_ratio=1e-3, end_ratio=0.01, by_epoch=True, begin=0)
]
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=10, save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook'),
)
