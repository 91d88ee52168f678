"""Small configs of the hosts that are only a declaration: the stock forward, with sites by hooks."""

_TRANSFORMER = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
_MMSEG = dict(img_size=64, patch_size=16, embed_dims=24, num_layers=2, num_heads=2, mlp_ratio=2, out_indices=(0, 1))
_FOUR = dict(embed_dims=[16] * 4, num_heads=[1, 1, 2, 2], mlp_ratios=[2] * 4, sr_ratios=[8, 4, 2, 1])
_TWO_STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
_ALL = dict(out_indices=(0, 1, 2, 3))


def _hrnet(library: str) -> dict:
    stages = [
        dict(num_modules=1, num_branches=n, block='BASIC', num_blocks=(1,) * n, num_channels=(8, 16, 32, 64)[:n])
        for n in (2, 3, 4)
    ]
    first = dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(8,))
    return dict(type=f'{library}.HRNet', extra={f'stage{i}': stage for i, stage in enumerate([first, *stages], 1)})


def _convolutional() -> dict[str, dict]:
    found = {}
    for library, names in dict(
        mmdet=('ResNet', 'ResNetV1d', 'ResNeXt'),
        mmseg=('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt'),
        mmpretrain=('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt'),
    ).items():
        for name in names:
            more = dict(groups=2, width_per_group=4) if name == 'ResNeXt' and library == 'mmpretrain' else {}
            more = dict(groups=2, base_width=4) if name == 'ResNeXt' and library != 'mmpretrain' else more
            found[f'{library}-{name.lower()}'] = dict(
                type=f'{library}.{name}', depth=50, base_channels=8, **_TWO_STAGES, **more
            )
        found[f'{library}-hrnet'] = _hrnet(library)
    return found


