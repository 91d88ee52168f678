# Mona as published here: five times the others' learning rate, less drop path, and decay of the backbone's norms.
_base_ = ['./fair_upernet_swin_l_ade20k.py']

model = dict(backbone=dict(base=dict(drop_path_rate=0.2)))
optim_wrapper = dict(
    optimizer=dict(lr=3e-4),
    paramwise_cfg=dict(custom_keys={'backbone': dict(decay_mult=1.0)}),  # longer than `norm`, so it outranks it
)
