"""The shipped configs by name, and what makes each kind of task small enough to train in a second."""

from conftest import ROOT

CONFIGS = {path.stem: path for path in sorted((ROOT / 'configs').rglob('*.py'))}


def kind(name: str) -> str:
    """The rows of the tables that a config belongs to."""
    known = {'coco': 'coco', 'retinanet': 'voc', 'upernet': 'ade20k'}
    return next((kind for word, kind in known.items() if word in name), 'classification')


NARROW = {
    'model.backbone.base.init_cfg': None,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'default_hooks.logger.interval': 1,
}
NARROW_SWIN = dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
NARROW_TASK = {
    'coco': {
        **{f'model.backbone.base.{key}': value for key, value in NARROW_SWIN.items()},
        'model.neck.in_channels': [12, 24, 48, 96],
        'model.neck.out_channels': 16,
        'model.rpn_head.in_channels': 16,
        'model.rpn_head.feat_channels': 16,
        'model.roi_head.bbox_roi_extractor.out_channels': 16,
        'model.roi_head.mask_roi_extractor.out_channels': 16,
        **{
            f'model.roi_head.bbox_head.{stage}.{key}': 16
            for stage in range(3)
            for key in ('in_channels', 'conv_out_channels', 'fc_out_channels')
        },
        'model.roi_head.mask_head.in_channels': 16,
        'model.roi_head.mask_head.conv_out_channels': 16,
        'model.test_cfg.rcnn.score_thr': 0.0,  # something must be predicted for COCO's metric to say a number
        'model.test_cfg.rcnn.max_per_img': 10,
        'train_dataloader.dataset.indices': 2,
        'val_dataloader.dataset.indices': 2,
        'val_dataloader.dataset.pipeline.1.scale': (200, 120),
        'train_cfg.max_epochs': 1,
    },
    'voc': {
        **{f'model.backbone.base.{key}': value for key, value in NARROW_SWIN.items()},
        'model.neck.in_channels': [24, 48, 96],
        'model.neck.out_channels': 16,
        'model.bbox_head.in_channels': 16,
        'model.bbox_head.feat_channels': 16,
        'model.test_cfg.score_thr': 0.0,
        'train_dataloader.dataset.dataset.datasets.0.indices': 2,
        'train_dataloader.dataset.dataset.datasets.1.indices': 2,
        'train_dataloader.dataset.dataset.datasets.0.pipeline.2.scale': (100, 60),
        'train_dataloader.dataset.dataset.datasets.1.pipeline.2.scale': (100, 60),
        'val_dataloader.dataset.indices': 2,
        'val_dataloader.dataset.pipeline.1.scale': (100, 60),
        'train_cfg.max_epochs': 1,
    },
    'ade20k': {
        **{f'model.backbone.base.{key}': value for key, value in NARROW_SWIN.items()},
        'model.decode_head.in_channels': [12, 24, 48, 96],
        'model.decode_head.channels': 16,
        'model.auxiliary_head.in_channels': 48,
        'model.auxiliary_head.channels': 16,
        'model.data_preprocessor.size': (64, 64),
        'train_dataloader.dataset.pipeline.2.scale': (256, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (256, 64),
        'train_dataloader.dataset.indices': 2,
        'val_dataloader.dataset.indices': 2,
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
    },
    'classification': {
        'model.backbone.base.arch': dict(_delete_=True, **NARROW_SWIN),
        'model.head.in_channels': 96,
        'train_cfg.max_epochs': 1,
    },
}
REAL = {
    'cascade_swin_b_coco': 'coco',
    'retinanet_swin_l_voc': 'VOCdevkit',
    'upernet_swin_l_ade20k': 'ade/ADEChallengeData2016',
}
