"""--data: a folder in each layout becomes data sets, classes and evaluators of a config, and trains."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path

import mmcv
import numpy as np
import pytest
from conftest import ROOT, real_images
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from own_folders import (
    CLASSES,
    CONFIGS,
    MAKERS,
    NARROW,
    NARROW_MASKS,
    SIZE,
    TASKS,
    coco_content,
    edit_json,
    image,
    label_map,
    make_coco,
    make_folders,
    make_masks,
    make_voc,
    make_yolo,
    write_json,
    write_map,
    xml_text,
)
from PIL import Image

from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.config.own_data import use_data
from mona_mm.data_check.check import check_data
from mona_mm.errors import WorkDirError
from mona_mm.own_data.splits import stratify
from mona_mm.reliability.lock_work_dir import WorkDirLock

SCOPES = dict(boxes='mmdet', maps='mmseg', labels='mmpretrain')


@pytest.fixture(scope='module')
def configs():
    return {task: load_config(str(ROOT / file)) for task, file in CONFIGS.items()}


@pytest.fixture
def use(configs, tmp_path):
    """Set a config to a folder and check it; return the config and the report."""

    def run(root, task='boxes', **options):
        cfg = copy.deepcopy(configs[task])
        use_data(cfg, dict(folder=str(root), **options), str(tmp_path / 'work'))
        return cfg, check_data(cfg, ('train', 'val', 'test'))

    return run


def built(cfg: Config, split: str, pipeline: bool = False):
    """A data set of a config as the library builds it, by default without its pipeline."""
    init_default_scope(cfg.default_scope)
    dataset = cfg[f'{split}_dataloader'].dataset
    return DATASETS.build(dataset if pipeline else {**dataset, 'pipeline': []})


def samples(cfg: Config, *splits: str) -> list[dict]:
    """What the library reads of some splits, in order of the file names."""
    datasets = [built(cfg, split) for split in splits or ('train', 'val')]
    found = [dataset.get_data_info(i) for dataset in datasets for i in range(len(dataset))]
    return sorted(found, key=lambda info: info['img_path'])


def content(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob('*')
        if path.is_file()
    }


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', MAKERS)
def test_layout(layout, use, tmp_path):
    """Every layout: classes and objects as they are, all that depends on the classes set, the folder left as it was."""
    root, task = MAKERS[layout](tmp_path / 'data'), TASKS[layout]
    before = content(root)
    cfg, report = use(root, task)
    assert content(root) == before
    classes = ('class 0', 'class 1', 'class 2') if layout == 'masks' else CLASSES
    assert report.classes == classes and not report.warning_lines()
    infos = samples(cfg)
    assert len(infos) == dict(yolo=8, folders=10).get(layout, 6)
    assert all(Path(info['img_path']).is_relative_to(root) for info in infos)
    text = json.dumps(cfg.model.to_dict(), default=str)
    assert f'"num_classes": {len(classes)}' in text and '"num_classes": 80' not in text
    if task == 'boxes':
        first, second = infos[0]['instances'], next(i['instances'] for i in infos if len(i['instances']) == 2)
        box = (8, 6, 24, 22) if layout != 'yolo' else (18, 9, 30, 27)
        assert first[0]['bbox'] == pytest.approx(box)
        assert [i['bbox_label'] for i in second] == [0, 1]
        has_masks = layout in ('coco', 'labelme')
        assert (cfg.model.roi_head.mask_head is not None) == has_masks
        assert cfg.val_evaluator.metric == (['bbox', 'segm'] if has_masks else 'bbox')
    if task == 'maps':
        assert np.array_equal(np.unique(np.array(Image.open(infos[0]['seg_map_path']))), [0, 1, 2])
    if task == 'labels':
        assert sorted(info['gt_label'] for info in infos) == [0] * 5 + [1] * 5
        assert all(Path(i['img_path']).parent.name == CLASSES[i['gt_label']] for i in infos)
    lines = report.lines('file')
    assert len(lines) <= 15 and any(line.startswith(('cat', 'class 1')) for line in lines)


def test_polygons_are_masks(use, tmp_path):
    """YOLO's and LabelMe's polygons, and boxes from masks alone."""
    root = make_yolo(tmp_path / 'data')
    for file in root.rglob('*.txt'):
        file.write_text('1 0.25 0.25 0.75 0.25 0.5 0.75\n')
    cfg, _ = use(root)
    (instance,) = samples(cfg)[0]['instances']
    assert instance['bbox'] == pytest.approx([12, 9, 36, 27]) and instance['mask'] == [[12, 9, 36, 9, 24, 27]]
    assert cfg.model.roi_head.mask_head.num_classes == 2


def test_objects_for_a_segmentor(use, tmp_path):
    """Label maps are drawn from polygons, with the background as the first class."""
    cfg, report = use(MAKERS['labelme'](tmp_path / 'data'), 'maps')
    assert report.classes == ('background', 'cat', 'dog')
    drawn = np.array(Image.open(samples(cfg)[0]['seg_map_path']))
    assert drawn.shape == (SIZE[1], SIZE[0]) and 220 <= (drawn == 1).sum() <= 300
    assert (drawn[:5] == 0).all()


# What is odd and good ------------------------------------------------------------------------------------------------


def boxes_of(infos):
    return [[round(v) for v in instance['bbox']] for info in infos for instance in info['instances']]


def odd_modes(root):
    """Grey, transparent, CMYK, palette, 16 bits, other kinds of files."""
    names = ['0.jpg', '1.png', '2.jpg', '3.png', '4.png', '5.tif', '6.webp', '7.bmp', '8.JPG', '9.gif']
    modes = ['L', 'RGBA', 'CMYK', 'P', 'I;16', 'RGB', 'RGB', 'RGB', 'RGB', 'P']
    for name, mode in zip(names, modes, strict=True):
        image(root / 'images' / name, mode='RGB' if mode == 'I;16' else mode)
    deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])
    Image.fromarray(deep).save(root / 'images/4.png')
    write_json(root / 'labels.json', coco_content(names))


def test_images_of_every_kind(use, tmp_path):
    """Each is read by the pipeline as three channels of 8 bits, close to what Pillow makes of it."""
    root = tmp_path / 'data'
    odd_modes(root)
    cfg, report = use(root)
    assert report.warning_lines() == [
        'warning: 1 images have 16 bits a channel (images/4.png); read as 8 bits, divided by 256'
    ]
    infos = samples(cfg)
    assert len(infos) == 10
    for info in infos:
        loaded = mmcv.imread(info['img_path'])
        assert loaded.shape == (SIZE[1], SIZE[0], 3) and loaded.dtype == np.uint8
        with Image.open(info['img_path']) as file:
            if file.mode.startswith('I'):
                expected = np.repeat((np.array(file) >> 8)[..., None], 3, axis=2)
            else:
                expected = np.array(file.convert('RGB'))[..., ::-1]
        assert np.abs(loaded.astype(int) - expected).mean() < 12, info['img_path']


@pytest.mark.parametrize('annotated', ['turned', 'stored'])
def test_rotation_in_exif(annotated, use, tmp_path):
    """Boxes of an image with a rotation in its EXIF data fit what the pipeline loads, whichever frame they are in."""
    root = tmp_path / 'data'
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        image(root / f'{i}.jpg', exif=exif)
    size = SIZE if annotated == 'stored' else SIZE[::-1]
    write_json(root / 'x.json', coco_content([f'{i}.jpg' for i in range(4)], size))
    cfg, report = use(root)
    assert any('rotation in their EXIF data' in note for note in report.notes) == (annotated == 'stored')
    dataset = built(cfg, 'train', pipeline=True)
    step = dataset.pipeline.transforms[0]
    loaded = step(dict(img_path=dataset.get_data_info(0)['img_path']))
    info = dataset.get_data_info(0)
    assert loaded['img_shape'] == (info['height'], info['width']) == size[::-1]


def tiny(root):
    names = [image(root / f'{i}.png', (9, 7)).name for i in range(4)]
    entry = coco_content(names, (9, 7), masks=False)
    for annotation in entry['annotations']:
        annotation['bbox'] = [1, 1, 5, 5]
    write_json(root / 'x.json', entry)


def huge(root):
    make_coco(root)
    Image.new('1', (10000, 10100)).save(root / 'images/0.jpg', 'PNG')
    edit_json(root / 'annotations/all.json', lambda c: c['images'][0].update(width=10000, height=10100))


def nested(root):
    """Folders, a space, another system's separator, ids that are text, a byte order mark, unused categories."""
    names = ['a b/x.jpg', 'c/x.jpg', 'c\\y.jpg', 'z.jpg']
    for name in names:
        image(root / 'pictures' / name.replace('\\', '/'))
    entry = coco_content(names)
    for each in entry['images']:
        each['id'] = f'no {each["id"]}'
    for each in entry['annotations']:
        each['image_id'] = f'no {each["image_id"]}'
    entry['categories'].append(dict(id=90, name='cow'))
    (root / 'my labels.json').write_text(json.dumps(entry), encoding='utf-8-sig')


