"""The page of a comparison, its pictures, the scores of classes, and the splitting of training sets.

The results are made up, so that what must stand on the page is known.
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mona_mm.reproduce import MINI, Cell, Composer, draw_pictures, write_page
from mona_mm.reproduce.carve import carve_coco, carve_labels, carve_voc, rarest
from mona_mm.reproduce.charts import _mean_curve, pareto_front
from mona_mm.reproduce.class_scores import measure_classes, split_classes
from mona_mm.reproduce.pictures import f1, iou


def record(cell: Cell, score: float | None, number: int) -> dict:
    made = dict(
        **dataclasses.asdict(cell),
        device='cpu',
        score=score,
        date='2026-01-02T03:04:05+00:00',
        machine=dict(processor='a processor', gpu=None, threads=1, torch='2.9'),
        seconds=dict(wall=100.0, processor=90.0 + number, training=80.0),
        trained_parameters=1000 + number,
        trained_in_backbone=number,
        peak_memory=(1 << 30) + number,
        delta_bytes=4 * number,
        losses=[[10, 2.0], [20, 1.0 / (1 + number)]][: 1 if cell.seed else 2],  # a resumed run can lack a part
    )
    if cell.split == 'test':
        made['classes'] = {'<Sky>': score, 'Road': score + 1}
    return made if score is not None else made | dict(error='FloatingPointError: the loss is nan')


@pytest.fixture
def records() -> dict:
    """A whole search and three seeds of two methods on CamVid; one learning rate of another, and one that failed."""
    made = {}
    for number, method in enumerate(('fixed', 'mona')):
        for lr in MINI.learning_rates:
            made[Cell('camvid', method, lr, 0)] = 30 + 10 * number - 1e3 * abs(lr - 5e-4)
        for seed in MINI.seeds:
            made[Cell('camvid', method, 5e-4, seed)] = 30 + 10 * number + seed
            made[Cell('camvid', method, 5e-4, seed, 'test')] = 20 + 10 * number + seed
    made[Cell('camvid', 'lora', 5e-4, 0)] = 35.0
    made[Cell('camvid', 'full', 2.5e-3, 0)] = None
    return {cell: record(cell, score, int(cell.method != 'fixed') * 500) for cell, score in made.items()}


def test_page(drawn_charts, records, tmp_path):
    """It holds every method's scores and costs, the charts, what failed, and no address of another file."""
    text = write_page(MINI, {'cpu': records}, tmp_path).read_text()
    rows = [re.sub('<.*?>', ' ', row).split() for row in re.findall('<tr>.*?</tr>', text)]
    by_method = {row[0]: row for row in rows if row[0] in MINI.methods}
    assert by_method['mona'][1:8] == ['31.00±1.00', '41.00±1.00', '0.0005', '500', '1,500', '590', '1.00']
    assert by_method['fixed'][1] == '21.00±1.00' and by_method['lora'][1:3] == ['-', '35.00']
    methods = [row[0] for row in rows if row[0] in MINI.methods]
    assert methods[:3] == ['mona', 'fixed', 'lora'] and sorted(methods) == sorted(MINI.methods)
    assert text.count('FloatingPointError: the loss is nan') == 2
    assert text.count('<svg') == 3 and '<metadata' not in text
    assert '&lt;Sky&gt;' in text and '<Sky>' not in text
    linked = set(re.findall(r'(?:src|href)="([^#"][^"]*)"', text))
    assert {address for address in linked if not address.startswith('data:')} == {'protocol.md'}
    assert (tmp_path / 'mini-camvid.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_the_same_results_give_the_same_page(drawn_charts, records, tmp_path):
    pages = [write_page(MINI, {'cpu': records}, tmp_path / name).read_bytes() for name in ('a', 'b')]
    assert pages[0] == pages[1]


def test_page_without_results(tmp_path):
    assert 'no results yet' in write_page(MINI, {}, tmp_path).read_text()


def test_mean_curve():
    """Every iteration's mean is over the runs that have it: a resumed run can lack one, and begin with another."""
    curves = [[(10, 2.0), (20, 1.0)], [(10, 4.0)], [(20, 3.0), (30, 5.0)]]
    assert _mean_curve(curves) == [(10, 3.0), (20, 2.0), (30, 5.0)]


def test_pareto_front():
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (4.0, 5.0)]
    assert pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_iou_and_f1():
    assert iou([0, 0, 10, 10], [5, 0, 10, 10]) == pytest.approx(1 / 3)
    assert iou([0, 0, 10, 10], [10, 0, 10, 10]) == 0
    truth = [([0, 0, 10, 10], 1, 1.0), ([20, 0, 10, 10], 2, 1.0)]
    assert f1(truth, [([0, 0, 10, 9], 1, 0.9), ([20, 0, 10, 10], 1, 0.8)]) == pytest.approx(2 * 1 / 4)
    twice = [([0, 0, 10, 10], 1, 0.9), ([0, 0, 10, 10], 1, 0.8)]  # the second finds nothing left
    assert f1(truth, twice) == pytest.approx(2 * 1 / 4)
    assert f1(truth, []) == 0 and f1(truth, truth) == 1


