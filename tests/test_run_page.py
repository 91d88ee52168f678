"""The page of a run: what evaluators find in predictions, against other code and by hand, and what a run writes."""

import csv
import json
import re
import warnings

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_tasks import classifier, segmentor
from toy_runs import log_of, mona_swin

from mona_mm.config.run_hooks import add_hooks
from mona_mm.data_check.report import DataReport, SplitReport
from mona_mm.report.classification import ClassificationEvaluator
from mona_mm.report.detection import DetectionEvaluator, _polygons
from mona_mm.report.evaluator import chosen
from mona_mm.report.run import RunState, main_metric, read_results, write_run
from mona_mm.report.segmentation import SegmentationEvaluator
from mona_mm.reproduce.own_runs import find_own_runs, render_own_runs


class Truth:
    """A data set that knows only its annotations."""

    def __init__(self, infos):
        self.infos = infos

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, index):
        return self.infos[index]


def detections(boxes, scores, labels, image=0, **meta) -> DetDataSample:
    sample = DetDataSample(metainfo=dict(img_id=image, img_path=f'{image}.jpg', ori_shape=(200, 200), **meta))
    boxes, scores = torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(scores).float()
    sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=torch.tensor(labels))
    return sample


def boxes_of(rng, count):
    low = rng.uniform(0, 120, (count, 2))
    return np.concatenate([low, low + rng.uniform(10, 80, (count, 2))], 1)


def test_average_precision_is_that_of_coco():
    """AP at an IoU of 0.5 of every class, with crowds, against pycocotools on the same boxes."""
    rng = np.random.default_rng(3)
    infos, samples, results, annotations = [], [], [], []
    for image in range(12):
        truth, labels = boxes_of(rng, 6), rng.integers(0, 3, 6)
        crowd = rng.random(6) < 0.15
        boxes = np.concatenate([truth[:4] + rng.normal(0, 6, (4, 4)), boxes_of(rng, 5)])
        found = np.concatenate([labels[:4], rng.integers(0, 3, 5)])
        scores = rng.random(9)
        infos.append(
            dict(img_id=image, instances=[
                dict(bbox=b.tolist(), bbox_label=int(c), ignore_flag=int(i))
                for b, c, i in zip(truth, labels, crowd, strict=True)
            ])
        )  # fmt: skip
        samples.append(detections(boxes, scores, found, image))
        for kind, group in (('truth', (truth, labels, crowd)), ('found', (boxes, found, scores))):
            for box, label, value in zip(*group, strict=True):
                size = box[2:] - box[:2]
                entry = dict(
                    image_id=image, category_id=int(label) + 1, bbox=[*box[:2], *size], area=float(size.prod())
                )
                if kind == 'truth':
                    annotations.append(dict(entry, id=len(annotations) + 1, iscrowd=int(value)))
                else:
                    results.append(dict(entry, score=float(np.float32(value))))
    evaluator = DetectionEvaluator(['a', 'b', 'c'], Truth(infos[::-1]), len(infos))  # in another order
    evaluator.add(samples)
    result = evaluator.summary()

    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=i, width=300, height=300) for i in range(12)],
        annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate('abc')],
    )
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.evaluate()
    evaluation.accumulate()
    expected = evaluation.eval['precision'][0, :, :, 0, -1].mean(0)
    assert list(result.by_class) == ['a', 'b', 'c']
    np.testing.assert_allclose(list(result.by_class.values()), expected, atol=1e-6)
    assert expected.min() > 0.1 and expected.max() < 0.9


def test_detections_are_confused_as_they_lie():
    """One found as the other class, one missed, one detection of nothing; the unsure one does not count."""
    truth = [dict(bbox=[0, 0, 50, 50], bbox_label=0), dict(bbox=[100, 100, 150, 150], bbox_label=1)]
    sure = [detections([[0, 0, 50, 48], [60, 60, 80, 80]], [0.9, 0.9], [1, 1], 0)]
    for image in (1, 2):  # so that the best F1 is at 0.9
        sure.append(
            detections([[0, 0, 50, 48], [100, 100, 150, 151], [0, 0, 9, 9]], [0.95, 0.95, 0.1], [0, 1, 0], image)
        )
    evaluator = DetectionEvaluator(['cat', 'dog'], Truth([dict(img_id=i, instances=truth) for i in range(3)]), 3)
    evaluator.add(sure)
    result = evaluator.summary()
    (_, by_confidence) = result.charts
    assert by_confidence.mark == pytest.approx(0.95)
    confusion = result.confusion
    assert confusion.truths == ['cat', 'dog', 'no object'] and confusion.predictions == ['cat', 'dog', 'missed']
    assert confusion.counts.tolist() == [[2, 0, 1], [0, 2, 1], [0, 0, 0]]
    assert 'F1 0.95' not in str(result.remarks)


