"""The check of a config's data: what the libraries read passes, what would silently be wrong is refused."""

import contextlib
import copy
import shutil

import numpy as np
import pytest
from conftest import ROOT
from mmdet.datasets import Objects365V1Dataset
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from own_folders import (
    CLASSES,
    SIZE,
    coco_content,
    edit_json,
    image,
    label_map,
    make_coco,
    make_folders,
    make_masks,
    write_json,
    write_map,
    xml_text,
)

from mona_mm.config.load import load_config
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, MissingFileError, UserError


def config(scope: str, dataset: dict, model: dict | None = None, **splits) -> Config:
    loaders = {f'{split}_dataloader': dict(dataset=each) for split, each in dict(train=dataset, **splits).items()}
    return Config(copy.deepcopy(dict(default_scope=scope, model=model or {}, **loaders)))


def coco_set(root, file='annotations/all.json', classes=CLASSES, **options) -> dict:
    return {
        **dict(type='CocoDataset', metainfo=dict(classes=classes), data_root=str(root), ann_file=file),
        **dict(data_prefix=dict(img='images/'), pipeline=[]),
        **options,
    }


# What the libraries read ---------------------------------------------------------------------------------------------


def test_categories_in_another_order_than_their_ids(tmp_path):
    """mmdet's Objects365 sorts them, its CocoDataset does not: each is right as the library reads it."""
    classes = list(Objects365V1Dataset.METAINFO['classes'])
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    np.random.default_rng(0).shuffle(categories)
    image(tmp_path / 'images/1.jpg')
    annotation = dict(id=1, image_id=1, category_id=6, bbox=[5, 5, 20, 20], area=400, iscrowd=0)
    content = dict(images=[dict(id=1, file_name='1.jpg', width=SIZE[0], height=SIZE[1])], annotations=[annotation])
    write_json(tmp_path / 'a.json', dict(content, categories=categories))
    options = coco_set(tmp_path, 'a.json', type='Objects365V1Dataset')
    del options['metainfo']
    report = check_data(config('mmdet', options), ('train',))
    assert report.splits['train'].objects == {5: 1}
    content['annotations'][0]['category_id'] = 7
    write_json(tmp_path / 'b.json', dict(content, categories=[dict(id=7, name='b'), dict(id=3, name='a')]))
    assert check_data(config('mmdet', coco_set(tmp_path, 'b.json', ('b', 'a'))), ('train',)).splits['train'].objects[0]
    with pytest.raises(ConfigError, match=r'their order differs.*classes="\[b,a\]"'):
        check_data(config('mmdet', coco_set(tmp_path, 'b.json', ('a', 'b'))), ('train',))


def test_wider_face(tmp_path):
    image(tmp_path / 'WIDER_train/0--Parade/p1.jpg')
    file = tmp_path / 'WIDER_train/Annotations/p1.xml'
    file.parent.mkdir(parents=True)
    file.write_text(
        xml_text('p1.jpg', [('face', 5, 5, 30, 30)]).replace('<annotation>', '<annotation><folder>0--Parade</folder>')
    )
    (tmp_path / 'train.txt').write_text('p1\n')
    options = dict(type='WIDERFaceDataset', data_root=str(tmp_path), ann_file='train.txt', pipeline=[])
    report = check_data(config('mmdet', dict(options, data_prefix=dict(img='WIDER_train'))), ('train',))
    assert report.splits['train'].objects == {0: 1}


def test_names_with_spaces(tmp_path):
    names = ('WhatsApp Image 2020-05-01', 'ali (1)')
    for name in names:
        image(tmp_path / f'VOC2007/JPEGImages/{name}.jpg')
        file = tmp_path / f'VOC2007/Annotations/{name}.xml'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(xml_text(f'{name}.jpg', [('car', 5, 5, 30, 30)]))
    (tmp_path / 'list.txt').write_text('\n'.join(names))
    options = dict(type='VOCDataset', metainfo=dict(classes=('car',)), data_root=str(tmp_path), ann_file='list.txt')
    options |= dict(data_prefix=dict(sub_data_root='VOC2007/'), pipeline=[])
    assert check_data(config('mmdet', options), ('train',)).splits['train'].objects == {0: 2}
    (tmp_path / 'VOC2007/Annotations/ali (1).xml').write_text('<annotation>')
    with pytest.raises(ConfigError, match=r'ali \(1\)\.xml is no xml file that can be read'):
        check_data(config('mmdet', options), ('train',))
    (tmp_path / 'VOC2007/Annotations/ali (1).xml').unlink()
    with pytest.raises(MissingFileError, match=r'list\.txt lists ali \(1\), but there is no .*ali \(1\)\.xml'):
        check_data(config('mmdet', options), ('train',))


