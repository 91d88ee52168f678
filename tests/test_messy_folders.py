"""Folders as people keep them: tools' dialects, encodings, links, archives' folders. Each is read right, or named."""

import base64
import copy
import io
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from own_folders import (
    CLASSES,
    CONFIGS,
    SIZE,
    coco_content,
    edit_json,
    image,
    label_map,
    make_coco,
    make_folders,
    make_labelme,
    make_masks,
    make_voc,
    make_yolo,
    square,
    write_json,
    write_map,
    xml_text,
)
from PIL import Image
from pycocotools import mask as coco_mask

from mona_mm.config.load import load_config
from mona_mm.config.own_data import use_data
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, UserError
from mona_mm.own_data import as_maps, complete_splits, read_folder, write_data
from mona_mm.own_data.objects import _runs

JSON = 'annotations/all.json'


def read(root, task='boxes', **options):
    """The data of a folder with their splits completed, or the errors that forbid training."""
    data = read_folder(str(root), task, **options)
    complete_splits(data)
    data.findings.raise_errors()
    return data


def all_samples(data):
    return [sample for samples in data.splits.values() for sample in samples]


def counts(data):
    """The images and objects of each split."""
    return {split: (len(found), sum(len(sample.instances) for sample in found)) for split, found in data.splits.items()}


def warnings(data):
    return '\n'.join(data.findings.warning_lines())


def again(file, encoding):
    """Save a text file in another encoding."""
    file.write_bytes(file.read_text().encode(encoding))


def edited(root, change, count=6):
    make_coco(root, count)
    edit_json(root / JSON, change)
    return root


# COCO ----------------------------------------------------------------------------------------------------------------


def each_annotation(**changes):
    return lambda content: [annotation.update(copy.deepcopy(changes)) for annotation in content['annotations']]


def as_pairs(content):
    for annotation in content['annotations']:
        annotation['segmentation'] = [np.reshape(square(), (-1, 2)).tolist()]


def as_one_polygon(content):
    for annotation in content['annotations']:
        annotation['segmentation'] = square()


def above_with_the_name_of_one(content):
    """Roboflow's export of a project with the name of its class."""
    below = [{**category, 'supercategory': 'cat'} for category in content['categories']]
    content['categories'] = [dict(id=0, name='cat', supercategory='none'), *below]


def above_itself(content):
    content['categories'].append(dict(id=90, name='person', supercategory='person'))


def sizes_as_text(content):
    for entry in content['images']:
        entry.update(width='48', height='36.0')


COCO = {
    'flags as text': (each_annotation(iscrowd='0'), CLASSES),
    'areas that are none': (each_annotation(area='abc'), CLASSES),
    'negative areas': (each_annotation(area=-5), CLASSES),
    'areas in a list': (each_annotation(area=[5]), CLASSES),
    'polygons of pairs': (as_pairs, CLASSES),
    'a polygon without its list': (as_one_polygon, CLASSES),
    'sizes as text': (sizes_as_text, CLASSES),
    'a category above others': (above_with_the_name_of_one, CLASSES),
    'a category above itself': (above_itself, (*CLASSES, 'person')),
}


@pytest.mark.parametrize('name', COCO)
def test_coco(name, tmp_path):
    """Dialects of COCO: the same objects with the same masks and areas."""
    change, classes = COCO[name]
    data = read(edited(tmp_path / 'data', change))
    assert data.classes == classes and not data.findings.warnings
    (file,) = write_data(data, 'boxes', tmp_path / 'out')['train']
    written = json.loads(Path(file['ann_file']).read_text())['annotations']
    assert len(written) == 7 and {annotation['area'] for annotation in written} == {256.0}
    assert not any(annotation['iscrowd'] for annotation in written)
    assert all(annotation['segmentation'] == [square()] for annotation in written)


def rle(**changes):
    code = dict(size=[SIZE[1], SIZE[0]], counts=[100, 50, SIZE[0] * SIZE[1] - 150])
    return lambda content: content['annotations'][0].update(segmentation={**code, **changes})


COCO_ERRORS = {
    'an id in a list': (lambda c: c['images'][0].update(id=[1]), '"id" that is neither a number nor text'),
    'a category in a list': (lambda c: c['annotations'][0].update(category_id=[3]), '"category_id" that is neither'),
    'a size that is none': (lambda c: c['images'][0].update(width='abc'), r"size in the json.*0\.jpg: 'abc' x 36"),
    'a size in a list': (lambda c: c['images'][0].update(width=[48]), 'size in the json that is no number'),
    'a polygon of words': (each_annotation(segmentation=[['a'] * 6]), 'neither polygons nor run-length codes'),
    'runs that end early': (rle(counts=[100, 50]), 'no run-length codes of as many pixels'),
    'runs that go on': (rle(counts=[100, 50, 9999]), 'no run-length codes of as many pixels'),
    'negative runs': (rle(counts=[-100, 50, SIZE[0] * SIZE[1] + 50]), 'no run-length codes of as many pixels'),
    'runs that are text': (rle(counts='zzzz'), r'no run-length codes .*0\.jpg: zzzz'),
    'no runs': (rle(counts=None), 'no run-length codes of as many pixels'),
    'a size of a code': (rle(size=5), 'another size than their image'),
    'an image in two folders': (
        lambda c: c['images'][0].update(file_name='twice.jpg'),
        r'twice\.jpg, which annotations/all\.json lists: there are images/a/twice\.jpg and images/b/twice\.jpg',
    ),
}


@pytest.mark.parametrize('name', COCO_ERRORS)
def test_coco_errors(name, tmp_path):
    change, message = COCO_ERRORS[name]
    root = edited(tmp_path / 'data', change)
    for folder in 'ab':
        image(root / f'images/{folder}/twice.jpg')
    with pytest.raises(ConfigError, match=message):
        read(root)


