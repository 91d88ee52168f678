# What the quick configs of configs/custom/ share: DINOv2-S with Mona in its last blocks, and minutes on a CPU.
_base_ = ['./small_data.py']

quick_backbone = dict(
    type='mona_mm.PeftBackbone',
    base=dict(
        type='mona_mm.DINOv2',
        arch='small',
        # another file of the weights: --cfg-options model.backbone.base.init_cfg.checkpoint=/path/to/file
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth',
        ),
    ),
    peft=dict(type='Mona', bottleneck=64, blocks='last 4'),  # of 12: half the time of all, and sooner learnt
)
recipe = dict(passes=2, iterations=(100, 200), evaluations=1)
