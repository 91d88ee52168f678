"""The demo: its data set, its config, and (slow) the whole of it."""

import argparse
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from pycocotools.coco import COCO

from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.data_check.check import check_data
from mona_mm.datasets import shapes as demo_data
from mona_mm.datasets.shapes import CLASSES, make_demo_dataset
from mona_mm.errors import ConfigError, UserError

COUNTS = dict(train=6, val=3)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_same_seed_same_bytes(tmp_path):
    first = files(make_demo_dataset(tmp_path / 'a', **COUNTS))
    assert first == files(make_demo_dataset(tmp_path / 'b', **COUNTS))
    assert len(first) == 6 + 3 + 3  # images, two annotation files and the stamp

    other = files(make_demo_dataset(tmp_path / 'c', **COUNTS, seed=1))
    assert other.keys() == first.keys()
    assert all(other[name] != content for name, content in first.items())


def test_splits_differ(tmp_path):
    content = files(make_demo_dataset(tmp_path / 'a', **COUNTS))
    images = [image for name, image in content.items() if name.endswith('.jpg')]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize('split', COUNTS)
def test_annotations_are_valid(tmp_path, split):
    root = make_demo_dataset(tmp_path / 'set', train=30, val=30)
    coco = COCO(root / f'annotations/instances_{split}2017.json')
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == 30
    assert {ann['category_id'] for ann in coco.anns.values()} == set(coco.getCatIds())
    for image in coco.imgs.values():
        pixels = cv2.imread(str(root / f'{split}2017' / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
        covered = np.zeros(pixels.shape[:2], int)
        anns = coco.imgToAnns[image['id']]
        assert 1 <= len(anns) <= 4
        for ann in anns:
            mask = coco.annToMask(ann)
            covered += mask
            assert mask.shape == pixels.shape[:2]
            ys, xs = np.nonzero(mask)
            assert ann['area'] == mask.sum() > 50
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert ann['bbox'] == box
            assert ann['iscrowd'] == 0
        assert covered.max() == 1  # a pixel shows one shape: masks are what is visible


def test_masks_show_what_is_visible(monkeypatch):
    """With one flat paint for each shape, the image itself says which pixel shows which shape."""
    levels = np.array([0, 60, 120, 180, 240])  # of the background and of up to four shapes
    monkeypatch.setattr(demo_data, '_background', lambda rng: np.zeros((128, 128, 3)))
    overlapping = 0
    for seed in range(20):
        paints = iter(levels[1:])
        monkeypatch.setattr(demo_data, '_paint', lambda rng, paints=paints: np.full((1, 1, 3), next(paints)))
        image, shapes = demo_data.draw_image(np.random.default_rng(seed))
        shown = abs(image.mean(axis=2)[..., None] - levels).argmin(axis=2)
        said = sum(number * mask.astype(np.uint8) for number, (_, mask) in enumerate(shapes, start=1))
        around = np.ones((3, 3), np.uint8)
        lowest, highest = cv2.erode(said, around), cv2.dilate(said, around)
        inner = lowest == highest  # edges are blended
        assert (shown == said)[inner].all()
        overlapping += ((lowest > 0) & ~inner).any()  # two shapes meet there, with no background between
    assert overlapping > 5


def test_complete_set_is_kept(tmp_path):
    root = make_demo_dataset(tmp_path / 'set', **COUNTS)
    image = root / 'train2017/000000000001.jpg'
    os.utime(image, (1, 1))
    make_demo_dataset(root, **COUNTS)
    assert image.stat().st_mtime == 1


def test_incomplete_or_other_set_is_drawn_anew(tmp_path):
    root = make_demo_dataset(tmp_path / 'set', **COUNTS)
    wanted = files(root)
    (root / 'train2017/000000000001.jpg').unlink()
    assert files(make_demo_dataset(root, **COUNTS)) == wanted

    stamp = root / 'demo_dataset.json'
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), 'complete': False}))
    (root / 'val2017/000000000001.jpg').write_bytes(b'half')
    assert files(make_demo_dataset(root, **COUNTS)) == wanted

    make_demo_dataset(root, train=2, val=1)
    assert len(list(root.rglob('*.jpg'))) == 3  # none of the larger set is left
    assert files(make_demo_dataset(root, **COUNTS)) == wanted


@pytest.mark.parametrize('content', ['train2017/mine.jpg', 'notes.txt', 'demo_dataset.json'])
def test_foreign_folder_is_refused(tmp_path, content):
    path = tmp_path / 'mine' / content
    path.parent.mkdir(parents=True)
    path.write_text('mine')
    with pytest.raises(ConfigError, match='left alone'):
        make_demo_dataset(tmp_path / 'mine', **COUNTS)
    assert files(tmp_path / 'mine') == {content: b'mine'}


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ConfigError, match='left alone'):
        make_demo_dataset(tmp_path / 'file', **COUNTS)


def test_negative_count_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='train=-1'):
        make_demo_dataset(tmp_path / 'set', train=-1)


