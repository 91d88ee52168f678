"""The main job on real COCO images: slow, and only where the images are."""

import json
import re
import resource
from collections import defaultdict

import pytest
import torch
from conftest import ROOT, real_images

from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, load_config

pytestmark = [pytest.mark.slow, pytest.mark.real_images]
CONFIG = str(ROOT / 'configs/mona/cascade_swin_b_coco.py')


@pytest.fixture
def two_threads():
    """The models here are large enough for it."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(cfg, work_dir) -> str:
    """Train, and return the log."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    cfg.randomness = dict(seed=0)
    adapt_to_device(cfg)
    build_runner(cfg).train()
    return next(work_dir.glob('*/*.log')).read_text()


def test_full_size_trains_and_validates(tmp_path, two_threads):
    """The shipped config, unchanged but for the data, the pretrained weights and the CPU: three iterations at batch 1
    and one validation image."""
    options = {
        'data_root': str(real_images('coco')),
        'model.backbone.base.init_cfg': None,
        'train_dataloader.dataset.indices': 3,
        'val_dataloader.dataset.indices': 1,
        'train_cfg.max_epochs': 1,
        'default_hooks.logger.interval': 1,
        'default_hooks.checkpoint.interval': -1,
        'default_hooks.checkpoint.save_last': False,
    }
    log = run(load_config(CONFIG, options), tmp_path / 'full')
    losses = [float(loss) for loss in re.findall(r'Epoch\(train\).* loss: ([\d.]+)', log)]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    assert 'Epoch(val) [1][1/1]' in log and '333 frozen parameters are unchanged' in log
    seconds = re.findall(r'Epoch\(train\).* time: ([\d.]+)', log)
    print(f'seconds an iteration (mean so far): {seconds}; peak memory of the process:', end=' ')
    print(f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB')


def eight_images(path) -> dict:
    """The eight images whose smallest object is largest: the others hold objects of a few pixels at this size."""
    coco = json.loads((real_images('coco') / 'annotations/instances_train2017.json').read_text())
    area = {image['id']: image['width'] * image['height'] for image in coco['images']}
    objects = defaultdict(list)
    for annotation in coco['annotations']:
        objects[annotation['image_id']].append(annotation['area'] / area[annotation['image_id']])
    kept = sorted(objects, key=lambda image: -min(objects[image]))[:8]
    coco['images'] = [image for image in coco['images'] if image['id'] in kept]
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] in kept]
    path.write_text(json.dumps(coco))
    return coco


def scaled_down(ann_file) -> dict:
    """The shipped config with a narrow Swin and narrow heads, on small images without augmentation."""
    width, iterations = 64, 160
    cfg = load_config(
        CONFIG,
        {
            'data_root': str(real_images('coco')),
            'model.backbone.base.init_cfg': None,
            'model.backbone.base.embed_dims': 32,
            'model.backbone.base.depths': [2, 2, 2, 2],
            'model.backbone.base.num_heads': [1, 2, 4, 8],
            'model.backbone.base.drop_path_rate': 0.0,
            'model.backbone.peft.dropout': 0.0,
            'model.neck.in_channels': [32, 64, 128, 256],
            'model.neck.out_channels': width,
            'model.rpn_head.in_channels': width,
            'model.rpn_head.feat_channels': width,
            'model.roi_head.bbox_roi_extractor.out_channels': width,
            'model.roi_head.mask_roi_extractor.out_channels': width,
            'model.roi_head.mask_head.in_channels': width,
            'model.roi_head.mask_head.conv_out_channels': width,
            'model.train_cfg.rpn_proposal.max_per_img': 200,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.sampler': dict(type='InfiniteSampler', shuffle=True),
            'train_dataloader.batch_sampler': None,
            'optim_wrapper.optimizer.lr': 1e-3,
            'optim_wrapper.clip_grad': dict(max_norm=5.0),
            'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations),
            'default_hooks.checkpoint': dict(_delete_=True, type='mona_mm.SafeCheckpointHook', by_epoch=False),
        },
    )
    for head in cfg.model.roi_head.bbox_head:
        head.update(in_channels=width, conv_out_channels=width, fc_out_channels=256, num_shared_convs=2)
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 128
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=iterations, eta_min=0),
    ]
    resize = dict(type='Resize', scale=(320, 160), keep_ratio=True)
    train = cfg.train_dataloader.dataset
    train.ann_file = str(ann_file)
    train.pipeline = [*cfg.train_pipeline[:2], resize, cfg.train_pipeline[-1]]
    cfg.val_dataloader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset={**train, 'test_mode': True, 'pipeline': [cfg.test_pipeline[0], resize, *cfg.test_pipeline[2:]]},
    )
    cfg.val_evaluator.ann_file = str(ann_file)
    return cfg


def test_overfits_eight_real_images(tmp_path, two_threads):
    """With the base frozen at random values, Mona and the heads learn eight real images by heart: AP50 above 0.5."""
    assert len(eight_images(tmp_path / 'eight.json')['images']) == 8
    log = run(scaled_down(tmp_path / 'eight.json'), tmp_path / 'overfit')
    scores = dict(re.findall(r'coco/(\w+): ([-\d.]+)', log))
    print(scores)
    assert float(scores['bbox_mAP_50']) > 0.5
    assert float(scores['segm_mAP_50']) > 0.5
