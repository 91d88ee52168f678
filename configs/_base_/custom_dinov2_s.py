# DINOv2 ViT-S/14 as a backbone for dense prediction. For another file of its weights:
# --cfg-options model.backbone.base.init_cfg.checkpoint=/path/to/file
dinov2_s = dict(
    type='mona_mm.DINOv2',  # the attention is global in every layer
    arch='small',
    drop_path_rate=0.1,
    init_cfg=dict(
        type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth'
    ),
)
dinov2_s_with_mona = dict(type='mona_mm.PeftBackbone', base=dinov2_s, peft=dict(type='Mona', bottleneck=64))
pyramid = dict(type='mona_mm.SimpleFeaturePyramid', in_channels=384, out_channels=256)