class MappedBackend(LocalBackend):
    """A backend whose paths are not those of files, as those of clusters are."""

    def __init__(self, path_mapping):
        self.path_mapping = path_mapping

    @contextlib.contextmanager
    def get_local_path(self, path):
        for old, new in self.path_mapping.items():
            path = str(path).replace(old, new)
        yield path


def test_a_backend_that_maps_paths(tmp_path):
    register_backend('mapped', MappedBackend, force=True)
    make_coco(tmp_path)
    backend = dict(backend='mapped', path_mapping={'store/mine': str(tmp_path)})
    options = coco_set('store/mine', backend_args=backend)
    assert check_data(config('mmdet', options), ('train',)).splits['train'].objects == {0: 6, 1: 3}


def test_a_list_without_labels(tmp_path):
    image(tmp_path / 'x/1.jpg')
    (tmp_path / 'test.txt').write_text('x/1.jpg\n')
    options = dict(type='CustomDataset', with_label=False, data_root=str(tmp_path), ann_file='test.txt', pipeline=[])
    assert (
        check_data(config('mmpretrain', options, dict(head=dict(num_classes=3))), ('train',)).splits['train'].kept == 1
    )


# What is dropped is said ---------------------------------------------------------------------------------------------


def test_dropped_boxes_are_counted(tmp_path):
    """Everything that mmdet's CocoDataset drops in silence, and images that its filters leave out."""
    make_coco(tmp_path)

    def change(content):
        boxes = [[8, 6, 0, 9], [8, 6, -4, 9], [90, 6, 5, 5], [8, 6, 0.5, 9]]
        for annotation, box in zip(content['annotations'], boxes, strict=False):
            annotation['bbox'] = box
        content['annotations'][4]['area'] = 0
        content['categories'].append(dict(id=9, name='cow'))
        content['annotations'][5]['category_id'] = 9

    edit_json(tmp_path / 'annotations/all.json', change)
    options = coco_set(tmp_path, filter_cfg=dict(filter_empty_gt=True, min_size=32))
    report = check_data(config('mmdet', options), ('train',))
    lines = report.warning_lines()
    for count, text in (
        (2, 'boxes have no width or height'), (1, 'boxes lie outside'), (1, 'boxes are smaller than a pixel'),
        (1, 'area of zero'), (1, 'categories that the config does not name'),
    ):  # fmt: skip
        assert any(line.startswith(f'warning: {count} ') and text in line for line in lines), (text, lines)
    assert sum(report.splits['train'].objects.values()) == 9 - 6
    assert len(report.lines('x')) <= 15


def test_what_could_not_be_learnt(tmp_path):
    """Keys that are missing, images that are all too small, masks that are not there, sizes that are not the files'."""
    make_coco(tmp_path)
    file = tmp_path / 'annotations/all.json'
    good = file.read_text()

    def check(message, change=None, **options):
        file.write_text(good)
        if change:
            edit_json(file, change)
        with pytest.raises(UserError, match=message):
            check_data(config('mmdet', coco_set(tmp_path, **options)), ('train',))

    check('"annotations".*no "area"', lambda c: c['annotations'][0].pop('area'))
    check('"annotations".*no "bbox"', lambda c: c['annotations'][0].pop('bbox'))
    check('"images".*no "height"', lambda c: c['images'][0].pop('height'))
    check('ids occur more than once.*"annotations"', lambda c: c['annotations'][1].update(id=1))
    check('none of 6 images is left.*min_size', filter_cfg=dict(min_size=64))
    with_mask = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    check('1 of 9 objects.*no mask.*--data', lambda c: c['annotations'][0].pop('segmentation'), pipeline=with_mask)
    check('another size than their annotations say', lambda c: c['images'][0].update(width=36, height=48))
    check('no object of the classes', lambda c: c.update(annotations=[]))
    file.write_text('')
    with pytest.raises(ConfigError, match=r'all\.json is no JSON file'):
        check_data(config('mmdet', coco_set(tmp_path)), ('train',))
    file.write_text(good)
    (tmp_path / 'images/2.jpg').unlink()
    with pytest.raises(MissingFileError, match=r'An image \(1 of 6\).*2\.jpg'):
        check_data(config('mmdet', coco_set(tmp_path)), ('train',))