def test_outlines_of_annotations():
    """Polygons as they are; of both kinds of run-length codes the outline of the mask."""
    polygon = [3.0, 2.0, 9.0, 2.0, 9.0, 7.0, 3.0, 7.0]
    assert _polygons([polygon])[0].tolist() == [[3, 2], [9, 2], [9, 7], [3, 7]]
    mask = np.zeros((12, 14), np.uint8, order='F')
    mask[2:8, 3:10] = 1
    plain = mask.flatten(order='F')
    changes = np.flatnonzero(np.diff(plain)) + 1
    counts = np.diff([0, *changes, len(plain)]).tolist()
    for codes in (coco_mask.encode(mask), dict(size=[12, 14], counts=counts)):
        (outline,) = _polygons(codes)
        assert {tuple(point) for point in outline.tolist()} == {(3, 2), (9, 2), (9, 7), (3, 7)}
    assert _polygons(None) == []


def test_label_maps_are_counted():
    """IoU, precision and recall of a map with a known overlap; 255 counts nowhere; confidence is counted per pixel."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    found = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    logits = torch.nn.functional.one_hot(found, 3).permute(2, 0, 1).float() * 5
    sample = SegDataSample(metainfo=dict(img_path='0.png'))
    sample.pred_sem_seg, sample.gt_sem_seg = PixelData(data=found[None]), PixelData(data=truth[None])
    sample.seg_logits = PixelData(data=logits)
    evaluator = SegmentationEvaluator(['a', 'b', 'never'], None, 1)
    evaluator.add([sample])
    result = evaluator.summary()
    assert result.by_class['a'] == pytest.approx(3 / 5) and result.by_class['b'] == pytest.approx(2 / 4)
    assert np.isnan(result.by_class['never']) and result.rows[2][1] == '-'
    assert result.rows[0][2:4] == ['0.750', '0.750'] and result.rows[1][2:4] == ['0.667', '0.667']
    assert result.confusion.counts.tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert len(result.charts) == 1


def labelled(scores, labels, path='x.jpg') -> DataSample:
    sample = DataSample(metainfo=dict(img_path=path))
    return sample.set_pred_score(torch.tensor(scores)).set_gt_label(torch.tensor(labels))


def test_labels_are_counted():
    single = ClassificationEvaluator(['a', 'b'], None, 4)
    single.add(
        [labelled([0.9, 0.1], [0]), labelled([0.3, 0.7], [0]), labelled([0.2, 0.8], [1]), labelled([0.4, 0.6], [1])]
    )
    result = single.summary()
    assert result.confusion.counts.tolist() == [[1, 1], [0, 2]]
    assert result.by_class == {'a': pytest.approx(2 / 3), 'b': pytest.approx(4 / 5)}
    assert [row[4] for row in result.rows] == ['0.835', '0.835'], (
        'average precision: 1 up to half of the recall, then 2/3'
    )
    several = ClassificationEvaluator(['a', 'b'], None, 2)
    several.add([labelled([0.9, 0.8], [0, 1]), labelled([0.6, 0.2], [1])])
    result = several.summary()
    assert result.confusion is None and 'several classes' in result.remarks[0]
    assert [row[2:4] for row in result.rows] == [['0.500', '1.000'], ['1.000', '0.500']]


NAMES = ['<b>x</b>', 'a & b', '"q"', '日本', '$x$', '$\\foo$', '_under', 'y' * 99, 'a\\b', '{x}', '%s', 'é']


def test_odd_names_of_classes(drawn_charts, tmp_path):
    """Signs of HTML, formulas and other languages are text in the charts, in the page and in labels.png."""
    evaluator = ClassificationEvaluator(NAMES, None, 24)
    scores = np.eye(12).repeat(2, 0)
    evaluator.add([labelled(scores[i], [i // 2], f'{i}.jpg') for i in range(24)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        page = write_run(RunState('run', 'done', 'train', evaluation=evaluator.summary()), tmp_path).read_text()
        report = DataReport(tuple(NAMES), dict(train=SplitReport('train', read=1, kept=1)))
        report.plot(str(tmp_path / 'labels.png'))
    assert '<b>x</b>' not in page
    for name in ('$x$', '$\\foo$', 'a &amp; b', '日本', '_under', 'y' * 29, '{x}', '%s', 'é'):
        assert len(re.findall(f'<text[^>]*>[^<]*{re.escape(name)}', page)), name
    assert (tmp_path / 'labels.png').stat().st_size > 5000


def test_memory_is_bounded():
    """Of more images than may be looked at every n-th one is, in whatever order the classes come."""
    evaluator = ClassificationEvaluator(['a', 'b'], None, 100, most=10)
    evaluator.add([labelled([0.9, 0.1], [int(i >= 50)]) for i in range(100)])
    result = evaluator.summary()
    assert result.images == 10 and result.confusion.counts.tolist() == [[5, 0], [5, 0]]
    assert result.remarks == ['Every 10th image of the evaluation was looked at.']


def test_chosen_images():
    picked = chosen({image: image / 10 for image in range(10)})
    assert [image for kind, image in picked if kind == 'best'] == [9, 8, 7]
    assert [image for kind, image in picked if kind == 'worst'] == [0, 1, 2]
    others = [image for kind, image in picked if kind == 'random']
    assert len(others) == 3 and set(others) <= {3, 4, 5, 6}
    assert chosen({4: 1.0}) == [('best', 4)]


def test_results_of_a_resumed_run(tmp_path):
    """Of the evaluations of the run that was stopped, those up to the iteration from which it goes on stay."""
    file = tmp_path / 'results.csv'
    assert read_results(file, 10) == []
    file.write_text('iteration,epoch,time,mIoU\n10,1,2026-01-01T00:00:00,30.5\n20,2,2026-01-01T00:10:00,\n30,3,x,40\n')
    assert read_results(file, 20) == [
        dict(iteration=10, epoch=1, time='2026-01-01T00:00:00', mIoU=30.5),
        dict(iteration=20, epoch=2, time='2026-01-01T00:10:00'),
    ]


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['iteration', 'aAcc', 'mIoU', 'class/mIoU/IoU'], 'mIoU'),
        (['coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP'], 'coco/segm_mAP'),
        (['time', 'score'], 'score'),
        (['iteration'], None),
    ],
)
def test_main_metric(names, expected):
    assert main_metric(names) == expected


def rows_of(file) -> list[dict]:
    with file.open(newline='') as lines:
        return list(csv.DictReader(lines))


def check_page(folder, prefix='') -> str:
    """The page has charts and pictures and needs no other file."""
    text = (folder / f'{prefix}report.html').read_text()
    addresses = re.findall(r'(?:src|href)="([^#"][^"]*)"', text)
    assert addresses and all(re.match('data:image/(jpeg|png);base64,', address) for address in addresses)
    assert '<script' not in text and '@import' not in text and 'url(http' not in text
    assert '#010203' not in text and 'currentColor' in text
    return text


def test_a_detector_writes_its_page(drawn_charts, detector_config, tool, tmp_path):
    """One epoch, by the tool: every evaluation is in the table with its metrics and the scores of each class."""
    detector_config.merge_from_dict({'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1})
    detector_config.custom_hooks = []
    detector_config.train_dataloader.dataset.indices = 2
    detector_config.dump(tmp_path / 'mine.py')
    status, out, err = tool('train.py', str(tmp_path / 'mine.py'), '--work-dir', str(tmp_path / 'work <1>'))
    assert status == 0, err
    text = check_page(tmp_path / 'work <1>')
    assert '<h1>mine</h1>' in text and 'Training has ended.' in text and 'work &lt;1&gt;' in text and '<1>' not in text
    assert 'python' in text and '--work-dir &#x27;' in text
    assert 'method (Mona)' in text and '.delta.safetensors' in text and 'largest memory' in text
    assert all(f'<td>{name}</td>' in text for name in ('disc', 'square', 'triangle', 'star'))
    (row,) = rows_of(tmp_path / 'work <1>/results.csv')
    assert row['iteration'] == '2' and float(row['coco/bbox_mAP']) >= 0
    assert any(name.startswith('class/') for name in row)


@pytest.mark.parametrize('make', [pytest.param(classifier, marks=pytest.mark.slow), segmentor])
def test_a_config_of_four_lines_gets_everything(drawn_charts, make, tool, tmp_path):
    """A config without any of our bases, trained by the tool: what trains, the check of frozen weights, deltas, safe
    checkpoints and the page; a terminal of at most 40 lines before the first line of training; and a test's page."""
    config, work = make(tmp_path), tmp_path / 'work'
    status, out, err = tool('train.py', str(config), '--work-dir', str(work))
    assert status == 0, err
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if 'Epoch(train)' in line)
    assert first <= 40, out
    assert 'What trains:' in out and 'method (Mona)' in out and 'unchanged, bit for bit' in out
    whole = next(work.glob('*/2*.log')).read_text()
    assert 'Config:' in whole and 'System environment:' in whole and 'Hooks will be executed' in whole
    assert (work / 'epoch_2.delta.safetensors').is_file() and not list(work.glob('*.partial'))
    assert len(rows_of(work / 'results.csv')) == 2
    check_page(work)
    status, out, err = tool('test.py', str(config), str(work / 'epoch_2.pth'), '--work-dir', str(work))
    assert status == 0, err
    assert 'Tested' in check_page(work, 'test_')
    metric = main_metric(rows_of(work / 'results.csv')[0])
    assert float(rows_of(work / 'test_results.csv')[0][metric]) == pytest.approx(
        float(rows_of(work / 'results.csv')[1][metric]), abs=1e-3
    )


