# The optimizer of every task of the Mona paper: AdamW, without weight decay on norms and on Swin's position parameters.
# The config of a task sets the learning rate, the weight decay and the precision (the type of the wrapper).
optim_wrapper = dict(
    constructor='mona_mm.PeftOptimWrapperConstructor',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999)),
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        }
    ),
)
