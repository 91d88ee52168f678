# Mona in the last six layers alone: the six before them are computed as for a prediction.
_base_ = ['upernet_dinov2_b_ade20k.py']

model = dict(backbone=dict(peft=dict(blocks='last 6')))
