"""Small configs of the hosts that are only a declaration: the stock forward, with sites by hooks."""

_TRANSFORMER = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
_MMSEG = dict(img_size=64, patch_size=16, embed_dims=24, num_layers=2, num_heads=2, mlp_ratio=2, out_indices=(0, 1))
_FOUR = dict(embed_dims=[16] * 4, num_heads=[1, 1, 2, 2], mlp_ratios=[2] * 4, sr_ratios=[8, 4, 2, 1])
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
                type=f'{library}.{name}', depth=50, base_channels=8, **_ALL, **more
            )
        found[f'{library}-hrnet'] = _hrnet(library)
    return found


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
}
"""The configs by name."""

FIXED_SIZE = ('mmpretrain-beit', 'mmpretrain-tinyvit', 'mmpretrain-davit', 'mmseg-mae', 'mmseg-beit')
"""Hosts that take images of one size alone (DaViT: none whose smallest map is below its window)."""

VARIANTS = tuple(name for name in DECLARED if name.startswith(('mmdet-res', 'mmseg-res', 'mmpretrain-resnetv1')))
"""Hosts that have the same blocks as another one in the list, in `make test-all` alone."""
