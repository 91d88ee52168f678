# DINOv2 ViT-S/14 as a backbone for dense prediction, which returns one map of 1/14 of the image's size. To use another
# file of the weights (with Meta's names): --cfg-options model.backbone.init_cfg.checkpoint=/path/to/file
dinov2_s = dict(
    type='mmpretrain.VisionTransformer',
    arch='dinov2-small',
    img_size=518,  # the size of the published table of positions, which is interpolated for every other size
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_type='featmap',
    init_cfg=dict(type='Pretrained', checkpoint='data/dinov2_vits14.safetensors'),
)
