"""Predictions of images without annotations, against the libraries' own inferencers; files, names, videos and views."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from tiny_tasks import checkpoint_of, classifier, segmentor, write

from mona_mm.config.load import load_config
from mona_mm.config.tta import library_of, use_tta
from mona_mm.errors import ConfigError, MissingFileError, UserError
from mona_mm.inference.export import normalised_inputs
from mona_mm.inference.predict import load_model, predict
from mona_mm.inference.sources import Source, find_sources
from mona_mm.report.evaluator import ignores_orientation
from mona_mm.report.pictures import read_image
from mona_mm.type_names import enter_scope


def image(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def sources(folder: Path) -> list[Source]:
    """Two images of one name in two folders, two of one name but for the suffix, in sizes of their own."""
    for number, name in enumerate(('a/x.png', 'b/x.png', 'b/y.png', 'b/y.bmp')):
        write(folder / name, image(number, 40 + 8 * (number % 2)))
    return find_sources([str(folder)])


def test_sources(tmp_path):
    """Every file once, with a name of its own, whatever the inputs are; what is nothing is named."""
    assert [source.name for source in sources(tmp_path / 'in')] == ['a/x', 'b/x', 'b/y.bmp', 'b/y.png']
    (tmp_path / 'in/b/notes.txt').write_text('no image')
    (tmp_path / 'in/clip.mp4').write_bytes(b'')
    twice = find_sources([str(tmp_path / 'in/b/*.png'), str(tmp_path / 'in/b/x.png'), str(tmp_path / 'in/clip.mp4')])
    assert [source.name for source in twice] == ['b/x', 'b/y', 'clip'] and twice[-1].is_video
    assert find_sources([str(tmp_path / 'in/a/x.png')])[0].name == 'x'
    write(tmp_path / 'in/out/pictures/x.jpg', image(9))
    left = find_sources([str(tmp_path / 'in'), str(tmp_path / 'in/**')], tmp_path / 'in/out')
    assert [source.name for source in left] == ['a/x', 'b/x', 'b/y.bmp', 'b/y.png', 'clip']
    assert len(find_sources([str(tmp_path / 'in/out/pictures')], tmp_path / 'in/out')) == 1
    with pytest.raises(MissingFileError, match='nowhere/\\*.png: there are no images'):
        find_sources([str(tmp_path / 'nowhere/*.png')])
    with pytest.raises(UserError, match='notes.txt is neither an image'):
        find_sources([str(tmp_path / 'in/b/notes.txt')])


@pytest.mark.parametrize('make', [classifier, segmentor])
def test_batches_do_not_change_predictions(make, tmp_path):
    """Images of several sizes one by one and four at a time; a damaged one is named and costs nothing else."""
    config = make(tmp_path)
    loaded = load_model(load_config(str(config)), str(checkpoint_of(config)))
    assert loaded.classes == ['x', 'y', 'z']
    found = sources(tmp_path / 'in')
    (tmp_path / 'in/bad.png').write_bytes(b'no image')
    found.append(Source(str(tmp_path / 'in/bad.png'), 'bad'))

    def run(batch):
        items = {item.name: item for item in predict(loaded, found, batch)}
        assert items.pop('bad').error
        return {name: item.sample for name, item in items.items()}

    alone, together = run(1), run(4)
    assert set(alone) == set(together) == {'a/x', 'b/x', 'b/y.bmp', 'b/y.png'}
    for name, sample in alone.items():
        for field in ('pred_score', 'seg_logits'):
            if field in sample:
                one, other = (getattr(s, field) for s in (sample, together[name]))
                one, other = (x if isinstance(x, torch.Tensor) else x.data for x in (one, other))
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len({str(sample.get('pred_score', sample.get('seg_logits'))) for sample in alone.values()}) == 4


def test_a_classifier_predicts(tool, tmp_path):
    """By the tool: a table with a row for each image and each frame of a video, and pictures of the same names."""
    config = classifier(tmp_path)
    weights = checkpoint_of(config)
    sources(tmp_path / 'in')
    video = cv2.VideoWriter(str(tmp_path / 'in/clip.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, (48, 40))
    for number in range(5):
        video.write(image(number))
    video.release()
    out = tmp_path / 'out'
    status, printed, err = tool(
        'predict.py', str(config), str(weights), str(tmp_path / 'in'), '--out', str(out), '--batch', '2', '--every', '2'
    )
    assert status == 0, err
    assert '7 images in' in printed and 'images a second' in printed
    pictures = {file.relative_to(out / 'pictures').as_posix() for file in out.rglob('*.jpg')}
    assert pictures == {
        'a/x.jpg', 'b/x.jpg', 'b/y.bmp.jpg', 'b/y.png.jpg',
        'clip/000000.jpg', 'clip/000002.jpg', 'clip/000004.jpg',
    }  # fmt: skip
    with (out / 'predictions.csv').open(newline='') as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 7 and {row['class'] for row in rows} <= {'x', 'y', 'z'}
    assert all(row['best'].startswith(f'{row["class"]} {row["score"]}') for row in rows)


def test_a_segmentor_predicts(tool, tmp_path):
    """Label maps of the size of the images, and 255 where a class is less sure than the least score."""
    config = segmentor(tmp_path)
    weights = checkpoint_of(config)
    sources(tmp_path / 'in')
    arguments = ['predict.py', str(config), str(weights), str(tmp_path / 'in/b'), '--no-pictures']
    status, _, err = tool(*arguments, '--out', str(tmp_path / 'all'))
    assert status == 0, err
    status, _, err = tool(*arguments, '--out', str(tmp_path / 'sure'), '--score', '1.1')
    assert status == 0, err
    for name in ('x', 'y.bmp', 'y.png'):
        whole, sure = (cv2.imread(str(tmp_path / each / f'masks/{name}.png'), -1) for each in ('all', 'sure'))
        assert whole.shape == image(0, 48 if name != 'y.png' else 40).shape[:2] and set(np.unique(whole)) <= {0, 1, 2}
        assert (sure == 255).all()
    assert (tmp_path / 'all/classes.txt').read_text() == '0 x\n1 y\n2 z\n'
    assert not (tmp_path / 'all/pictures').exists()


@pytest.mark.slow
def test_a_detector_predicts_as_its_inferencer(detector_config, demo_data, tool, tmp_path):
    """Boxes, scores and masks are those of mmdet's DetInferencer on the same file."""
    config = tmp_path / 'mine.py'
    detector_config.custom_hooks = []
    detector_config.model.test_cfg.rcnn.score_thr = 0.0
    detector_config.dump(config)
    weights = checkpoint_of(config)
    images = sorted(demo_data.glob('val2017/*'))
    status, out, err = tool(
        'predict.py', str(config), str(weights), *map(str, images), '--out', str(tmp_path / 'out'), '--score', '0.05'
    )
    assert status == 0, err
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    inferencer = DetInferencer(str(config), str(weights), device='cpu', show_progress=False)
    expected = inferencer([str(file) for file in images], return_datasamples=True)['predictions']
    assert [entry['file_name'] for entry in content['images']] == list(map(str, images))
    count = 0
    for entry, sample in zip(content['images'], expected, strict=True):
        own = [a for a in content['annotations'] if a['image_id'] == entry['id']]
        kept = sample.pred_instances[sample.pred_instances.scores >= 0.05]
        assert [a['category_id'] - 1 for a in own] == kept.labels.tolist()
        np.testing.assert_allclose([a['score'] for a in own], kept.scores.numpy(), atol=1e-4)
        corners = np.array([[*a['bbox'][:2], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]] for a in own])
        np.testing.assert_allclose(corners.reshape(-1, 4), kept.bboxes.numpy(), atol=0.03)
        count += len(own)
    assert count and all('segmentation' in a for a in content['annotations'])
    assert [category['name'] for category in content['categories']] == ['x', 'y', 'z']


