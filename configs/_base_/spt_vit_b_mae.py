# ViT-B/16, pretrained by MAE, from the file of the authors.
_base_ = ['./spt_vit_b_in21k.py']

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth'),
    )
)
