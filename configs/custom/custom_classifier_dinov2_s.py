_base_ = ['../_base_/custom_classifier.py']

model = dict(backbone=dict(_delete_=True, **_base_.dinov2_s_with_mona))
