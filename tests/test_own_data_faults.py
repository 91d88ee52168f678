"""Broken folders: each fault is named in one line before training, none ends in a traceback or trains in silence."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from own_folders import (
    CONFIGS,
    MAKERS,
    SIZE,
    TASKS,
    edit_json,
    image,
    label_map,
    write_map,
    xml_text,
)

from mona_mm.config.load import load_config
from mona_mm.config.own_data import use_data
from mona_mm.data_check.check import check_data
from mona_mm.errors import UserError

JSON = 'annotations/all.json'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A good folder of each layout, to be copied."""
    root = tmp_path_factory.mktemp('good')
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope='module')
def configs():
    return {task: load_config(str(ROOT / file)) for task, file in CONFIGS.items()}


def coco(change):
    """A change of the COCO file's content."""
    return 'coco', lambda root: edit_json(root / JSON, change)


def first(part, **changes):
    """A change of the first entry of a part of the COCO file: ``key=None`` takes the key out."""

    def change(content):
        for key, value in changes.items():
            content[part][0].pop(key, None)
            if value is not None:
                content[part][0][key] = value

    return coco(change)


def each(part, **changes):
    def change(content):
        for entry in content[part]:
            for key, value in changes.items():
                entry.pop(key, None)
                if value is not None:
                    entry[key] = value

    return coco(change)


def text(layout, file, content):
    """Another content of a text file."""
    return layout, lambda root: (root / file).write_text(content)


def gone(layout, file):
    return layout, lambda root: (root / file).unlink()


def cut(layout, file, part=0.5):
    """A file that ends early."""

    def change(root):
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: int(part * len(content))])

    return layout, change


def maps(*values, file='masks/0.png', **options):
    return 'masks', lambda root: write_map(root / file, label_map(*values, **options))


def noise_map(root):
    for i in range(6):
        random = np.random.default_rng(i)
        write_map(root / f'masks/{i}.png', random.integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8))


def move_labels(root):
    for split in ('train', 'valid'):
        shutil.move(root / split / 'labels', root / f'{split}_txt')


def labelme(change):
    return 'labelme', lambda root: edit_json(root / '0.json', change)


def shape(**changes):
    return labelme(lambda content: content['shapes'][0].update(changes))