def roboflow(root):
    """A file in the folder of each split, and a first category above the others."""
    for split in ('train', 'valid', 'test'):
        names = [f'{split}{i}.jpg' for i in range(2)]
        for name in names:
            image(root / split / name)
        entry = coco_content(names)
        entry['categories'] = [dict(id=0, name='pets'), *({**c, 'supercategory': 'pets'} for c in entry['categories'])]
        write_json(root / split / '_annotations.coco.json', entry)


def crowds(root):
    make_coco(root)
    mask = dict(size=[SIZE[1], SIZE[0]], counts=[100, 50, SIZE[0] * SIZE[1] - 150])
    change = lambda c: c['annotations'][0].update(iscrowd=1, segmentation=mask)  # noqa: E731
    edit_json(root / 'annotations/all.json', change)


def voc_sets(root):
    """The devkit's folders, with lists, names with spaces and digits as classes."""
    for name in ('my image 1', 'ali (1)', 'c', 'd'):
        image(root / f'VOC2007/JPEGImages/{name}.jpg')
        file = root / f'VOC2007/Annotations/{name}.xml'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(xml_text(f'{name}.jpg', [('10', 9, 7, 25, 23), ('9', 9, 7, 25, 23)]))
    sets = root / 'VOC2007/ImageSets/Main'
    sets.mkdir(parents=True)
    (sets / 'trainval.txt').write_text('my image 1\nali (1)\n')
    (sets / 'test.txt').write_text('c\nd\n')