def test_equal_images_in_train_and_val(tmp_path):
    make_coco(tmp_path / 'a')
    make_coco(tmp_path / 'b')
    shutil.copy(tmp_path / 'a/images/1.jpg', tmp_path / 'b/images/4.jpg')
    cfg = config('mmdet', coco_set(tmp_path / 'a'), val=coco_set(tmp_path / 'b', test_mode=True))
    (line,) = check_data(cfg, ('train', 'val')).warning_lines()
    assert 'images are in train and val alike (a/images/1.jpg = b/images/4.jpg)' in line


# Silent and wrong ----------------------------------------------------------------------------------------------------


def maps(root, classes, **options) -> dict:
    prefix = dict(img_path='images', seg_map_path='masks')
    options = dict(type='BaseSegDataset', metainfo=dict(classes=classes), data_root=str(root), **options)
    return dict(options, data_prefix=prefix, pipeline=[])


def test_label_maps(tmp_path):
    """Masks of 0 and 255, names that happen to be ADE20K's, other suffixes, an option that is set on one side only."""
    make_masks(tmp_path / 'a', values=(0, 1))
    assert check_data(config('mmseg', maps(tmp_path / 'a', ('sky', 'car'))), ('train',)).splits['train'].present[1] == 6
    trap = maps(tmp_path / 'a', ('person', 'car')) | dict(type='ADE20KDataset', reduce_zero_label=False)
    with pytest.raises(ConfigError, match='takes person by its own number 12.*--data'):
        check_data(config('mmseg', trap), ('train',))
    with pytest.raises(MissingFileError, match=r'no label map .*0_mask\.png; there is 0\.png, so set seg_map_suffix'):
        check_data(config('mmseg', maps(tmp_path / 'a', ('x', 'y'), seg_map_suffix='_mask.png')), ('train',))
    wrong = maps(tmp_path / 'a', ('x', 'y'))
    wrong['pipeline'] = [dict(type='LoadAnnotations', reduce_zero_label=True)]
    with pytest.raises(ConfigError, match='reduce_zero_label=False.*set both alike'):
        check_data(config('mmseg', wrong), ('train',))
    write_map(tmp_path / 'a/masks/0.png', label_map(0, 1, size=(20, 20)))
    with pytest.raises(ConfigError, match='another size than their image'):
        check_data(config('mmseg', maps(tmp_path / 'a', ('x', 'y'))), ('train',))
    make_masks(tmp_path / 'b', values=(0, 255))
    with pytest.raises(ConfigError, match='only 0 and 255.*lesion would never be learnt'):
        check_data(config('mmseg', maps(tmp_path / 'b', ('background', 'lesion'))), ('train',))


def test_the_advice_of_own_classes_works(tmp_path):
    """What the error about ADE20K's classes says to set can be set, and passes."""
    make_masks(tmp_path, values=(0, 1))
    for name in ('training', 'validation'):
        shutil.copytree(tmp_path / 'images', tmp_path / 'images' / name, ignore=shutil.ignore_patterns('training'))
        shutil.copytree(tmp_path / 'masks', tmp_path / 'annotations' / name)
    options = {'data_root': str(tmp_path), 'classes': ['road', 'lane']}
    file = str(ROOT / 'configs/mona/upernet_swin_l_ade20k.py')
    with pytest.raises(
        ConfigError, match="no class lane.*'BaseSegDataset' and reduce_zero_label to False there and in"
    ):
        check_data(load_config(file, options), ('train',))
    for split, step in (('train', 1), ('val', 2)):
        options[f'{split}_dataloader.dataset.type'] = 'BaseSegDataset'
        options[f'{split}_dataloader.dataset.reduce_zero_label'] = False
        options[f'{split}_dataloader.dataset.pipeline.{step}.reduce_zero_label'] = False
    check_data(load_config(file, options), ('train', 'val'))


