# ViT-B/16, pretrained by MoCo v3, from the file of the authors with a linear head, as in SPT. The head is dropped.
_base_ = ['./spt_vit_b_in21k.py']

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar',
        ),
    )
)
