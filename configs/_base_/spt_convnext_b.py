# ConvNeXt-B, supervised on ImageNet-22k. SPT's code for it was never released, so the settings are those of its ViT.
_base_ = ['./spt_classification.py']

model = dict(
    backbone=dict(
        type='ConvNeXt',
        arch='base',
        drop_path_rate=0.1,
        out_indices=(3,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/convnext/'
            'convnext-base_3rdparty_in21k_20220124-13b83eec.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(in_channels=1024),
)