def test_config_trains_and_predicts(demo_data, tmp_path):
    cfg = load_config(str(ROOT / 'configs/demo/demo_mona_shapes.py'), dict(data_root=str(demo_data)))
    assert cfg.metainfo.classes == CLASSES
    check_data(cfg, ('train', 'val', 'test'))
    cfg.work_dir = str(tmp_path)
    adapt_to_device(cfg)
    runner = build_runner(cfg)
    backbone = runner.model.backbone
    train, val = runner.build_dataloader(cfg.train_dataloader), runner.build_dataloader(cfg.val_dataloader)
    assert (len(train.dataset), len(val.dataset)) == (6, 2)
    runner.model.init_weights()
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}

    runner.model.train()
    losses = runner.model.train_step(next(iter(train)), runner.build_optim_wrapper(cfg.optim_wrapper))
    assert all(torch.isfinite(torch.as_tensor(value)) for value in losses.values())
    assert {f's{stage}.loss_{part}' for stage in range(3) for part in ('cls', 'bbox', 'mask')} <= losses.keys()
    moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if '.peft.' in name}

    runner.model.eval()
    with torch.no_grad():
        (sample,) = runner.model.test_step(next(iter(val)))
    assert sample.pred_instances.masks.shape[1:] == sample.ori_shape
    assert sample.gt_instances.masks.masks.shape[1:] == sample.ori_shape


@pytest.fixture(scope='module')
def demo() -> dict:
    """The names of tools/demo.py."""
    return runpy.run_path(str(ROOT / 'tools/demo.py'))


def chosen(demo, **given):
    return demo['choose'](argparse.Namespace(**dict(dict(weights=None, data=None, data_root=None), **given)))


def test_real_images(demo, tmp_path):
    """With weights and a folder, the quick config for what the folder holds is trained from that file."""
    (tmp_path / 'weights.pth').touch()
    for name in 'ab':
        for number in range(4):
            image = tmp_path / 'images' / name / f'{number}.png'
            image.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(image), np.full((32, 32, 3), number, np.uint8))
    task = chosen(demo, weights=str(tmp_path / 'weights.pth'), data=str(tmp_path / 'images'))
    assert task.config == ROOT / 'configs/custom/quick_classifier_dinov2_s.py' and task.config.is_file()
    arguments = task.arguments(str(tmp_path / 'work'))
    assert f'model.backbone.base.init_cfg.checkpoint={tmp_path}/weights.pth' in arguments
    assert arguments[arguments.index('--data') + 1] == str(tmp_path / 'images')


@pytest.mark.parametrize('given', [dict(weights='a.pth'), dict(data='folder'), dict(weights='a.pth', data='folder')])
def test_what_real_images_need(demo, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='go together' if len(given) == 1 else '--weights a.pth: there is no such file'):
        chosen(demo, **given)


def test_a_frozen_run_that_fails(demo, tmp_path, monkeypatch):
    """Its output is kept, and the demo names it. It ends with the demo."""
    task, program = demo['Task'](tmp_path / 'missing.py', dict(a=1), None), tmp_path / 'program'
    monkeypatch.setattr(sys, 'executable', str(program))
    program.write_text('#!/bin/sh\necho "cannot run $@"\nexit 2\n')
    program.chmod(0o755)
    with (
        demo['frozen_run'](task, str(tmp_path / 'frozen')) as process,
        pytest.raises(UserError, match='output.txt says'),
    ):
        demo['scores_of_frozen'](process, str(tmp_path / 'frozen'))
    assert 'missing.py' in (tmp_path / 'frozen/output.txt').read_text()
    program.write_text('#!/bin/sh\nexec sleep 20\n')
    with pytest.raises(KeyboardInterrupt), demo['frozen_run'](task, str(tmp_path / 'frozen')) as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM


def test_scores_are_read(demo, tmp_path):
    (tmp_path / 'results.csv').write_text('iteration,coco/bbox_mAP,coco/bbox_mAP_50\n1,0.1,0.2\n2,0.3,0.45\n')
    process = subprocess.Popen([sys.executable, '-c', ''])
    scores = demo['scores_of_frozen'](process, str(tmp_path))
    assert demo['describe'](scores) == 'box AP 0.300 (AP50 0.450)'
    assert demo['describe']({'mIoU': 31.08, 'aAcc': 80.0}) == 'mIoU 31.1'


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo(tmp_path):
    """tools/demo.py from another directory, twice in the same one: it learns, and says the same again."""
    command = [sys.executable, str(ROOT / 'tools/demo.py')]
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    outputs = []
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ''
        outputs.append(result.stdout)
    lines = outputs[0].splitlines()
    assert len(lines) < 80
    number = r'([\d.]+)'
    precision = re.compile(rf': +box AP {number} \(AP50 {number}\), mask AP {number} \(AP50 {number}\)')
    found = [precision.findall(output)[-2:] for output in outputs]  # Mona's and the frozen backbone's
    box, box50, mask, mask50 = map(float, found[0][0])
    assert box > float(found[0][1][0])
    assert box > 0.3
    assert box50 > 0.5
    assert mask > 0.3
    assert mask50 > 0.5
    assert found[0] == found[1]

    work_dir = tmp_path / 'work_dirs/demo'
    assert len(list(work_dir.glob('*.pth'))) == 1
    assert cv2.imread(str(work_dir / 'predictions.png')).shape[2] == 3
    assert len(list((work_dir / 'predictions').iterdir())) == 60
