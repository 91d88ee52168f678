_base_ = ['../_base_/custom_retinanet.py', '../_base_/custom_dinov2_s.py']

model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(_delete_=True, **_base_.dinov2_s_with_mona),
    neck=dict(_delete_=True, scales=(2, 1, 0.5), num_outs=5, **_base_.pyramid),
    bbox_head=dict(anchor_generator=dict(strides=[7, 14, 28, 56, 112])),
)