def test_pictures(records, tmp_path):
    """Of three images the best, the worst and the one where two methods differ, with credit; CamVid has no pictures."""
    records |= {
        Cell('aquarium', method, lr, 0): record(Cell('aquarium', method, lr, 0), 10.0, 1)
        for method in ('fixed', 'mona')
        for lr in MINI.learning_rates
    }
    data, work = tmp_path / 'data', tmp_path / 'work'
    images = [dict(id=i, file_name=f'{i}.jpg', width=48, height=36) for i in range(3)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[4, 4, 20, 20], area=400, iscrowd=0) for i in range(3)]
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='fish')])
    for split in ('train', 'test'):
        (data / 'aquarium/images' / split).mkdir(parents=True)
    (data / 'aquarium/annotations').mkdir()
    for split in ('train', 'test'):
        (data / f'aquarium/annotations/instances_{split}.json').write_text(json.dumps(content))
    for image in images:
        cv2.imwrite(str(data / 'aquarium/images/test' / image['file_name']), np.full((36, 48, 3), 90, np.uint8))
    right, wrong = [4, 4, 20, 20], [30, 20, 8, 8]
    lr = min(MINI.learning_rates)  # of equals the lowest
    for method, found in dict(fixed=[right, wrong, wrong], mona=[right, wrong, right]).items():
        folder = work / Cell('aquarium', method, lr, 0).folder
        folder.mkdir(parents=True)
        entries = [dict(image_id=i, category_id=1, bbox=box, score=0.9) for i, box in enumerate(found)]
        (folder / 'predictions.bbox.json').write_text(json.dumps(entries))
    drawn = draw_pictures(Composer(MINI, data, tmp_path / 'w', 'cpu', work), records, tmp_path / 'pictures')
    assert [(p.file, p.credit.split(',')[0]) for p in drawn] == [
        ('aquarium-best.jpg', '0.jpg'),
        ('aquarium-worst.jpg', '1.jpg'),
        ('aquarium-differ.jpg', '2.jpg'),
    ]
    assert all('CC BY 4.0' in p.credit and 'fish (red)' in p.caption for p in drawn)
    picture = cv2.imread(str(tmp_path / 'pictures/aquarium-differ.jpg')).astype(int)
    red = (picture[..., 2] - picture[..., 1] > 60).sum(0)  # by column: annotation, fixed, mona
    panels = [int(red[i * 244 : (i + 1) * 244].sum()) for i in range(5)]
    assert min(panels[:3]) > 50 and panels[3:] == [0, 0]
    text = write_page(MINI, {'cpu': records}, tmp_path).read_text()
    assert text.count('data:image/jpeg;base64,') == 3 and 'Roboflow' in text


# Classes -------------------------------------------------------------------------------------------------------------


def test_classes_of_a_segmentation():
    """They equal those that mmseg prints, and the mean over them is mIoU."""
    from mmseg.evaluation import IoUMetric

    metric = IoUMetric()
    metric.dataset_meta = dict(classes=('a', 'b', 'none'))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        prediction, label = (torch.randint(0, 2, (8, 8), generator=generator) for _ in range(2))
        metric.results.append(IoUMetric.intersect_and_union(prediction, label, 3, 255))
    measure_classes([metric], Path('unused'))
    values = metric.compute_metrics(metric.results)
    whole, by_class = split_classes(values, metric.dataset_meta['classes'])
    assert set(whole) == {'aAcc', 'mIoU', 'mAcc'} and set(by_class) == {'a', 'b'}  # there is nothing of the third
    assert np.mean(list(by_class.values())) == pytest.approx(whole['mIoU'], abs=0.01)