def test_heads_of_another_number_of_classes(tmp_path):
    make_coco(tmp_path)
    for model, place in (
        (dict(bbox_head=dict(num_classes=80)), 'model.bbox_head.num_classes is 80'),
        (dict(roi_head=dict(bbox_head=[dict(num_classes=2), dict(num_classes=3)])), 'bbox_head.1.num_classes is 3'),
        (dict(roi_head=dict(mask_head=dict(num_classes=1))), 'mask_head.num_classes is 1'),
    ):
        with pytest.raises(ConfigError, match=f'{place}, but CocoDataset has 2 classes: cat, dog'):
            check_data(config('mmdet', coco_set(tmp_path), model), ('train',))
    check_data(config('mmdet', coco_set(tmp_path), dict(rpn_head=dict(num_classes=1))), ('train',))


def test_folders_of_classes(tmp_path):
    """Names that are not the folders', an order that is not theirs, a head of other outputs than there are folders."""
    make_folders(tmp_path)

    def check(count, classes=None, **options):
        metainfo = dict(metainfo=dict(classes=classes)) if classes else {}
        options = dict(type='CustomDataset', data_root=str(tmp_path), pipeline=[], **metainfo, **options)
        return check_data(config('mmpretrain', options, dict(head=dict(num_classes=count))), ('train',))

    assert check(2).classes == check(2, ('cat', 'dog')).classes == CLASSES
    for classes in (('dog', 'cat'), ('cats', 'dogs')):
        with pytest.raises(ConfigError, match=r'are not the folders.*classes="\[cat,dog\]"'):
            check(2, classes)
    with pytest.raises(ConfigError, match='model.head.num_classes is 102, but CustomDataset has 2'):
        check(102)
    (tmp_path / 'list.txt').write_text('cat/cat0.jpg 0\ndog/dog0.jpg 1\n')
    with pytest.raises(ConfigError, match='labels from 0 to 1, but the head has 102 outputs'):
        check(102, ann_file='list.txt')


def test_digits_as_names(tmp_path):
    """Names of classes on the command line that look like numbers are names."""
    make_coco(tmp_path)
    edit_json(
        tmp_path / 'annotations/all.json', lambda c: [e.update(name=str(i)) for i, e in enumerate(c['categories'])]
    )
    file = tmp_path / 'config.py'
    dataset = coco_set(tmp_path)
    file.write_text(f"default_scope = 'mmdet'\nmodel = dict()\ntrain_dataloader = dict(dataset={dataset!r})\n")
    cfg = load_config(str(file), dict(classes=[0, 1]))
    assert cfg.train_dataloader.dataset.metainfo.classes == ('0', '1')
    check_data(cfg, ('train',))


def test_pictures_of_equal_names(tool, demo_data, tmp_path):
    """--show-dir would overwrite one picture by another: the two images are named."""
    root = tmp_path / 'data'
    names = ['a/x.jpg', 'b/x.jpg', 'c.jpg', 'd.jpg']
    for name in names:
        image(root / name)
    write_json(root / 'all.json', coco_content(names))
    (tmp_path / 'model.pth').touch()
    arguments = ['configs/custom/custom_retinanet_swin_t.py', str(tmp_path / 'model.pth'), '--data', str(root)]
    arguments += ['--work-dir', str(tmp_path / 'work'), '--show-dir', str(tmp_path), '--data-options', 'val=0.9']
    status, _, error = tool('test.py', *arguments)
    assert status == 2 and 'a/x.jpg and' in error and 'b/x.jpg have one file name' in error