@pytest.mark.parametrize('share', [0.0, 0.03, 0.5, 1.0])
def test_runs_are_those_of_pycocotools(share):
    """The lengths of runs in the text of a code, which is checked before pycocotools reads it."""
    content = np.asfortranarray(np.random.default_rng(0).random((37, 53)) < share).astype(np.uint8)
    flat = content.ravel('F')
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]]))
    expected = [0, *runs] if flat[0] else [*runs]
    assert _runs(coco_mask.encode(content)['counts'].decode()).tolist() == expected


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-be'])
@pytest.mark.parametrize('place', [JSON, 'labels.json'])
def test_json_in_other_encodings(encoding, place, tmp_path):
    root = make_coco(tmp_path)
    again(root / JSON, encoding)
    shutil.move(root / JSON, root / place)
    assert read(root).classes == CLASSES


def test_keys_of_coco_anywhere_in_the_file(tmp_path):
    """A file with its keys in order has "images" behind all annotations, megabytes from both ends."""
    root = make_coco(tmp_path)
    content = json.loads((root / JSON).read_text())
    content['annotations'][0]['note'], content['images'][-1]['note'] = 'x' * 100_000, 'y' * 1_100_000
    write_json(root / 'labels.json', {key: content[key] for key in sorted(content)})
    (root / JSON).unlink()
    assert counts(read(root)) == dict(train=(5, 7), val=(1, 2))


def test_objects_that_are_there_twice(tmp_path):
    """Equal objects in one file or in two, and a file of all beside those of the splits."""
    root = edited(tmp_path / 'a', lambda c: c['annotations'].append({**c['annotations'][0], 'id': 99}))
    data = read(root)
    assert sum(objects for _, objects in counts(data).values()) == 9
    assert '1 objects occur twice in an image' in warnings(data)
    root = make_coco(tmp_path / 'b')
    shutil.copy(root / JSON, root / 'annotations/backup.json')
    data = read(root)
    assert sum(objects for _, objects in counts(data).values()) == 9
    assert '9 objects are in several files alike' in warnings(data)
    root = make_coco(tmp_path / 'c')
    content = json.loads((root / JSON).read_text())
    for split, ids in (('train', range(4)), ('val', (4, 5))):
        images = [entry for entry in content['images'] if entry['id'] in ids]
        objects = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
        write_json(root / f'annotations/{split}.json', {**content, 'images': images, 'annotations': objects})
    data = read(root)
    assert counts(data) == dict(train=(4, 6), val=(2, 3))
    assert '2 annotations in no split are of images that validate or test' in warnings(data)


def test_marked_objects_are_said_to_be_dropped(tmp_path):
    data = read(edited(tmp_path, lambda c: c['annotations'][1].update(ignore=1)))
    assert '1 objects are marked with "ignore"' in warnings(data)


def test_other_json_files_beside_annotations(tmp_path):
    """A file that is not COCO's in annotations/: beside one that is, and beside xml files."""
    root = make_coco(tmp_path / 'a')
    write_json(root / 'annotations/meta.json', dict(author='x'))
    data = read(root)
    assert data.layout == 'COCO json' and 'not in COCO format (annotations/meta.json)' in warnings(data)
    root = make_voc(tmp_path / 'b/annotations').parent
    write_json(root / 'annotations/label_map.json', dict(cat=1))
    assert read(root).layout == 'Pascal VOC xml'


def test_a_label_map_is_no_image(tmp_path):
    """An image that is missing is not replaced by the label map of its name."""
    root = make_masks(make_coco(tmp_path))
    for path in (root / 'images').iterdir():
        path.touch()
    (root / 'images/3.jpg').unlink()
    with pytest.raises(ConfigError, match=r'missing or cannot be read .3\.jpg, which'):
        read(root)


def test_accents_of_other_systems(tmp_path):
    """The file name has e and an accent, the annotation one character."""
    names = ['\u00e9.jpg', '1.jpg', '2.jpg']
    for name in names:
        image(tmp_path / unicodedata.normalize('NFD', name))
    write_json(tmp_path / 'x.json', coco_content(names))
    assert len(all_samples(read(tmp_path))) == 3


@pytest.mark.parametrize('layout', ['coco', 'voc', 'labelme'])
def test_folders_of_images_name_the_split(layout, tmp_path):
    """Annotations that name no split, of images in train/ and val/."""
    names = [f'{split}/{split}{i}.jpg' for split in ('train', 'val') for i in range(3)]
    for name in names:
        image(tmp_path / 'images' / name)
        stem = name[:-4].rpartition('/')[2]
        (tmp_path / 'labels').mkdir(exist_ok=True)
        if layout == 'voc':
            (tmp_path / f'labels/{stem}.xml').write_text(xml_text(f'{stem}.jpg', [('cat', 9, 7, 25, 23)]))
        if layout == 'labelme':
            shape = dict(label='cat', points=np.reshape(square(), (-1, 2)).tolist(), shape_type='polygon')
            write_json(tmp_path / f'labels/{stem}.json', dict(shapes=[shape], imagePath=f'{stem}.jpg'))
    if layout == 'coco':
        write_json(tmp_path / 'labels.json', coco_content(names))
    data = read(tmp_path)
    assert {split: {sample.image.parent.name for sample in found} for split, found in data.splits.items()} == dict(
        train={'train'}, val={'val'}
    )


# VOC, LabelMe --------------------------------------------------------------------------------------------------------