ERRORS = {
    # COCO
    'json cut short': (*cut('coco', JSON), 'all.json is no JSON file'),
    'json empty': (*text('coco', JSON, ''), 'all.json is no JSON file'),
    'json of another kind': (*text('coco', JSON, '[1, 2]'), 'all.json is not in COCO format: it has no list "images"'),
    'no categories': (*coco(lambda c: c.pop('categories')), 'no list "categories"'),
    'annotations no list': (*coco(lambda c: c.update(annotations={})), 'no list "annotations"'),
    'no file_name': (*first('images', file_name=None), '"images".*no "file_name"'),
    'no image id': (*first('images', id=None), '"images".*no "id"'),
    'no image_id': (*first('annotations', image_id=None), '"annotations".*no "image_id"'),
    'no category_id': (*first('annotations', category_id=None), 'no "category_id"'),
    'category without name': (*first('categories', name=None), '"categories".*no "name"'),
    'category twice': (*coco(lambda c: c['categories'][1].update(name='cat')), "names of classes occur twice .'cat'"),
    'category id twice': (*coco(lambda c: c['categories'][1].update(id=3)), 'ids occur more than once.*"categories"'),
    'image id twice': (*coco(lambda c: c['images'][1].update(id=0)), 'ids occur more than once.*"images"'),
    'annotation id twice': (*coco(lambda c: c['annotations'][1].update(id=1)), 'more than once.*"annotations"'),
    'image listed twice': (*coco(lambda c: c['images'][1].update(file_name='0.jpg')), 'listed more than once .0.jpg'),
    'unknown category': (*first('annotations', category_id=99), 'categories that the file does not list'),
    'unknown image': (*first('annotations', image_id=99), 'images that the file does not list'),
    'image missing': (*gone('coco', 'images/3.jpg'), r'missing or cannot be read .*3\.jpg'),
    'image empty': (*text('coco', 'images/3.jpg', ''), r'3\.jpg: the file is empty'),
    'image cut short': (*cut('coco', 'images/3.jpg'), r'3\.jpg: the file is cut short'),
    'image that is none': (*text('coco', 'images/3.jpg', 'a' * 999), r'3\.jpg: no image'),
    'other size': (*first('images', width=96, height=72), '96 x 72 in the json, 48 x 36 in the file'),
    'corners as boxes': (*each('annotations', bbox=[20, 10, 44, 34], segmentation=None), 'x1, y1, x2, y2 in place'),
    'box of three numbers': (*first('annotations', bbox=[1, 2, 3]), 'boxes are not four numbers'),
    'box of text': (*first('annotations', bbox=['a', 1, 2, 3]), 'boxes are not four numbers'),
    'box not a number': (*first('annotations', bbox=[float('nan'), 1, 2, 3]), 'no numbers'),
    'neither box nor mask': (*first('annotations', bbox=None, segmentation=None), 'neither a box nor a mask'),
    'all boxes negative': (
        *each('annotations', bbox=[20, 20, -5, -5], segmentation=None),
        'no object .*boxes have no width or height',
    ),
    'mask of another size': (
        *first('annotations', segmentation=dict(size=[10, 10], counts=[100])),
        'run-length codes. have another size',
    ),
    'mask of text': (*first('annotations', segmentation='abc'), 'neither polygons nor run-length codes'),
    'no annotations at all': (*coco(lambda c: c.update(annotations=[])), 'no object'),
    'no images at all': (*coco(lambda c: c.update(images=[], annotations=[])), 'lists no images'),
    # VOC
    'xml cut short': (*cut('voc', '2.xml'), r'xml files do not parse .2\.xml'),
    'xml empty': (*text('voc', '2.xml', ''), r'xml files do not parse .2\.xml'),
    'xml without image': (*gone('voc', '2.jpg'), r'2\.jpg, the image of 2\.xml'),
    'xml of another size': (
        *text('voc', '2.xml', xml_text('2.jpg', [('cat', 1, 1, 9, 9)], (480, 360))),
        '480 x 360 in the xml, 48 x 36',
    ),
    'xml without box': (
        *text('voc', '2.xml', '<annotation><object><name>cat</name></object></annotation>'),
        r'no box of four numbers .cat in 2\.jpg',
    ),
    'xml with a box of text': (
        *text('voc', '2.xml', xml_text('2.jpg', [('cat', 'a', 1, 9, 9)])),
        'no box of four numbers',
    ),
    'name not in classes.txt': (*text('voc', 'classes.txt', 'cat\n'), r'not in classes\.txt .dog'),
    # YOLO
    'class too high': (*text('yolo', 'train/labels/0.txt', '2 0.5 0.5 0.1 0.1'), r'none of 0 to 1 .*0\.txt, line 1'),
    'class with a fraction': (*text('yolo', 'train/labels/0.txt', '0.5 0.5 0.5 0.1 0.1'), 'none of 0 to 1'),
    'pixels': (*text('yolo', 'train/labels/0.txt', '0 20 10 8 8'), 'not from 0 to 1'),
    'words': (*text('yolo', 'train/labels/0.txt', 'cat 0.5 0.5 0.1 0.1'), 'no numbers .*line 1'),
    'too few numbers': (*text('yolo', 'train/labels/0.txt', '0 0.5 0.5 0.1'), 'neither a box'),
    'scores behind boxes': (*text('yolo', 'train/labels/0.txt', '0 0.5 0.5 0.1 0.1 0.9'), 'six numbers'),
    'yaml that is none': (*text('yolo', 'data.yaml', 'names: [cat, dog\n'), 'data.yaml is no YAML'),
    'names that miss a number': (
        *text('yolo', 'data.yaml', 'train: train/images\nval: valid/images\nnames: {0: cat, 2: dog}\n'),
        'names must be those of the classes 0, 1, 2',
    ),
    'nc that differs': (
        *text('yolo', 'data.yaml', 'train: train/images\nval: valid/images\nnc: 3\nnames: [cat, dog]\n'),
        'nc: 3, but 2 names',
    ),
    'folder that is not there': (
        *text('yolo', 'data.yaml', 'train: trian/images\nval: valid/images\nnames: [cat, dog]\n'),
        'not there .train: trian/images',
    ),
    'labels elsewhere': ('yolo', move_labels, 'no image has a file of labels'),
    # LabelMe
    'labelme cut short': (*cut('labelme', '2.json'), r'do not parse .*2\.json'),
    'labelme without image': (*gone('labelme', '2.jpg'), r'2\.jpg, the image of 2\.json'),
    'labelme of another size': (*labelme(lambda c: c.update(imageWidth=99)), '99 x 36 in the json'),
    'points that are none': (*shape(points=[[1, 2], ['a', 3], [4, 5]]), 'points that are not two numbers'),
    # label maps
    'map missing': (*gone('masks', 'masks/2.png'), r'no label map .images/2\.jpg'),
    'map of another size': (*maps(0, 1, file='masks/2.png', size=(20, 20)), r'masks/2\.png: 20 x 20'),
    'maps of noise': ('masks', noise_map, 'photographs, or saved as JPEG'),
    'number without a name': (
        'masks',
        lambda root: (root / 'classes.txt').write_text('sky\n'),
        r'none of the 1 classes of classes\.txt .*2 in masks',
    ),
    'map that is none': (*text('masks', 'masks/2.png', 'abc'), r'masks/2\.png: no image'),
    'maps of 255': (
        'masks',
        lambda root: [write_map(root / f'masks/{i}.png', label_map(255)) for i in range(6)],
        'nothing but 255',
    ),
    # folders
    'one class': ('folders', lambda root: shutil.rmtree(root / 'dog'), 'only one class, cat'),
    'class only in val': (
        'folders',
        lambda root: [
            (root / 'train').mkdir(),
            *(shutil.move(root / name, root / 'train' / name) for name in ('cat', 'dog')),
            image(root / 'val/cow/1.jpg'),
        ],
        'classes of val are not in train .cow',
    ),
    'picture that is none': (*text('folders', 'cat/cat0.jpg', 'abc'), r'cat/cat0\.jpg: no image'),
    # any
    'nothing there': ('folders', lambda root: [shutil.rmtree(root / n) for n in ('cat', 'dog')], 'the folder is empty'),
    'images alone': ('voc', lambda root: [path.unlink() for path in root.glob('*.xml')], 'no layout is recognised'),
}  # fmt: skip