def test_a_page_never_stops_a_run(make_runner, tmp_path):
    """A work dir in which the page cannot be written: one warning, and training ends as without the hook."""
    work = tmp_path / 'work'
    (work / 'results.csv').mkdir(parents=True)
    runner = make_runner(mona_swin(), hooks=[dict(type='mona_mm.RunReportHook')])
    runner.train()
    assert runner.iter == 2
    log = log_of(runner)
    assert log.count('The page of the run is no longer written: ConfigError') == 1
    assert not (work / 'report.html').exists()


def test_a_model_that_predicts_something_else_has_a_page(drawn_charts, make_runner, tmp_path):
    """Without boxes, label maps or scores there are still the curves and the metrics."""
    runner = make_runner(mona_swin(), hooks=[dict(type='mona_mm.RunReportHook')])
    runner.train()
    text = (tmp_path / 'work/report.html').read_text()
    assert 'training losses' in text and 'What trains' in text and 'Classes' not in text


def names(cfg: Config) -> list[str]:
    return [hook['type'].rpartition('.')[2] for hook in cfg.custom_hooks]


OURS = ['ParamFreezeHook', 'LoadCheckHook', 'DeltaCheckpointHook', 'IterationSeedHook']
OF_ALL = ['FiniteLossHook', 'ResumptionHook', 'ClockHook', 'WorkDirHook', 'RunReportHook', 'PreemptionHook']


