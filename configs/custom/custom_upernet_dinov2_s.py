_base_ = ['../_base_/custom_upernet.py', '../_base_/custom_dinov2_s.py']

model = dict(
    data_preprocessor=dict(size=(518, 518)),  # 37 patches
    backbone=dict(_delete_=True, **_base_.dinov2_s_with_mona),
    neck=dict(scales=(4, 2, 1, 0.5), **_base_.pyramid),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
)
