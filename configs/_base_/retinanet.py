# RetinaNet but for its backbone, neck and widths, with a head that learns soon from scratch. A config sets the rest.
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    bbox_head=dict(
        type='RetinaHead',
        anchor_generator=dict(type='AnchorGenerator', scales_per_octave=3, ratios=[0.5, 1.0, 2.0]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        reg_decoded_bbox=True,
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'),  # takes all anchors, since the focal loss weights each of them
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