_CSP = [[16, 16, 2, True, False], [16, 32, 2, False, True]]
_SMALL_STAGES = dict(layers=[1] * 4, embed_dims=[8, 16, 24, 32])
_OTHER_CONVOLUTIONAL = {
    'mmdet-hourglass': dict(
        type='mmdet.HourglassNet',
        downsample_times=2,
        num_stacks=2,
        stage_channels=(16, 16, 24),
        stage_blocks=(1, 1, 1),
        feat_channel=16,
    ),
    'mmdet-res2net': dict(type='mmdet.Res2Net', depth=50, base_channels=8, scales=2, base_width=4, **_ALL),
    'mmdet-resnest': dict(type='mmdet.ResNeSt', depth=50, base_channels=8, **_ALL),
    'mmdet-resnet-caffe': dict(type='mmdet.ResNet', depth=50, base_channels=8, style='caffe', **_TWO_STAGES),
    'mmdet-trident': dict(
        type='mmdet.TridentResNet',
        depth=50,
        base_channels=8,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        zero_init_residual=False,
        num_branch=3,
        test_branch_idx=1,
        trident_dilations=(1, 2, 3),
    ),
    'mmdet-darknet': dict(type='mmdet.Darknet', depth=53),
    'mmdet-cspdarknet': dict(type='mmdet.CSPDarknet', arch_ovewrite=_CSP, out_indices=(0, 1, 2)),
    'mmdet-cspdarknet-depthwise': dict(
        type='mmdet.CSPDarknet', arch_ovewrite=_CSP, out_indices=(0, 1, 2), use_depthwise=True
    ),
    'mmdet-cspnext': dict(type='mmdet.CSPNeXt', arch_ovewrite=_CSP, out_indices=(0, 1, 2), channel_attention=True),
    'mmdet-cspnext-depthwise': dict(
        type='mmdet.CSPNeXt', arch_ovewrite=_CSP, out_indices=(0, 1, 2), use_depthwise=True
    ),
    'mmdet-efficientnet': dict(type='mmdet.EfficientNet', arch='b0', out_indices=(1, 2, 3)),
    'mmdet-efficientnet-edge': dict(type='mmdet.EfficientNet', arch='es', out_indices=(1, 2)),
    'mmdet-mobilenetv2': dict(type='mmdet.MobileNetV2', widen_factor=0.25, out_indices=(1, 7)),
    'mmseg-resnest': dict(type='mmseg.ResNeSt', depth=50, base_channels=8, **_ALL),
    'mmseg-mobilenetv2': dict(type='mmseg.MobileNetV2', widen_factor=0.25, out_indices=(1, 6)),
    'mmseg-mobilenetv3': dict(type='mmseg.MobileNetV3', out_indices=(1, 4, 12)),
    'mmseg-fastscnn': dict(
        type='mmseg.FastSCNN',
        downsample_dw_channels=(8, 12),
        global_in_channels=16,
        global_block_channels=(16, 24, 32),
        global_out_channels=32,
        higher_in_channels=16,
        lower_in_channels=32,
        fusion_out_channels=32,
    ),
    'mmseg-ddrnet': dict(type='mmseg.DDRNet', channels=8, ppm_channels=16),
    'mmseg-pidnet': dict(type='mmseg.PIDNet', channels=8, ppm_channels=16),
    'mmseg-bisenetv2': dict(
        type='mmseg.BiSeNetV2', detail_channels=(8, 8, 16), semantic_channels=(4, 8, 8, 16), bga_channels=16
    ),
    'mmseg-erfnet': dict(
        type='mmseg.ERFNet',
        enc_downsample_channels=(8, 16, 24),
        enc_stage_non_bottlenecks=(1, 4),
        enc_non_bottleneck_channels=(16, 24),
        dec_upsample_channels=(16, 8),
        dec_stages_non_bottleneck=(1, 1),
        dec_non_bottleneck_channels=(16, 8),
    ),
    'mmseg-cgnet': dict(type='mmseg.CGNet', num_channels=(8, 16, 32), num_blocks=(2, 2)),
    'mmpretrain-res2net': dict(
        type='mmpretrain.Res2Net', depth=50, base_channels=8, stem_channels=8, expansion=4, scales=2, **_ALL
    ),
    'mmpretrain-resnest': dict(type='mmpretrain.ResNeSt', depth=50, base_channels=8, **_ALL),
    'mmpretrain-seresnet': dict(type='mmpretrain.SEResNet', depth=50, base_channels=8, **_ALL),
    'mmpretrain-seresnext': dict(
        type='mmpretrain.SEResNeXt', depth=50, base_channels=64, groups=2, width_per_group=4, **_ALL
    ),
    'mmpretrain-cspdarknet': dict(type='mmpretrain.CSPDarkNet', depth=53, out_indices=(0, 4)),
    'mmpretrain-cspresnet': dict(type='mmpretrain.CSPResNet', depth=50, out_indices=(0, 3)),
    'mmpretrain-cspresnext': dict(type='mmpretrain.CSPResNeXt', depth=50, out_indices=(0, 3)),
    'mmpretrain-efficientnet': dict(type='mmpretrain.EfficientNet', arch='b0', out_indices=(1, 6)),
    'mmpretrain-efficientnetv2': dict(type='mmpretrain.EfficientNetV2', arch='b0', out_indices=(1, -1)),
    'mmpretrain-mobilenetv2': dict(type='mmpretrain.MobileNetV2', widen_factor=0.25, out_indices=(1, 7)),
    'mmpretrain-mobilenetv3': dict(type='mmpretrain.MobileNetV3', arch='small_050', out_indices=(1, 4, 12)),
    'mmpretrain-shufflenetv1': dict(type='mmpretrain.ShuffleNetV1', groups=2, widen_factor=0.5, out_indices=(0, 1, 2)),
    'mmpretrain-convmixer': dict(
        type='mmpretrain.ConvMixer', arch=dict(embed_dims=16, depth=3, patch_size=4, kernel_size=3), out_indices=[0, 2]
    ),
}