def voc_lists(root, lines, encoding='utf-8', folder=''):
    make_voc(root / folder)
    sets = root / 'ImageSets/Main'
    sets.mkdir(parents=True)
    for split, numbers in (('train', range(4)), ('val', (4, 5))):
        (sets / f'{split}.txt').write_text(''.join(lines.format(i) for i in numbers), encoding=encoding)
    return root


def voc_utf16(root):
    for file in make_voc(root).glob('*.xml'):
        file.write_text(f'<?xml version="1.0" encoding="utf-16"?>{file.read_text()}', encoding='utf-16')


def voc_linked(root):
    """Images that are links to files elsewhere."""
    (root.parent / 'elsewhere').mkdir()
    for file in list(make_voc(root).glob('*.jpg')):
        shutil.move(file, root.parent / 'elsewhere' / file.name)
        file.symlink_to(root.parent / 'elsewhere' / file.name)


def voc_devkit_without_names(root):
    """Label maps beside the images, and xml files that do not name the image."""
    for i in range(6):
        image(root / f'JPEGImages/{i}.jpg')
        write_map(root / f'SegmentationClass/{i}.png', label_map(0, 1))
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / f'Annotations/{i}.xml').write_text(xml_text('', [('cat', 9, 7, 25, 23), ('dog', 9, 7, 25, 30)]))


VOC = {
    'UTF-16': voc_utf16,
    'linked images': voc_linked,
    'label maps beside': voc_devkit_without_names,
    'lists with a byte order mark': lambda root: voc_lists(root, '{}\n', 'utf-8-sig'),
    'lists with suffixes': lambda root: voc_lists(root, '{}.jpg\n'),
    'lists with folders': lambda root: voc_lists(root, 'sub/{}\n', folder='Annotations/sub'),
}


@pytest.mark.parametrize('name', VOC)
def test_voc(name, tmp_path):
    VOC[name](tmp_path / 'data')
    data = read(tmp_path / 'data')
    assert data.classes == CLASSES and len(all_samples(data)) == 6 and not data.findings.warnings
    if name.startswith('lists'):
        assert [len(data.splits[split]) for split in ('train', 'val')] == [4, 2]


def test_voc_object_without_name(tmp_path):
    make_voc(tmp_path)
    (tmp_path / '2.xml').write_text(xml_text('2.jpg', [('', 9, 7, 25, 23)]).replace('<name></name>', ''))
    with pytest.raises(ConfigError, match=r'objects have no name .2\.jpg'):
        read(tmp_path)


def shapes(*shapes):
    return lambda content: content.update(shapes=[dict(label='cat', shape_type=kind, **rest) for kind, rest in shapes])


def small_mask(side=5):
    out = io.BytesIO()
    Image.fromarray(np.full((side, side), 255, np.uint8)).save(out, 'PNG')
    return base64.b64encode(out.getvalue()).decode()


CORNERS = np.reshape(square(), (-1, 2)).tolist()
SHAPES = {
    'four corners': (shapes(('rectangle', dict(points=CORNERS))), (8, 6, 16, 16), False),
    'a rotated rectangle': (shapes(('rotation', dict(points=CORNERS))), (8, 6, 16, 16), True),
    'two boxes of a group': (
        shapes(
            ('rectangle', dict(points=[[1, 1], [5, 5]], group_id=1)),
            ('rectangle', dict(points=[[20, 20], [10, 10]], group_id=1)),
        ),
        (1, 1, 19, 19),
        False,
    ),
    'a box and a polygon of a group': (
        shapes(('rectangle', dict(points=[[1, 1], [9, 9]], group_id=1)), ('polygon', dict(points=CORNERS, group_id=1))),
        (1, 1, 23, 21),
        True,
    ),
    'two masks and a polygon of a group': (
        shapes(
            ('mask', dict(points=[[1, 1], [6, 6]], mask=small_mask(), group_id=2)),
            ('mask', dict(points=[[30, 25], [35, 30]], mask=small_mask(), group_id=2)),
            ('polygon', dict(points=CORNERS, group_id=2)),
        ),
        (1, 1, 34, 29),
        True,
    ),
    'a group that is a list': (shapes(('polygon', dict(points=CORNERS, group_id=[1]))), (8, 6, 16, 16), True),
    'sizes as text': (lambda c: c.update(imageWidth='48', imageHeight='36'), (8, 6, 16, 16), True),
}


@pytest.mark.parametrize('name', SHAPES)
def test_labelme(name, tmp_path):
    """Shapes of newer tools, and groups: one object with a box around all of it, and a mask of all that has one."""
    change, box, has_mask = SHAPES[name]
    edit_json(make_labelme(tmp_path) / '0.json', change)
    (sample,) = [sample for sample in all_samples(read(tmp_path)) if sample.image.stem == '0']
    (instance,) = sample.instances
    assert instance.box == pytest.approx(box) and (instance.mask is not None) == has_mask
    if 'two masks' in name:
        assert coco_mask.area(instance.mask) == 5 * 5 * 2 + 16 * 16


def test_images_inside_json_for_a_tool_that_writes_nothing(tmp_path):
    """The classes of a folder, without a work dir, where the images are in the annotations alone."""
    root = make_labelme(tmp_path / 'data')
    for file in root.glob('*.json'):
        picture = file.with_suffix('.jpg')
        content = base64.b64encode(picture.read_bytes()).decode()
        edit_json(file, lambda c, content=content: c.update(imageData=content))
        picture.unlink()
    cfg = load_config(str(ROOT / CONFIGS['boxes']))
    use_data(cfg, dict(folder=str(root)), str(tmp_path / 'work'), write=False)
    assert cfg.own_data.images == dict(train=5, val=1) and cfg.model.roi_head.bbox_head.num_classes == 2
    assert not (tmp_path / 'work').exists()


