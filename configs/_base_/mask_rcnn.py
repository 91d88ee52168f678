# Mask R-CNN but for its backbone, neck and widths. A config sets the rest.
boxes = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0])


def assigner(positive, negative, least):
    return dict(
        type='MaxIoUAssigner',
        pos_iou_thr=positive,
        neg_iou_thr=negative,
        min_pos_iou=least,
        match_low_quality=True,
        ignore_iof_thr=-1,
    )


model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
    ),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(type='AnchorGenerator', ratios=[0.5, 1.0, 2.0]),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0], **boxes),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7)),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            roi_feat_size=7,
            bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2], **boxes),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        mask_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=14)),
        mask_head=dict(type='FCNMaskHead', loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0)),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=assigner(0.7, 0.3, 0.3),
            sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=assigner(0.5, 0.5, 0.5),
            sampler=dict(type='RandomSampler', pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), mask_thr_binary=0.5),
    ),
)
del assigner, boxes