def darknet(root):
    """Labels beside the images, names of classes in classes.txt, no yaml; one image without labels."""
    for i in range(4):
        image(root / f'{i}.png')
        (root / f'{i}.txt').write_text('1 0.5 0.5 0.5 0.5\n')
    image(root / 'empty.png')
    (root / 'classes.txt').write_text('cat\ndog\n')


ODD_BOXES = {
    'tiny': (tiny, CLASSES, 6),
    'huge': (huge, CLASSES, 9),
    'nested': (nested, (*CLASSES, 'cow'), 6),
    'roboflow': (roboflow, CLASSES, 6),
    'crowds': (crowds, CLASSES, 9),
    'voc_sets': (voc_sets, ('9', '10'), 4),
    'darknet': (darknet, CLASSES, 4),
}


@pytest.mark.parametrize('name', ODD_BOXES)
def test_odd_boxes(name, use, tmp_path):
    """Unusual and right: all classes and objects are there, and every image is found."""
    make, classes, count = ODD_BOXES[name]
    make(tmp_path / 'data')
    cfg, report = use(tmp_path / 'data', val=0.5)
    assert report.classes == classes
    splits = ('train', 'val', 'test') if name == 'roboflow' else ('train', 'val')
    infos = samples(cfg, *splits)
    found = [instance for info in infos for instance in info['instances']]
    if name == 'roboflow':
        assert len(infos) == 6 and len(found) == 9
    elif name == 'voc_sets':
        assert len(infos) == 2 and len(samples(cfg, 'test')) == 2 and len(found) == count
    else:
        assert len(found) == count
    assert sum(instance['ignore_flag'] for instance in found) == (name == 'crowds')
    if name == 'huge':
        assert 'more than 100 million pixels' in report.warning_lines()[0]