def test_classes_of_other_tasks():
    metric = SimpleNamespace(classwise=False, outfile_prefix=None)
    measure_classes([metric], Path('folder/predictions'))
    assert metric.classwise and metric.outfile_prefix == str(Path('folder/predictions'))
    values = {'coco/bbox_mAP': 0.3, 'coco/fish_precision': 0.25, 'coco/fish_iou-50_precision': 0.4}
    assert split_classes(values, ['fish']) == ({'coco/bbox_mAP': 0.3}, {'fish': 25.0})
    values = {'coco/fish_precision': 0.25, 'coco/fish_big_precision': 0.5}  # one name is the start of the other
    assert split_classes(values, ['fish', 'fish_big']) == ({}, {'fish': 25.0, 'fish_big': 50.0})
    values = {'accuracy/top1': 80.0, 'single-label/recall_classwise': [75.0, 85.0]}
    assert split_classes(values, ['a', 'b']) == ({'accuracy/top1': 80.0}, {'a': 75.0, 'b': 85.0})


# Splits --------------------------------------------------------------------------------------------------------------


def made_config(root: Path, ann_file: str, prefix: dict) -> Config:
    dataset = dict(data_root=str(root), ann_file=ann_file, data_prefix=prefix)
    other = dict(data_root=str(root), ann_file='test', data_prefix=dict(img='test'))
    return Config(
        dict(
            train_dataloader=dict(dataset=dataset),
            val_dataloader=dict(dataset=other),
            test_dataloader=dict(dataset=other),
            val_evaluator=dict(ann_file='test'),
        )
    )


def split_by(carve, root: Path, ann_file: str, read) -> tuple[set, set]:
    """The images for training and for validation; every call gives the same, and the test set stays."""
    found = []
    for name in ('a', 'b'):
        cfg = made_config(root, ann_file, dict(img='train'))
        carve(cfg, root / name)
        datasets = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
        found.append([read(Path(dataset.ann_file).read_text()) for dataset in datasets])
        assert datasets[1].data_prefix == dict(img='train')
        assert cfg.test_dataloader.dataset == dict(data_root=str(root), ann_file='test', data_prefix=dict(img='test'))
    assert found[0] == found[1]
    return found[0]


def test_lists_of_labels_are_split_by_class(tmp_path):
    """One image in five of each class is for validation, also where a name has a space."""
    lines = [f'class {label}/{i} x.jpg {label}' for label, count in enumerate((10, 20)) for i in range(count)]
    (tmp_path / 'train.txt').write_text('\n'.join(lines) + '\n')
    train, val = split_by(carve_labels, tmp_path, 'train.txt', lambda text: set(text.splitlines()))
    assert train | val == set(lines) and not train & val
    assert sorted(line[-1] for line in val) == ['0'] * 2 + ['1'] * 4


def test_voc_is_split_by_the_rarest_class(tmp_path):
    """Five of the twenty images have the rare class: one of them, and three of the others, is for validation."""
    (tmp_path / 'Annotations').mkdir()
    for i in range(20):
        names = ['common', 'common', *(['rare'] if i % 4 == 0 else [])]
        things = ''.join(f'<object><name>{name}</name></object>' for name in names)
        (tmp_path / f'Annotations/{i}.xml').write_text(f'<annotation>{things}</annotation>')
    (tmp_path / 'train.txt').write_text('\n'.join(map(str, range(20))))
    train, val = split_by(carve_voc, tmp_path, 'train.txt', lambda text: {int(line) for line in text.split()})
    assert train | val == set(range(20)) and not train & val
    assert [sum(i % 4 == 0 for i in part) for part in (train, val)] == [4, 1] and len(val) == 4


def test_coco_is_split_by_the_rarest_class(tmp_path):
    images = [dict(id=i, file_name=f'{i}.jpg') for i in range(20)]
    boxes = [dict(image_id=i, category_id=c) for i in range(19) for c in ((1, 1, 2) if i % 4 == 0 else (1, 1))]
    (tmp_path / 'train.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=[])))

    def read(text: str) -> set:
        content = json.loads(text)
        assert {b['image_id'] for b in content['annotations']} <= {i['id'] for i in content['images']}
        return {image['id'] for image in content['images']}

    train, val = split_by(carve_coco, tmp_path, 'train.json', read)
    assert train | val == set(range(20)) and not train & val
    assert [sum(i % 4 == 0 for i in part) for part in (train, val)] == [4, 1] and len(val) == 4
    assert 19 in train  # the one image without objects


def test_rarest():
    assert rarest({'x': ['a', 'a', 'b'], 'y': ['a'], 'z': []}) == {'x': 'b', 'y': 'a', 'z': None}