LABELME_ERRORS = {
    'a shape that is none': (lambda c: c['shapes'].append('x'), r'no objects of JSON .0\.json: x'),
    'no label': (lambda c: c['shapes'][0].update(label=None), 'classes have no name'),
    'a mask that is none': (shapes(('mask', dict(points=[[1, 1], [6, 6]], mask='abcd'))), r'no pictures .*0\.jpg'),
    'a mask cut short': (shapes(('mask', dict(points=[[1, 1], [9, 9]], mask=small_mask(200)[:80]))), 'no pictures'),
    'an image cut short': (lambda c: c.update(imageData=small_mask(200)[:40]), r'the image of 0\.json'),
    'an image that is a number': (lambda c: c.update(imageData=5), r'the image of 0\.json'),
}


@pytest.mark.parametrize('name', LABELME_ERRORS)
def test_labelme_errors(name, tmp_path):
    change, message = LABELME_ERRORS[name]
    edit_json(make_labelme(tmp_path / 'data') / '0.json', change)
    if 'image' in name:
        (tmp_path / 'data/0.jpg').unlink()
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / 'data', extracted=tmp_path / 'out')


# YOLO, files of classes ----------------------------------------------------------------------------------------------


def yolo_with(text, labels=None, encoding='utf-8'):
    def make(root):
        make_yolo(root)
        (root / 'data.yaml').write_text(f'train: ../train/images\nval: ../valid/images\n{text}', encoding=encoding)
        for file in root.glob('*/labels/*.txt') if labels else ():
            file.write_text(labels, encoding='utf-8-sig')
        return root

    return make


def yolo_without_yaml(place, content, encoding='utf-8'):
    def make(root):
        make_yolo(root)
        (root / 'data.yaml').unlink()
        (root / place).write_bytes(content.encode(encoding))
        return root

    return make


def yolo_darknet(root):
    """Roboflow's export: names in a file of each split."""
    for split in ('train', 'valid'):
        yolo_without_yaml(f'{split}/_darknet.labels', 'cat\ndog\n')(root)


def yolo_linked(root):
    """The folder of images is a link."""
    make_yolo(root)
    shutil.move(root / 'train/images', root.parent / 'elsewhere')
    (root / 'train/images').symlink_to(root.parent / 'elsewhere')


BOX = '0 0.5 0.5 0.25 0.5'
YOLO = {
    'names that are no text in YAML': (yolo_with('names: [no, 1:30]\n'), ('no', '1:30'), 12),
    'numbers as text': (yolo_with('nc: "2"\nnames: {"0": cat, "1": dog}\n'), CLASSES, 12),
    'yaml in UTF-16': (yolo_with('names: [cat, dog]\n', encoding='utf-16'), CLASSES, 12),
    'a test folder that is not there': (yolo_with('test: ../test/images\nnames: [cat, dog]\n'), CLASSES, 12),
    'labels with a byte order mark': (yolo_with('names: [cat, dog]\n', f'{BOX}\n'), CLASSES, 8),
    'four key points': (
        yolo_with('kpt_shape: [4, 2]\nnames: [cat, dog]\n', f'{BOX} 0.1 0.1 0.2 0.2 0.3 0.3 0.4 0.4\n'),
        CLASSES,
        8,
    ),
    'names with a byte order mark': (yolo_without_yaml('classes.txt', '\ufeffcat\r\ndog\r\n'), CLASSES, 12),
    'names beside the labels': (yolo_without_yaml('train/labels/classes.txt', 'cat\ndog\n'), CLASSES, 12),
    'names in each split': (yolo_darknet, CLASSES, 12),
    'a linked folder': (yolo_linked, CLASSES, 12),
}


@pytest.mark.parametrize('name', YOLO)
def test_yolo(name, tmp_path):
    make, classes, objects = YOLO[name]
    make(tmp_path / 'data')
    data = read(tmp_path / 'data')
    assert data.classes == classes and sum(n for _, n in counts(data).values()) == objects
    if name == 'four key points':
        assert {instance.box for sample in all_samples(data) for instance in sample.instances} == {(18, 9, 12, 18)}
    said = 'folders of data.yaml are not there (test: ../test/images)' if 'test folder' in name else ''
    assert (said in warnings(data)) if said else not data.findings.warnings


def test_yolo_after_many_images_without_objects(tmp_path):
    for i in range(60):
        image(tmp_path / f'images/{i:02}.jpg')
        (tmp_path / 'labels').mkdir(exist_ok=True)
        (tmp_path / f'labels/{i:02}.txt').write_text(f'\n{BOX}\n' if i > 52 else '')
    assert read(tmp_path).layout == 'YOLO txt'


def test_yolo_images_without_labels_are_named(tmp_path):
    root = make_yolo(tmp_path)
    (root / 'train/labels/2.txt').unlink()
    data = read(root)
    assert '1 images have no file of labels (train/images/2.jpg); taken as images without objects' in warnings(data)


def test_yolo_numbers_that_are_none(tmp_path):
    root = make_yolo(tmp_path)
    (root / 'train/labels/0.txt').write_text('nan 0.5 0.5 0.2 0.2\ninf 0.5 0.5 0.2 0.2\n')
    with pytest.raises(ConfigError, match='2 lines have a class that is none of 0 to 1'):
        read(root)