def test_hooks_are_added_once():
    ours = dict(model=dict(type='X', backbone=dict(type='PeftBackbone', base=dict(type='Y'))))
    cfg = Config(dict(ours, custom_hooks=[dict(type='EMAHook'), dict(type='ParamFreezeHook', trainable='neck')]))
    add_hooks(cfg)
    assert names(cfg) == ['EMAHook', *OURS, *OF_ALL] and cfg.custom_hooks[1].trainable == 'neck'
    assert cfg.default_hooks.checkpoint == dict(type='mona_mm.SafeCheckpointHook', interval=1)
    before = json.dumps(cfg.to_dict())
    add_hooks(cfg)
    assert json.dumps(cfg.to_dict()) == before


def test_hooks_of_other_models():
    """A stock model gets the hooks of every run; files that are not local keep their checkpoint hook."""
    cfg = Config(dict(model=dict(type='X', backbone=dict(type='SwinTransformer'))))
    add_hooks(cfg)
    assert names(cfg) == OF_ALL and 'default_hooks' not in cfg
    remote = dict(type='CheckpointHook', interval=2, backend_args=dict(backend='petrel'))
    cfg = Config(dict(model=dict(type='mona_mm.PeftModel', base={}), default_hooks=dict(checkpoint=remote)))
    add_hooks(cfg)
    assert cfg.default_hooks.checkpoint == remote and names(cfg) == [*OURS, *OF_ALL]


def test_own_runs_beside_each_other(tmp_path):
    """The best first, runs of one metric and of the same classes together."""
    made = dict(
        a=('iteration,seconds,mIoU,class/cat/IoU\n10,60,30,0.3\n20,3700,28,0.28\n', '1,234'),
        b=('iteration,seconds,mIoU,class/cat/IoU\n10,50,45.5,0.4\n', '5'),
        c=('iteration,coco/bbox_mAP\n7,0.25\n', None),
    )
    for name, (table, trained) in made.items():
        (tmp_path / name / 'stamp').mkdir(parents=True)
        (tmp_path / name / 'results.csv').write_text(table)
        if trained:
            log = f'trainable in the backbone: {trained} = 1.00% of the base'
            (tmp_path / name / 'stamp/stamp.log').write_text(log)
    (tmp_path / 'a/iter_20.delta.safetensors').write_bytes(bytes(1_500_000))
    lines = render_own_runs(find_own_runs([tmp_path])).splitlines()
    assert lines[0] == 'Runs on 1 classes (cat)' and lines[1].split()[:3] == ['run', 'best', 'mIoU']
    cells = [re.split('  +', line.strip()) for line in lines]
    assert cells[2] == [str(tmp_path / 'b'), '45.5', '10', '45.5', '5', '-', '0:00:50']
    assert cells[3] == [str(tmp_path / 'a'), '30', '10', '28', '1,234', '1.5', '1:01:40']
    assert cells[7] == [str(tmp_path / 'c'), '0.25', '7', '0.25', '-', '-', '-']