@pytest.mark.parametrize('make', [classifier, segmentor])
def test_views_are_merged(make, tmp_path):
    """With test-time augmentation an image and its mirror image get the mirrored prediction of each other, which they
    do not without."""
    config = make(tmp_path)
    weights = checkpoint_of(config)
    write(tmp_path / 'in/a.png', image(5))
    write(tmp_path / 'in/b.png', image(5)[:, ::-1])

    def difference(tta):
        cfg = load_config(str(config))
        if tta:
            use_tta(cfg)
        samples = {
            i.name: i.sample for i in predict(load_model(cfg, str(weights)), find_sources([str(tmp_path / 'in')]))
        }
        if 'pred_score' in samples['a']:
            one, other = (samples[name].pred_score for name in 'ab')
        else:
            one, other = samples['a'].pred_sem_seg.data, samples['b'].pred_sem_seg.data.flip(-1)
            return float((one != other).float().mean())
        return float((one - other).abs().max() / one.abs().max())

    assert difference(tta=True) < 1e-4 < difference(tta=False)


def test_the_truth_of_views(tmp_path):
    """The first view of an image and its label map are unchanged, since they are those that the result is compared
    with; the second is mirrored."""
    cfg = load_config(str(segmentor(tmp_path)))
    enter_scope(cfg)
    plain = DATASETS.build(cfg.test_dataloader.dataset)[0]
    use_tta(cfg)
    views = DATASETS.build(cfg.test_dataloader.dataset)[0]
    assert torch.equal(views['inputs'][0], plain['inputs']) and torch.equal(
        views['inputs'][1], plain['inputs'].flip(-1)
    )
    truth = [sample.gt_sem_seg.data for sample in views['data_samples']]
    assert torch.equal(truth[0], plain['data_samples'].gt_sem_seg.data)
    assert [sample.flip for sample in views['data_samples']] == [False, True]


