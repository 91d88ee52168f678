# Mona as published on this task: twice the others' learning rate.
_base_ = ['./fair_swin_l_flowers102.py']

optim_wrapper = dict(optimizer=dict(lr=2 * _base_.optim_wrapper.optimizer.lr))