def palette_png(root):
    make_masks(root)
    for path in (root / 'masks').iterdir():
        picture = Image.fromarray(np.array(label_map(0, 1, 2)), 'P')
        picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
        picture.save(path)


def colours(root):
    make_masks(root)
    table = np.array([(0, 0, 0), (200, 0, 0), (0, 0, 200)], np.uint8)
    for path in (root / 'masks').iterdir():
        Image.fromarray(table[label_map(0, 1, 2)]).save(path)
    (root / 'classes.txt').write_text('sky 0 0 0\nbig car 200 0 0\nroad 0 0 200\n')


def soft(root):
    make_masks(root)
    for i, path in enumerate(sorted((root / 'masks').iterdir())):
        content = label_map(0, 255)
        edge = np.random.default_rng(i).integers(0, 256, (SIZE[1], 3))
        content[:, 23:26] = np.sort(edge, axis=1)
        write_map(path, content)


def from_one(root):
    make_masks(root, values=(0, 1, 2))
    (root / 'classes.txt').write_text('road\ncar\n')


def beside(root):
    """Images and label maps in one folder, told apart by the ends of their names."""
    for i in range(4):
        image(root / f'{i}.jpg')
        write_map(root / f'{i}_mask.png', label_map(0, 1))


def segnet(root):
    for split in ('train', 'val', 'test'):
        for i in range(3):
            image(root / split / f'{split}{i}.png')
            write_map(root / f'{split}annot' / f'{split}{i}.png', label_map(0, 4, 255))


ODD_MAPS = {
    'palette_png': (palette_png, ('class 0', 'class 1', 'class 2'), {0, 1, 2}),
    'colours': (colours, ('sky', 'big car', 'road'), {0, 1, 2}),
    'binary': (lambda root: make_masks(root, values=(0, 255)), ('background', 'foreground'), {0, 1}),
    'soft': (soft, ('background', 'foreground'), {0, 1}),
    'from_one': (from_one, ('road', 'car'), {0, 1, 255}),
    'beside': (beside, ('background', 'foreground'), {0, 1}),
    'segnet': (segnet, ('class 0', 'class 4'), {0, 1, 255}),
}


@pytest.mark.parametrize('name', ODD_MAPS)
def test_odd_maps(name, use, tmp_path):
    """Label maps of every kind hold the numbers of the classes, or 255, where they had the values before."""
    make, classes, values = ODD_MAPS[name]
    make(tmp_path / 'data')
    cfg, report = use(tmp_path / 'data', 'maps')
    assert report.classes == classes and cfg.model.decode_head.num_classes == len(classes)
    for info in samples(cfg):
        content = np.array(Image.open(info['seg_map_path']))
        assert set(np.unique(content).tolist()) == values and content.shape == SIZE[::-1]
        if name == 'colours':
            assert np.array_equal(content, label_map(0, 1, 2))
    assert not report.warning_lines()
    if name == 'segnet':
        assert [len(samples(cfg, split)) for split in ('train', 'val', 'test')] == [3, 3, 3]


# Splits --------------------------------------------------------------------------------------------------------------