def test_a_test_with_views(tool, tmp_path):
    """By the tool: the scores are those of the same test in Python."""
    config = segmentor(tmp_path)
    weights, work = checkpoint_of(config), tmp_path / 'work'
    status, out, err = tool('test.py', str(config), str(weights), '--work-dir', str(work), '--tta')
    assert status == 0, err
    cfg = load_config(str(config))
    use_tta(cfg)
    loaded = load_model(cfg, str(weights))
    both = np.zeros((3, 3))
    for item in predict(loaded, find_sources([str(tmp_path / 'images')])):
        truth = cv2.imread(str(tmp_path / f'labels/{item.name}.png'), -1)
        np.add.at(both, (truth, item.sample.pred_sem_seg.data[0].numpy()), 1)
    iou = both.diagonal() / (both.sum(0) + both.sum(1) - both.diagonal())
    with (work / 'test_results.csv').open(newline='') as lines:
        found = float(next(csv.DictReader(lines))['mIoU'])
    assert found == pytest.approx(100 * np.nanmean(iou), abs=0.01)


def test_what_views_cannot_be_merged(detector_config):
    with pytest.raises(ConfigError, match='--tta: mmdet merges boxes, but no masks'):
        use_tta(detector_config)


def test_library_of_a_config():
    detector = dict(type='mmdet.RetinaNet', backbone=dict(type='mmdet.ResNet'))
    assert library_of(Config(dict(model=detector))) == 'mmdet'
    assert library_of(Config(dict(model=dict(type='mona_mm.PeftModel', base=detector)))) == 'mmdet'
    with pytest.raises(ConfigError, match='SmallNothing is a model of none of mmdet'):
        library_of(Config(dict(model=dict(type='SmallNothing', backbone={}))))


def test_inputs_that_cannot_be_read(tool, tmp_path):
    """A JPEG cut short, an empty file and a video that is none are named and left out, and the rest is written; hidden
    files of other systems are no inputs."""
    config = classifier(tmp_path)
    weights = checkpoint_of(config)
    write(tmp_path / 'in/good.jpg', image(0))
    write(tmp_path / 'in/cut.jpg', image(1, 200, 240))
    content = (tmp_path / 'in/cut.jpg').read_bytes()
    (tmp_path / 'in/cut.jpg').write_bytes(content[: len(content) // 2])
    (tmp_path / 'in/empty.png').touch()
    (tmp_path / 'in/clip.mp4').write_bytes(b'no video')
    for name in ('in/._good.jpg', 'in/__MACOSX/good.jpg', 'in/.cache/good.jpg'):
        write(tmp_path / name, image(2))
    out = tmp_path / 'out'
    status, printed, err = tool('predict.py', str(config), str(weights), str(tmp_path / 'in'), '--out', str(out))
    assert status == 0 and '1 images in' in printed and '3 left out' in printed, err
    for name, problem in (('cut.jpg', 'truncated'), ('empty.png', ''), ('clip.mp4', 'no frame of this video')):
        assert any(f'{name} is left out: ' in line and problem in line for line in (printed + err).splitlines())
    with (out / 'predictions.csv').open(newline='') as lines:
        assert [Path(row['image']).name for row in csv.DictReader(lines)] == ['good.jpg']
    status, _, err = tool('predict.py', str(config), str(weights), str(tmp_path / 'in'), '--out', str(config))
    assert status == 2 and 'is a file, not a folder' in err
    loaded = load_model(load_config(str(config)), str(weights))
    with pytest.raises(UserError, match=r'--images: .*cut\.jpg cannot be read: the file is cut short'):
        normalised_inputs(loaded, [str(tmp_path / 'in/cut.jpg')], None)


def test_images_for_an_export(tool, tmp_path, monkeypatch):
    """Videos alone, and a size of nothing."""
    monkeypatch.setattr('mona_mm.inference.export.require_packages', lambda *names: None)
    config = classifier(tmp_path)
    (tmp_path / 'clip.mp4').touch()
    arguments = [
        'export.py',
        str(config),
        str(config),
        str(tmp_path / 'out.onnx'),
        '--images',
        str(tmp_path / 'clip.mp4'),
    ]
    status, _, err = tool(*arguments)
    assert status == 2 and 'these are videos' in err
    status, _, err = tool(*arguments, '--size', '0', '32')
    assert status == 2 and '--size 0 32: height and width must be at least 1' in err


def test_pictures_lie_as_the_pipeline_reads_the_images(tmp_path):
    """With a pipeline that leaves the rotation in EXIF data out, so do the pictures of predictions and of the page."""
    config = classifier(tmp_path)
    weights = str(checkpoint_of(config))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / 'in/turned.jpg'
    file.parent.mkdir()
    Image.fromarray(image(0, 40, 64)).save(file, exif=exif)
    for color_type, shape in (('color', (64, 40, 3)), ('color_ignore_orientation', (40, 64, 3))):
        cfg = load_config(str(config), {'test_dataloader.dataset.pipeline.0.color_type': color_type})
        (item,) = predict(load_model(cfg, weights), find_sources([str(file)]))
        assert item.image().shape == shape == (*item.sample.ori_shape, 3)
        enter_scope(cfg)
        stored = ignores_orientation(DATASETS.build(cfg.test_dataloader.dataset))
        assert stored == (color_type != 'color')
        assert read_image(str(file), shape[1], stored)[0].shape == shape
