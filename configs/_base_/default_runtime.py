# The settings that every config shares, for any library and task.
custom_imports = dict(imports=['mona_mm'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
custom_hooks = [
    dict(type='mona_mm.ParamFreezeHook'),  # prints what trains, and checks that the rest does not change
    dict(type='mona_mm.LoadCheckHook'),  # refuses checkpoints that do not fit
    dict(type='mona_mm.DeltaCheckpointHook'),  # writes what training changed to a small file beside the checkpoint
    dict(type='mona_mm.IterationSeedHook'),  # makes a run with --resume repeat an uninterrupted one
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False)  # enabled by --auto-scale-lr
randomness = dict(seed=0)  # without a seed here, a resumed run draws its data in another order
load_from = None
resume = False