def hold_lock(folder: str, held, release) -> None:
    with WorkDirLock(folder):
        held.set()
        release.wait(60)


def test_data_of_a_run_are_not_written_over(tmp_path):
    """A run reads its label maps while it trains. Who asks for other data in its work dir is refused, who asks for the
    same gets them, and when it is over others may be written."""
    root, work = make_masks(tmp_path / 'data'), tmp_path / 'work'
    config = str(ROOT / CONFIGS['maps'])

    def read(seed: int):
        return load_config(config, {'data.seed': seed}, str(root), str(work))

    read(0)
    before = {file: file.read_bytes() for file in (work / 'data').rglob('*') if file.is_file()}
    context = multiprocessing.get_context('fork')
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold_lock, args=(str(work), held, release))
    process.start()
    assert held.wait(30)
    try:
        read(0)
        with pytest.raises(WorkDirError, match=rf'Another run uses this work dir \(process {process.pid} on '):
            read(1)
        assert before == {file: file.read_bytes() for file in (work / 'data').rglob('*') if file.is_file()}
    finally:
        release.set()
        process.join()
    read(1)
    assert json.loads((work / 'data/record.json').read_text())['key']['seed'] == 1


def test_split_is_stated_and_repeats(use, tmp_path):
    """The same seed gives the same split, another one another; the report says which."""
    root = make_coco(tmp_path / 'data', 20)
    first = [info['img_path'] for info in samples(use(root)[0], 'val')]
    (tmp_path / 'work/data/record.json').unlink()
    cfg, report = use(root)
    assert [info['img_path'] for info in samples(cfg, 'val')] == first and len(first) == 4
    assert any('split drawn from 20 images: 20% val' in note and 'seed 0' in note for note in report.notes)
    cfg, _ = use(root, seed=1, val=0.3, test=0.2)
    counts = [len(samples(cfg, split)) for split in ('train', 'val', 'test')]
    assert counts == [10, 6, 4]
    paths = [{info['img_path'] for info in samples(cfg, split)} for split in ('train', 'val', 'test')]
    assert not paths[0] & paths[1] and not paths[0] & paths[2] and not paths[1] & paths[2]


def test_stratified():
    """Every class has its share on each side, the rare ones first; a class of one image stays in training."""
    labels = [{0}] * 60 + [{0, 1}] * 30 + [{2}] * 5 + [{3}] + [set()] * 4
    chosen = stratify(labels, [1] * len(labels), dict(val=0.2), seed=0)
    val = [labels[i] for i, split in enumerate(chosen) if split == 'val']
    assert 19 <= len(val) <= 21
    assert [sum(k in each for each in val) for k in range(4)] == [18, 6, 1, 0]
    for share in (0.01, 0.99):
        assert set(stratify([{0}] * 3, [1] * 3, dict(val=share), seed=0)) == {'train', 'val'}


def test_equal_images_stay_on_one_side(use, tmp_path):
    """Copies under other names are found by their content, named, and kept together."""
    root = make_voc(tmp_path / 'data', 8)
    for i in range(5):
        shutil.copy(root / '1.jpg', root / f'copy{i}.jpg')
        shutil.copy(root / '1.xml', root / f'copy{i}.xml')
    cfg, report = use(root)
    names = {Path(info['img_path']).name for info in samples(cfg, 'val')}
    copies = {'1.jpg', *(f'copy{i}.jpg' for i in range(5))}
    assert names & copies in (set(), copies)
    assert 'groups of images have equal content' in report.warning_lines()[0]


def test_equal_images_in_given_splits_are_named(use, tmp_path):
    root = make_yolo(tmp_path / 'data')
    shutil.copy(root / 'train/images/1.jpg', root / 'valid/images/1.jpg')
    _, report = use(root)
    (line,) = report.warning_lines()
    assert 'images are in train and val alike' in line and 'train/images/1.jpg = valid/images/1.jpg' in line