@pytest.mark.parametrize(
    'make, task', [(make_voc, 'boxes'), (make_labelme, 'boxes'), (make_masks, 'maps'), (make_yolo, 'boxes')]
)
def test_files_of_classes_in_other_encodings(make, task, tmp_path):
    """A byte order mark is no part of the first name, and another encoding is named with its line."""
    names = ('sky', 'cat', 'dog') if task == 'maps' else CLASSES
    for file in make(tmp_path).glob('data.yaml'):
        file.unlink()
    file = tmp_path / 'classes.txt'
    file.write_text('\n'.join(names), encoding='utf-8-sig')
    assert read(tmp_path, task).classes == names
    file.write_bytes('\n'.join([*names[:-1], 'K\u00e4fer']).encode('latin-1'))
    with pytest.raises(ConfigError, match=rf'classes\.txt, line {len(names)}, is not in UTF-8'):
        read(tmp_path, task)


def test_an_empty_line_among_names(tmp_path):
    """It would move all numbers behind it."""
    with pytest.raises(ConfigError, match='classes have no name'):
        read(yolo_without_yaml('classes.txt', 'cat\n\ndog\n')(tmp_path))


# Label maps ----------------------------------------------------------------------------------------------------------


BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (200, 0, 0), (0, 200, 0), (0, 0, 255)


def coloured(root, *colours):
    make_masks(root, values=tuple(range(len(colours))))
    for path in (root / 'masks').iterdir():
        Image.fromarray(np.array(colours, np.uint8)[np.array(Image.open(path))]).save(path)
    return root


def maps_of(data, folder):
    """The label maps that the libraries read, by the names of the images."""
    write_data(data, 'maps', folder)
    return {path.stem: np.array(Image.open(path)) for path in folder.rglob('*.png')}


COLOURS = {
    'green': (BLACK, GREEN),
    'blue and green': (BLACK, BLUE, GREEN),
    'white in all': (BLACK, WHITE, RED),
}


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('name', COLOURS)
def test_colours(name, named, tmp_path):
    """No colour is taken for a number: neither blue for 255, which is ignored, nor green for 51200."""
    colours = COLOURS[name]
    root = coloured(tmp_path / 'data', *colours)
    names = [f'kind {i}' for i in range(len(colours))] if named else [f'#{r:02x}{g:02x}{b:02x}' for r, g, b in colours]
    if named:
        lines = [f'{name} {" ".join(map(str, colour))}\n' for name, colour in zip(names, colours, strict=True)]
        (root / 'classes.txt').write_text(''.join(lines))
    data = read(root, 'maps')
    assert set(data.classes) == set(names)
    expected = np.array([data.classes.index(name) for name in names])[label_map(*range(len(colours)))]
    for content in maps_of(data, tmp_path / 'out').values():
        assert np.array_equal(content, expected)


@pytest.mark.parametrize('kind', ['grey', 'one channel', 'palette'])
def test_a_colour_map_that_is_saved_otherwise(kind, tmp_path):
    """Of maps with colours one has only black and white, or one channel, or a palette: the colours are the same."""
    root = coloured(tmp_path / 'data', BLACK, WHITE, RED)
    file = root / 'masks/0.png'
    if kind == 'grey':
        Image.fromarray(np.array([BLACK, WHITE], np.uint8)[label_map(0, 1)]).save(file)
    if kind == 'one channel':
        write_map(file, label_map(0, 255))
    if kind == 'palette':
        picture = Image.fromarray(label_map(0, 1), 'P')
        picture.putpalette([*BLACK, *WHITE])
        picture.save(file)
    data = read(root, 'maps')
    assert data.classes == ('#000000', '#c80000', '#ffffff')
    maps = maps_of(data, tmp_path / 'out')
    assert np.array_equal(maps['0'], label_map(0, 2)) and np.array_equal(maps['1'], label_map(0, 2, 1))


def test_a_few_values_of_jpeg(tmp_path):
    """Masks of 0 and 255 that JPEG has changed are masks still; numbers of classes are refused."""
    for name, values in (('binary', (0, 250)), ('numbers', (0, 1, 2))):
        for i in range(4):
            image(tmp_path / name / f'images/{i}.png')
            write_map(tmp_path / name / f'masks/{i}.jpg', label_map(*values))
    data = read(tmp_path / 'binary', 'maps')
    assert data.classes == ('background', 'foreground')
    assert all(set(np.unique(content)) == {0, 1} for content in maps_of(data, tmp_path / 'out').values())
    with pytest.raises(ConfigError, match=r'saved as JPEG.*masks/0\.jpg.*PNG'):
        read(tmp_path / 'numbers', 'maps')


def test_255_among_numbers_is_said_to_be_ignored(tmp_path):
    root = make_masks(tmp_path, values=(0, 128, 255))
    data = read(root, 'maps')
    assert any(note.startswith('255 in the label maps is ignored') for note in data.notes)
    (root / 'classes.txt').write_text('0 sky\n128 road\n255 car\n')
    data = read(root, 'maps')
    assert data.classes == ('sky', 'road', 'car') and data.values == {0: 0, 128: 1, 255: 2}


def roboflow_masks(root):
    for split in ('train', 'valid'):
        for i in range(3):
            name = f'{split}{i}_jpg.rf.abc{i}'
            image(root / split / f'{name}.jpg')
            write_map(root / split / f'{name}_mask.png', label_map(0, 1, 2))
        (root / split / '_classes.csv').write_text('Pixel Value, Class\n0, sky\n1, car\n2, big road\n')


def cvat_masks(root):
    """CVAT's masks: those of objects beside those of classes, and the colours of classes."""
    coloured(root, BLACK, RED)
    (root / 'images').rename(root / 'JPEGImages')
    (root / 'masks').rename(root / 'SegmentationClass')
    shutil.copytree(root / 'SegmentationClass', root / 'SegmentationObject')
    lines = '# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:200,0,0::\n'
    (root / 'labelmap.txt').write_text(lines)


