_base_ = ['../_base_/custom_upernet.py', '../_base_/custom_dinov2_s.py']

model = dict(
    data_preprocessor=dict(size=(518, 518)),  # 37 patches
    backbone=dict(
        _delete_=True,
        type='mona_mm.PeftBackbone',
        base={{_base_.dinov2_s}},
        peft=dict(type='Mona', bottleneck=64),
    ),
    neck=dict(type='mona_mm.SimpleFeaturePyramid', in_channels=384, out_channels=256, scales=(4, 2, 1, 0.5)),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
)