def test_one_image_in_two_files(use, tmp_path):
    """Files of one class each are joined; an image that a list has on both sides is named."""
    root = make_coco(tmp_path / 'data')
    file = root / 'annotations/all.json'
    content = json.loads(file.read_text())
    for label, name in ((3, 'cats'), (7, 'dogs')):
        chosen = [a for a in content['annotations'] if a['category_id'] == label]
        write_json(file.with_name(f'{name}.json'), {**content, 'annotations': chosen})
    file.unlink()
    cfg, report = use(root)
    assert not report.warning_lines() and len(samples(cfg)) == 6
    assert sum(len(info['instances']) for info in samples(cfg)) == 9
    root = make_yolo(tmp_path / 'yolo')
    shutil.rmtree(tmp_path / 'work')
    (root / 'data.yaml').write_text('train: train/images\nval: train/images\nnames: [cat, dog]\n')
    _, report = use(root)
    assert any('4 images are in train and val alike (first: train/images/0.jpg)' in w for w in report.warning_lines())


# The config ----------------------------------------------------------------------------------------------------------


def test_options(use, tmp_path, configs):
    """Classes may be chosen and ordered; --data stands in a config as well; the same files are read once."""
    root = make_coco(tmp_path / 'data')
    file = tmp_path / 'mine.py'
    file.write_text(f"_base_ = ['{ROOT / CONFIGS['boxes']}']\ndata = dict(folder='{root}', val=0.5)\n")
    cfg = load_config(str(file), {'classes': ['dog'], 'data.seed': 3, 'work_dir': str(tmp_path / 'w')})
    assert cfg.train_dataloader.dataset.metainfo.classes == ('dog',) and cfg.own_data.seed == 3
    assert 'data' not in cfg and cfg.model.roi_head.bbox_head.num_classes == 1
    report = check_data(cfg, ('train', 'val'))
    assert report.warning_lines() == ['warning: 6 objects are of classes that are not chosen; dropped']
    record = tmp_path / 'w/data/record.json'
    before = record.stat().st_mtime_ns
    load_config(str(file), {'classes': ['dog'], 'data.seed': 3, 'work_dir': str(tmp_path / 'w')})
    assert record.stat().st_mtime_ns == before
    image(root / 'images/new.jpg')
    load_config(str(file), {'classes': ['dog'], 'data.seed': 3, 'work_dir': str(tmp_path / 'w')})
    assert record.stat().st_mtime_ns != before


@pytest.mark.parametrize('name', ['retinanet_swin_l_voc', 'cascade_swin_b_coco', 'swin_l_flowers102'])
def test_published_configs(name, tmp_path):
    """Any config of the task: wrappers of data sets stay, evaluators, scores and ranks fit."""
    root = (make_folders if 'flowers' in name else make_coco)(tmp_path / 'data')
    cfg = load_config(str(ROOT / f'configs/mona/{name}.py'), {}, str(root), str(tmp_path / 'work'))
    check_data(cfg, ('train', 'val', 'test'))
    text = json.dumps(cfg.model.to_dict(), default=str)
    assert '"num_classes": 2' in text and '"num_classes": 80' not in text and '"num_classes": 20' not in text
    if name == 'retinanet_swin_l_voc':
        dataset = cfg.train_dataloader.dataset
        assert dataset.type == 'RepeatDataset' and dataset.times == 3 and dataset.dataset.type == 'mmdet.CocoDataset'
        assert cfg.val_evaluator.type == 'mmdet.CocoMetric'
        assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    if name == 'swin_l_flowers102':
        assert cfg.model.head.topk == (1,) and cfg.val_evaluator.topk == (1,)