def voc_masks(root):
    """The devkit: lists of splits, and images without label map."""
    make_masks(root, values=(0, 1))
    (root / 'masks').rename(root / 'SegmentationClass')
    image(root / 'images/other.jpg')
    (root / 'ImageSets/Segmentation').mkdir(parents=True)
    (root / 'ImageSets/Segmentation/train.txt').write_text('0\n1\n2\n3\n')
    (root / 'ImageSets/Segmentation/val.txt').write_text('4\n5\n')
    (root / 'classes.txt').write_text('sky\ncar\n')


def sides(root):
    """Ends of names that are those of label maps, too."""
    for side in 'LRp':
        for i in range(2):
            image(root / f'images/{i}_{side}.jpg')
            write_map(root / f'masks/{i}_{side}.png', label_map(0, 1) if side == 'L' else label_map(1, 0))


MASKS = {
    'roboflow': (roboflow_masks, ('sky', 'car', 'big road'), (3, 3)),
    'cvat': (cvat_masks, ('background', 'car'), (5, 1)),
    'voc': (voc_masks, ('sky', 'car'), (4, 2)),
    'sides': (sides, ('background', 'foreground'), (5, 1)),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks(name, tmp_path):
    make, classes, sizes = MASKS[name]
    make(tmp_path)
    data = read(tmp_path, 'maps')
    assert data.classes == classes and tuple(len(data.splits[split]) for split in ('train', 'val')) == sizes
    assert warnings(data).count('\n') == 0
    assert ('1 images are in no list of ImageSets (images/other.jpg)' in warnings(data)) == (name == 'voc')
    if name == 'sides':
        assert all(sample.image.stem == sample.label_map.stem for sample in all_samples(data))


MAP_ERRORS = {
    'one value': (lambda root: make_masks(root, values=(0,)), 'only one class, class 0'),
    'too many classes': (
        lambda root: (make_masks(root) / 'classes.txt').write_text(''.join(f'{i} name {i}\n' for i in range(300))),
        '255 classes at most, and there are 300',
    ),
    'arrays': (
        lambda root: [path.rename(path.with_suffix('.npy')) for path in make_masks(root).glob('masks/*')],
        r'masks/0\.npy is an array of NumPy',
    ),
}


@pytest.mark.parametrize('name', MAP_ERRORS)
def test_map_errors(name, tmp_path):
    make, message = MAP_ERRORS[name]
    make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, 'maps')


def test_one_map_of_two_images_is_named(tmp_path):
    root = make_masks(tmp_path)
    image(root / 'images/0.png')
    assert 'label maps are those of several images (masks/0.png)' in warnings(read(root, 'maps'))


def test_maps_of_objects(tmp_path):
    """A class with the name of the background, and images that differ in their suffix alone."""
    names = ['a.jpg', 'a.png', 'b.jpg', 'c.jpg']
    content = coco_content(names)
    content['categories'][0]['name'] = 'background'
    content['annotations'][1]['bbox'] = [20, 10, 8, 8]
    for i, annotation in enumerate(content['annotations']):
        annotation['segmentation'] = [square(2 + 3 * i, 6, 8)]
    for name in names:
        image(tmp_path / name)
    write_json(tmp_path / 'x.json', content)
    data = read(tmp_path, 'maps')
    as_maps(data)
    assert data.classes == ('no object', 'background', 'dog')
    written = write_data(data, 'maps', tmp_path / 'out')
    places = {}
    for entry in (entry for entries in written.values() for entry in entries):
        for name in Path(entry['ann_file']).read_text().split():
            places[name + entry['img_suffix']] = os.path.join(entry['data_prefix']['seg_map_path'], name + '.png')
    assert sorted(places) == names and len(set(places.values())) == 4
    columns = {name: set(np.flatnonzero(np.array(Image.open(path)).any(axis=0))) for name, path in places.items()}
    assert min(columns['a.jpg']) == 2 and min(columns['a.png']) == 4


def test_some_classes_of_maps_of_objects(tmp_path):
    """Chosen classes keep their meaning when the background is added before them."""
    cfg = load_config(str(ROOT / CONFIGS['maps']))
    use_data(cfg, dict(folder=str(make_labelme(tmp_path / 'data'))), str(tmp_path / 'work'), ['background', 'dog'])
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == ('background', 'dog')
    maps = [np.array(Image.open(path)) for path in sorted((tmp_path / 'work/data').rglob('*.png'))]
    assert [(content == 1).any() for content in maps] == [False, True] * 3  # every second image has a dog


# Folders of classes --------------------------------------------------------------------------------------------------


def extra_folder(root):
    """A folder that is no split beside those that are."""
    make_folders(root / 'training_set')
    make_folders(root / 'test_set')
    image(root / 'single_prediction/x.jpg')


def splits_below(root):
    for name in CLASSES:
        for split in ('train', 'val'):
            for i in range(3):
                image(root / name / split / f'{name}{split}{i}.jpg')


def vehicles(root):
    """A class that has the name of a split."""
    for name in ('bus', 'car', 'train'):
        for i in range(4):
            image(root / name / f'{name}{i}.jpg')


def vehicles_with_views(root):
    for name in ('bus', 'car', 'train'):
        for i in range(4):
            image(root / name / f'view{i}/{name}{i}.jpg')