_OTHERS = {
    'mmpretrain-edgenext': dict(
        type='mmpretrain.EdgeNeXt',
        arch=dict(channels=[16, 24, 32, 40], depths=[1, 2, 2, 2], num_heads=[2] * 4),
        layer_scale_init_value=0.5,
        gap_before_final_norm=False,
        **_ALL,
    ),
    'mmpretrain-van': dict(
        type='mmpretrain.VAN', arch=dict(embed_dims=[8, 16, 24, 32], depths=[1] * 4, ffn_ratios=[2] * 4), **_ALL
    ),
    'mmpretrain-riformer': dict(
        type='mmpretrain.RIFormer',
        arch=dict(mlp_ratios=[2] * 4, layer_scale_init_value=0.5, **_SMALL_STAGES),
        out_indices=(0, 2, 4, 6),
    ),
    'mmpretrain-efficientformer': dict(
        type='mmpretrain.EfficientFormer',
        arch=dict(layers=[1, 1, 1, 2], embed_dims=[8, 16, 24, 32], downsamples=[False, True, True, True], vit_num=1),
        **_ALL,
    ),
    'mmpretrain-levit': dict(type='mmpretrain.LeViT', arch='128s', img_size=64, out_indices=(0, 1, 2)),
    'mmpretrain-mixmim': dict(
        type='mmpretrain.MixMIMTransformer',
        arch=dict(embed_dims=16, depths=[1] * 4, num_heads=[1, 1, 2, 2]),
        img_size=64,
        window_size=[4, 4, 4, 2],
    ),
    'mmpretrain-repmlp': dict(
        type='mmpretrain.RepMLPNet',
        arch=dict(channels=[8, 16, 24, 32], depths=[1] * 4, sharesets_nums=[1, 1, 2, 2]),
        img_size=64,
        out_indices=(0, 3),
    ),
    'mmpretrain-replknet': dict(
        type='mmpretrain.RepLKNet',
        arch=dict(
            large_kernel_sizes=[7, 5, 5, 3], layers=[1] * 4, channels=[8, 16, 24, 32], small_kernel=3, dw_ratio=1
        ),
        drop_path_rate=0.0,
        **_ALL,
    ),
    'mmpretrain-vig': dict(type='mmpretrain.Vig', arch='tiny', out_indices=[1, 11]),
    'mmpretrain-pyramidvig': dict(type='mmpretrain.PyramidVig', arch='tiny', out_indices=[2, 3]),
    'mmpretrain-hivit': dict(
        type='mmpretrain.HiViT',
        arch=dict(embed_dims=32, depths=[1, 1, 7], num_heads=2),
        img_size=64,
        rpe=True,
        out_indices=[1],
    ),
    'mmpretrain-mobilevit': dict(
        type='mmpretrain.MobileViT',
        arch=[['mobilenetv2', 16, 1, 1, 2], ['mobilenetv2', 24, 2, 2, 2], ['mobilevit', 32, 2, 24, 48, 2, 2]],
        out_indices=(0, 1, 2),
    ),
    'mmpretrain-t2t': dict(
        type='mmpretrain.T2T_ViT',
        img_size=64,
        embed_dims=24,
        num_layers=2,
        t2t_cfg=dict(token_dims=16),
        layer_cfgs=dict(num_heads=2, feedforward_channels=48),
        out_type='featmap',
        out_indices=[0, 1],
    ),
    'mmpretrain-tnt': dict(
        type='mmpretrain.TNT',
        arch=dict(embed_dims_outer=24, embed_dims_inner=8, num_layers=2, num_heads_outer=2, num_heads_inner=2),
        img_size=64,
    ),
    'mmpretrain-mixer': dict(
        type='mmpretrain.MlpMixer',
        arch=dict(embed_dims=24, num_layers=2, tokens_mlp_dims=16, channels_mlp_dims=48),
        img_size=64,
    ),
    'mmpretrain-conformer': dict(
        type='mmpretrain.Conformer',
        arch=dict(embed_dims=24, depths=3, num_heads=2, channel_ratio=1),
        base_channels=16,
        out_indices=[2, 3],
    ),
}