def test_count_params(tool, tmp_path):
    """The tools that need no data take the classes of a folder, and write nothing."""
    root = make_coco(tmp_path / 'data')
    config = ['configs/custom/custom_retinanet_swin_t.py', '--json', '--cfg-options', f'work_dir={tmp_path / "work"}']
    totals = []
    for options in ([], ['--data', str(root)]):
        status, out, error = tool('count_params.py', *config, *options)
        assert status == 0, error
        totals.append(json.loads(out[out.index('[') :])[0]['total'])
    assert totals[0] - totals[1] == 9 * 78 * (256 * 9 + 1)  # nine anchors, 80 classes and 2
    assert not (tmp_path / 'work').exists()


def narrow(layout: str, root: Path, work: Path, name: str | None = None) -> Config:
    """A small model set to a folder."""
    name = name or Path(CONFIGS[TASKS[layout]]).stem
    masks = NARROW_MASKS if name == 'custom_mask_rcnn_swin_t' and layout in ('coco', 'labelme') else {}
    options = copy.deepcopy({**NARROW[name], **masks, 'work_dir': str(work)})
    cfg = load_config(str(ROOT / f'configs/custom/{name}.py'), options, str(root))
    cfg.experiment_name = os.urandom(4).hex()
    adapt_to_device(cfg)
    return cfg


def train(cfg: Config) -> dict:
    report = check_data(cfg, ('train', 'val', 'test'))
    report.write(cfg.work_dir)
    runner = build_runner(cfg)
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    return runner.test()


SCORES = dict(boxes='coco/bbox_mAP', maps='mIoU', labels='accuracy/top1')


@pytest.mark.parametrize(
    'layout', ['coco', *(pytest.param(name, marks=pytest.mark.slow) for name in ('voc', 'masks')), 'folders']
)
def test_trains(drawn_charts, layout, tmp_path):
    """A folder, one option, a trained and evaluated model; the config in the work dir does the same by itself."""
    root, work = MAKERS[layout](tmp_path / 'data'), tmp_path / 'work'
    cfg = narrow(layout, root, work)
    scores = train(cfg)
    assert 0 <= scores[SCORES[TASKS[layout]]] <= 100
    assert (work / 'labels.png').stat().st_size > 5000 and 'images' in (work / 'data_report.txt').read_text()
    plain = load_config(str(work / f'{Path(CONFIGS[TASKS[layout]]).stem}.py'))
    assert plain.train_dataloader.dataset == cfg.train_dataloader.dataset and plain.model == cfg.model
    assert check_data(plain, ('train', 'val')).table() == check_data(cfg, ('train', 'val')).table()


REAL = {
    **dict.fromkeys(('coco', 'nuclei', 'formats/labelme'), ('coco', 'custom_mask_rcnn_swin_t')),
    **dict.fromkeys(('VOCdevkit', 'BCCD', 'aquarium', 'craters'), ('voc', 'custom_retinanet_swin_t')),
    **dict.fromkeys(('formats/voc', 'formats/yolo_boxes'), ('voc', 'custom_retinanet_swin_t')),
    'formats/yolo_polygons': ('coco', 'custom_mask_rcnn_swin_t'),
    **dict.fromkeys(('camvid', 'ade', 'formats/masks'), ('masks', 'custom_upernet_swin_t')),
    **dict.fromkeys(('flowers', 'trashnet'), ('folders', 'custom_classifier_dinov2_s')),
}


@pytest.mark.real_images
@pytest.mark.slow
@pytest.mark.parametrize('name', REAL)
def test_trains_on_real_images(name, tmp_path):
    """Every real set and format beside the checkout, in the layout that it has."""
    layout, config = REAL[name]
    cfg = narrow(layout, real_images(name), tmp_path / 'work', config)
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'].dataset.indices = 4
    scores = train(cfg)
    assert SCORES[TASKS[layout]] in scores


@pytest.mark.real_images
def test_bccd_has_three_classes(use):
    cfg, report = use(real_images('BCCD'))
    assert report.classes == ('Platelets', 'RBC', 'WBC') and cfg.val_evaluator.classwise
    assert [report.splits[split].kept for split in ('train', 'val')] == [205, 87]