@pytest.fixture
def broken(folders, tmp_path, request):
    layout, change, message = ERRORS[request.param]
    root = tmp_path / 'data'
    shutil.copytree(folders[layout], root)
    change(root)
    return root, TASKS[layout], message


def test_sixty():
    assert len(ERRORS) >= 60


@pytest.mark.parametrize('broken', ERRORS, indirect=True)
def test_named_in_one_line(broken, configs, tmp_path):
    """Each is an error that a command prints as one line, which names the thing, before anything is built."""
    root, task, message = broken
    cfg = copy.deepcopy(configs[task])
    with pytest.raises(UserError, match=message) as caught:
        use_data(cfg, dict(folder=str(root)), str(tmp_path / 'work'))
        check_data(cfg, ('train', 'val'))
    lines = str(caught.value).split('\n')
    assert all(line.startswith('error: ') for line in lines[1:]) and max(map(len, lines)) < 500
    assert not (tmp_path / 'work/data/record.json').exists()


MENDED = {
    'no bbox': (*each('annotations', bbox=None), ''),
    'no area, no iscrowd': (*each('annotations', area=None, iscrowd=None), ''),
    'no size': (*each('images', width=None, height=None), 'no size in the json.*taken from the files'),
    'swapped size': (*each('images', width=36, height=48), 'swapped.*taken from the files'),
    'a box without width': (*first('annotations', bbox=[8, 6, 0, 5], segmentation=None), 'zero or negative.*dropped'),
    'a box outside': (*first('annotations', bbox=[80, 6, 5, 5], segmentation=None), 'outside their image.*dropped'),
    'a box beyond': (*first('annotations', bbox=[40, 6, 20, 5], segmentation=None), 'beyond their image.*clipped'),
    'a line for a polygon': (*first('annotations', segmentation=[[1, 2, 3, 4]]), 'three points'),
    'a missing mask': (*first('annotations', segmentation=None), 'objects have no mask.*ignored'),
    'xml without size': (*text('voc', '2.xml', xml_text('2.jpg', [('cat', 1, 1, 9, 9)], None)), ''),
    'labels without image': (*gone('yolo', 'train/images/0.jpg'), 'labels have no image.*train/labels/0.txt'),
    'a point': (*shape(shape_type='point', points=[[3, 4]]), "of the kind 'point'"),
    'a class without images': ('folders', lambda root: (root / 'cow').mkdir(), 'no image .cow'),
}