DECLARED = {
    'mmpretrain-beit': dict(
        type='mmpretrain.BEiTViT', arch=_TRANSFORMER, img_size=64, patch_size=16, out_type='featmap', out_indices=[0, 1]
    ),
    'mmpretrain-eva02': dict(
        type='mmpretrain.ViTEVA02', arch=_TRANSFORMER, img_size=64, patch_size=16, out_type='featmap', sub_ln=True
    ),
    'mmpretrain-sam': dict(
        type='mmpretrain.ViTSAM',
        arch={**_TRANSFORMER, 'global_attn_indexes': [1]},
        img_size=64,
        patch_size=16,
        window_size=3,
    ),
    'mmpretrain-tinyvit': dict(
        type='mmpretrain.TinyViT',
        arch=dict(channels=[8, 16, 24, 32], num_heads=[2] * 4, window_sizes=[7, 7, 14, 7], depths=[1] * 4),
        img_size=(64, 64),
        gap_before_final_norm=False,
        out_indices=(1, 2, 3),
    ),
    'mmpretrain-mvit': dict(
        type='mmpretrain.MViT',
        arch=dict(embed_dims=24, num_layers=3, num_heads=1, downscale_indices=[1]),
        img_size=64,
        out_scales=[0, 1],
    ),
    'mmpretrain-xcit': dict(
        type='mmpretrain.XCiT',
        img_size=64,
        patch_size=16,
        embed_dims=24,
        depth=2,
        num_heads=2,
        layer_scale_init_value=1.0,
        out_type='featmap',
    ),
    'mmpretrain-poolformer': dict(
        type='mmpretrain.PoolFormer',
        arch=dict(layers=[1] * 4, embed_dims=[8, 16, 24, 32], mlp_ratios=[2] * 4, layer_scale_init_value=0.5),
        out_indices=(0, 2, 4, 6),
    ),
    'mmpretrain-davit': dict(
        type='mmpretrain.DaViT', arch=dict(embed_dims=24, depths=[1, 1], num_heads=[2, 2]), out_indices=(0, 1)
    ),
    'mmpretrain-hornet': dict(
        type='mmpretrain.HorNet',
        arch=dict(base_dim=16, depths=[1] * 4, orders=[2] * 4, dw_cfg=[dict(type='DW', kernel_size=7)] * 4),
        gap_before_final_norm=False,
        **_ALL,
    ),
    'mmpretrain-pcpvt': dict(
        type='mmpretrain.PCPVT',
        arch=dict(depths=[1] * 4, patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], **_FOUR),
        **_ALL,
    ),
    'mmpretrain-svt': dict(
        type='mmpretrain.SVT',
        arch={
            **_FOUR,
            'depths': [2] * 4,
            'window_sizes': [7] * 4,
            'patch_sizes': [4, 2, 2, 2],
            'strides': [4, 2, 2, 2],
        },
        **_ALL,
    ),
    'mmseg-vit': dict(type='mmseg.VisionTransformer', **_MMSEG),
    'mmseg-mae': dict(type='mmseg.MAE', init_values=0.5, **_MMSEG),
    'mmseg-beit': dict(type='mmseg.BEiT', init_values=0.5, qv_bias=True, **_MMSEG),
    'mmseg-mit': dict(
        type='mmseg.MixVisionTransformer', embed_dims=16, num_layers=[1] * 4, num_heads=[1, 1, 2, 2], mlp_ratio=2
    ),
    'mmseg-mscan': dict(
        type='mmseg.MSCAN', embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4, norm_cfg=dict(type='BN')
    ),
    'mmseg-pcpvt': dict(type='mmseg.PCPVT', depths=[1] * 4, **_FOUR),
    'mmseg-svt': dict(type='mmseg.SVT', depths=[2] * 4, windiow_sizes=[7] * 4, **_FOUR),
    'mmdet-pvt': dict(
        type='mmdet.PyramidVisionTransformer',
        embed_dims=16,
        num_layers=[1] * 4,
        num_heads=[1, 1, 2, 2],
        pretrain_img_size=64,
    ),
    **_convolutional(),
    **_OTHER_CONVOLUTIONAL,
    **_OTHERS,
}
"""The configs by name."""

CONVOLUTIONAL = (*_convolutional(), *_OTHER_CONVOLUTIONAL)
"""Hosts whose blocks have no other stream site than post_ffn."""

FIXED_SIZE = (
    *('mmpretrain-beit', 'mmpretrain-tinyvit', 'mmpretrain-davit', 'mmseg-mae', 'mmseg-beit'),
    *('mmpretrain-efficientformer', 'mmpretrain-levit', 'mmpretrain-mixmim', 'mmpretrain-repmlp', 'mmpretrain-vig'),
    *('mmpretrain-pyramidvig', 'mmpretrain-hivit', 'mmpretrain-tnt', 'mmpretrain-mixer'),
)
"""Hosts that take images of one size alone (DaViT: none whose smallest map is below its window)."""

IMAGE_SIZES = {'mmpretrain-efficientformer': 224, 'mmpretrain-vig': 224, 'mmpretrain-pyramidvig': 224}
"""The sides of the images of hosts that do not take 64."""

_COMMON = (
    *('mmdet-cspnext', 'mmseg-cgnet', 'mmpretrain-convmixer', 'mmpretrain-edgenext', 'mmpretrain-repmlp'),
    *('mmpretrain-hivit', 'mmpretrain-mobilevit', 'mmpretrain-t2t'),
)

VARIANTS = (
    *(name for name in _convolutional() if name.startswith(('mmdet-res', 'mmseg-res', 'mmpretrain-resnetv1'))),
    *(name for name in (*_OTHER_CONVOLUTIONAL, *_OTHERS) if name not in _COMMON),
)
"""Hosts in `make test-all` alone: those with the same kind of blocks as another one in the list, and large ones."""