FOLDERS = {
    'a folder around them': (lambda root: make_folders(root / 'mine'), CLASSES, dict(train=8, val=2)),
    'two folders around splits': (
        lambda root: [make_folders(root / f'mine/images/{split}') for split in ('train', 'val')],
        CLASSES,
        dict(train=10, val=10),
    ),
    'a folder that is no split': (extra_folder, CLASSES, dict(train=8, val=2, test=10)),
    'samples beside train': (
        lambda root: [make_folders(root / 'train'), image(root / 'samples/x.jpg')],
        CLASSES,
        dict(train=8, val=2),
    ),
    'splits below classes': (splits_below, CLASSES, dict(train=6, val=6)),
    'a class called train': (vehicles, ('bus', 'car', 'train'), dict(train=9, val=3)),
    'a class called train, nested': (vehicles_with_views, ('bus', 'car', 'train'), dict(train=9, val=3)),
    'jfif': (
        lambda root: Image.open(make_folders(root) / 'cat/cat0.jpg').save(root / 'cat/x.jfif', 'JPEG'),
        CLASSES,
        dict(train=9, val=2),
    ),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_class_folders(name, tmp_path):
    make, classes, sizes = FOLDERS[name]
    make(tmp_path)
    data = read(tmp_path, 'labels')
    assert data.classes == classes
    assert {split: len(found) for split, found in data.splits.items()} == sizes
    below = [sample.image.relative_to(tmp_path).parts for sample in all_samples(data)]
    assert all(data.classes[sample.label] in parts for sample, parts in zip(all_samples(data), below, strict=True))
    unused = [line for line in data.findings.warning_lines() if 'in no folder of a class' in line]
    assert len(unused) == (name in ('a folder that is no split', 'samples beside train'))


def test_names_that_differ_in_case_alone(tmp_path):
    for name in ('Cat', 'cat', 'dog'):
        for i in range(2):
            image(tmp_path / name / f'{name}{i}.jpg')
    assert 'differ in upper and lower case alone (Cat, cat)' in warnings(read(tmp_path, 'labels'))


def test_images_that_are_not_read_are_named(tmp_path):
    root = make_folders(tmp_path)
    (root / 'cat/x.HEIC').write_bytes(b'x')
    assert '1 images are of kinds that OpenCV does not read (cat/x.HEIC)' in warnings(read(root, 'labels'))


def test_what_systems_leave_behind(tmp_path):
    root = make_folders(tmp_path)
    for place in ('.ipynb_checkpoints/a.jpg', '__MACOSX/cat/._a.jpg', 'cat/._cat0.jpg', '@eaDir/cat/a.jpg'):
        image(root / place)
    for place in ('.DS_Store', 'cat/Thumbs.db', 'desktop.ini'):
        (root / place).write_text('x')
    data = read(root, 'labels')
    assert data.classes == CLASSES and len(all_samples(data)) == 10 and not data.findings.warnings


@pytest.mark.parametrize('name', [b'\xe4.jpg', b'a\nb.jpg'])
def test_names_that_no_list_can_hold(name, tmp_path):
    """The bytes of another encoding, and a line break: named, or left out on demand."""
    root = make_folders(tmp_path / 'data')
    os.rename(os.fsencode(root / 'cat/cat0.jpg'), os.fsencode(root / 'cat') + b'/' + name)
    cfg = load_config(str(ROOT / CONFIGS['labels']))
    with pytest.raises(UserError, match='the name of the file is not in UTF-8, or has a line break'):
        use_data(copy.deepcopy(cfg), dict(folder=str(root)), str(tmp_path / 'work'))
    use_data(cfg, dict(folder=str(root), skip=True), str(tmp_path / 'work'))
    assert cfg.own_data.images == dict(train=7, val=2)


def test_too_few_different_images(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(3):
            shutil.copy(image(tmp_path.parent / 'one.jpg'), tmp_path / name / f'{i}.jpg')
    with pytest.raises(ConfigError, match='1 training images of different content are too few to draw val from them'):
        read(tmp_path, 'labels')


# Formats that are not read -------------------------------------------------------------------------------------------


FOREIGN = {
    'annotations.xml': ('<annotations><version>1.1</version></annotations>', "CVAT's own xml"),
    'project.json': ('[{"id": 1, "annotations": [], "data": {"image": "0.jpg"}}]', "Label Studio's own json"),
    'via.json': ('{"_via_settings": {}}', "the VGG annotator's json"),
    '_annotations.createml.json': ('[{"image": "0.jpg", "annotations": []}]', 'the format of CreateML'),
    '_annotations.csv': ('filename,class,xmin,ymin,xmax,ymax\n', 'is a table'),
    '_annotations.txt': ('0.jpg 1,2,10,12,0\n', 'the boxes of all images in one file'),
    'labels.json': ('{"annotations": [], "categories": []}', 'has no list "images"'),
    'data.zip': ('PK', 'is an archive: unpack it'),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_formats_that_are_not_read_are_named(name, tmp_path):
    content, message = FOREIGN[name]
    for i in range(3):
        image(tmp_path / f'{i}.jpg')
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f'no layout is recognised .*{name} .*{message}'):
        read(tmp_path)


def test_an_archive_for_a_folder(tmp_path):
    (tmp_path / 'data.zip').write_bytes(b'PK')
    with pytest.raises(UserError, match='is a file, not a folder. Unpack it'):
        read(tmp_path / 'data.zip')


# Rotations, contradictions, options ----------------------------------------------------------------------------------


@pytest.mark.parametrize('annotated', ['stored', 'turned'])
@pytest.mark.parametrize('layout', ['voc', 'labelme'])
def test_photographs_with_a_rotation(layout, annotated, tmp_path):
    """Tools that know nothing of EXIF data annotate the stored pixels: the rotation is then not applied."""
    exif = Image.Exif()
    exif[0x0112] = 6
    size = SIZE if annotated == 'stored' else SIZE[::-1]
    for i in range(4):
        image(tmp_path / f'{i}.jpg', exif=exif)
        if layout == 'voc':
            (tmp_path / f'{i}.xml').write_text(xml_text(f'{i}.jpg', [('cat', 9, 7, 25, 23)], size))
        else:
            shape = dict(label='cat', points=np.reshape(square(), (-1, 2)).tolist(), shape_type='polygon')
            content = dict(shapes=[shape], imagePath=f'{i}.jpg', imageWidth=size[0], imageHeight=size[1])
            write_json(tmp_path / f'{i}.json', content)
    data = read(tmp_path)
    assert data.keep_orientation == (annotated == 'stored') and not data.findings.warnings
    assert {(sample.width, sample.height) for sample in all_samples(data)} == {size}
    if layout == 'voc':
        (tmp_path / '0.xml').write_text(xml_text('0.jpg', [('cat', 9, 7, 25, 23)], size[::-1]))
        with pytest.raises(ConfigError, match='annotated after the rotation of their EXIF data, others before it'):
            read(tmp_path)


def test_equal_images_in_different_classes_are_named(tmp_path):
    root = make_folders(tmp_path)
    shutil.copy(root / 'cat/cat0.jpg', root / 'dog/x.jpg')
    assert 'are in different classes' in warnings(read(root, 'labels'))


def test_names_with_prefixes(tmp_path):
    for i in range(4):
        image(tmp_path / f'images/image_{i}.jpg')
        write_map(tmp_path / f'masks/mask_{i}.png', label_map(0, 1))
    assert len(all_samples(read(tmp_path, 'maps'))) == 4


def test_a_size_without_end(tmp_path):
    make_voc(tmp_path)
    (tmp_path / '2.xml').write_text(xml_text('2.jpg', [('cat', 9, 7, 25, 23)], ('inf', 'inf')))
    with pytest.raises(ConfigError, match=r'size that is no number .2\.xml'):
        read(tmp_path)


@pytest.mark.parametrize('name', ['{{_base_.model}}', '{{$USER:x}}'])
def test_names_that_a_config_would_replace(name, tmp_path):
    with pytest.raises(ConfigError, match='two braces'):
        read(edited(tmp_path, lambda c: c['categories'][0].update(name=name)))


@pytest.mark.parametrize('options', [dict(seed='x'), dict(seed=[1]), dict(skip='no'), dict(layout=['coco'])])
def test_options_of_another_kind(options, tmp_path):
    cfg = load_config(str(ROOT / CONFIGS['boxes']))
    with pytest.raises(ConfigError, match=f'--data-options {next(iter(options))}='):
        use_data(cfg, dict(folder=str(make_coco(tmp_path / 'data')), **options), str(tmp_path / 'work'))


# A second look -------------------------------------------------------------------------------------------------------


def test_few_images_a_class(tmp_path):
    """Two images of each of twelve classes: a fifth of all validates, not the one that no class would spare."""
    for label in range(12):
        for i in range(2):
            image(tmp_path / f'{label}/{i}.jpg')
    data = read(tmp_path, 'labels')
    assert {split: len(found) for split, found in data.splits.items()} == dict(train=20, val=4)
    assert {sample.label for sample in data.splits['train']} == set(range(12))


def test_validation_without_objects_is_named(tmp_path):
    root = make_coco(tmp_path / 'data')
    content = json.loads((root / JSON).read_text())
    (root / JSON).rename(root / 'annotations/train.json')
    image(root / 'images/v.jpg')
    entry = dict(id=1, file_name='v.jpg', width=SIZE[0], height=SIZE[1])
    write_json(root / 'annotations/val.json', {**content, 'images': [entry], 'annotations': []})
    cfg = load_config(str(ROOT / CONFIGS['boxes']))
    use_data(cfg, dict(folder=str(root)), str(tmp_path / 'work'))
    report = check_data(cfg, ('train', 'val'))
    assert any('the val data have no object' in line for line in report.warning_lines())


@pytest.mark.parametrize(
    'make, name, task',
    [
        (make_coco, 'x.json', 'boxes'),
        (make_voc, 'x.xml', 'boxes'),
        (make_yolo, 'train/labels/x.txt', 'boxes'),
        (make_yolo, 'a.yaml', 'boxes'),
        (make_labelme, 'x.json', 'boxes'),
        (make_masks, 'classes.txt', 'maps'),
    ],
)
def test_links_to_nothing(make, name, task, tmp_path):
    (make(tmp_path) / name).symlink_to(tmp_path / 'nothing')
    with pytest.raises(ConfigError, match=f'links lead to no file .{name}'):
        read(tmp_path, task)


def test_a_number_of_a_class_that_is_a_mistake(tmp_path):
    """Without names there would be a hundred million classes."""
    root = make_yolo(tmp_path)
    (root / 'data.yaml').unlink()
    (root / 'train/labels/0.txt').write_text('99999999 0.5 0.5 0.2 0.2\n')
    with pytest.raises(ConfigError, match='a line of labels has the class 99999999'):
        read(root)


def test_names_that_are_lists(tmp_path):
    with pytest.raises(ConfigError, match=r'data\.yaml: names must be a list'):
        read(yolo_with('names: [[cat], {a: b}]\n')(tmp_path))


@pytest.mark.parametrize('layout', ['voc', 'labelme'])
def test_a_layout_that_is_asked_for_and_not_there(layout, tmp_path):
    with pytest.raises(ConfigError, match='there is no (Pascal VOC xml|LabelMe json) in it'):
        read(make_coco(tmp_path), layout=layout)


def test_a_json_file_cut_before_its_keys(tmp_path):
    root = make_coco(tmp_path)
    (root / 'data.json').write_text((root / JSON).read_text()[:200])
    shutil.rmtree(root / 'annotations')
    with pytest.raises(ConfigError, match=r'no layout is recognised .* data\.json does not parse as JSON'):
        read(root)
