_base_ = ['../_base_/custom_mask_rcnn.py', '../_base_/custom_dinov2_s.py']

strides = [3.5, 7, 14, 28]
model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(_delete_=True, **_base_.dinov2_s_with_mona),
    neck=dict(_delete_=True, scales=(4, 2, 1, 0.5), num_outs=5, **_base_.pyramid),
    rpn_head=dict(anchor_generator=dict(strides=[*strides, 56])),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=strides), mask_roi_extractor=dict(featmap_strides=strides)),
)