@pytest.mark.parametrize('name', MENDED)
def test_mended_and_said(name, folders, configs, tmp_path):
    """What can be read all the same is, and one line says what was done."""
    layout, change, message = MENDED[name]
    root = tmp_path / 'data'
    shutil.copytree(folders[layout], root)
    change(root)
    cfg = copy.deepcopy(configs[TASKS[layout]])
    use_data(cfg, dict(folder=str(root)), str(tmp_path / 'work'))
    report = check_data(cfg, ('train', 'val'))
    warnings = '\n'.join(report.warning_lines())
    assert re.search(message, warnings) if message else not warnings, warnings


def test_unreadable_images_are_left_out_on_demand(folders, configs, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(folders['coco'], root)
    (root / 'images/3.jpg').write_text('')
    cfg = copy.deepcopy(configs['boxes'])
    use_data(cfg, dict(folder=str(root), skip=True), str(tmp_path / 'work'))
    contents = [json.loads((tmp_path / f'work/data/{split}.json').read_text()) for split in ('train', 'val')]
    names = [entry['file_name'] for content in contents for entry in content['images']]
    assert len(names) == 5 and not any(name.endswith('3.jpg') for name in names)
    assert any('left out' in line for line in check_data(cfg, ('train', 'val')).warning_lines())


def test_the_layout_does_not_fit_the_model(folders, configs, tmp_path):
    """Boxes for a classifier, folders for a detector: what is there and what is needed."""
    for task, layout, message in (('labels', 'coco', 'COCO json.*a classifier'), ('boxes', 'folders', 'a detector')):
        with pytest.raises(UserError, match=message):
            use_data(copy.deepcopy(configs[task]), dict(folder=str(folders[layout])), str(tmp_path))


def test_options_that_are_none(folders, configs, tmp_path):
    for options, message in (
        (dict(vall=0.3), 'vall: the options are layout, seed, val, test, skip'),
        (dict(val=1.5), 'share of the images'),
        (dict(val=0.5, test=0.5), 'no image to train'),
        (dict(layout='tfrecord'), 'the layouts are coco, voc'),
    ):
        with pytest.raises(UserError, match=message):
            use_data(copy.deepcopy(configs['boxes']), dict(folder=str(folders['coco']), **options), str(tmp_path))
    with pytest.raises(UserError, match='does not exist'):
        use_data(copy.deepcopy(configs['boxes']), dict(folder='/nowhere/at/all'), str(tmp_path))
