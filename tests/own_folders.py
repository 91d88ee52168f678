"""Small folders of images and annotations in each layout that --data recognises."""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 36)  # width and height
CLASSES = ('cat', 'dog')


def image(path: Path, size: tuple[int, int] = SIZE, mode: str = 'RGB', **options) -> Path:
    """Write a picture of noise, another one for every path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32('/'.join(path.parts[-3:]).encode()))
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(path, **options)
    return path


def square(x: float = 8, y: float = 6, side: float = 16) -> list[float]:
    """The corners of a square as a polygon."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def coco_content(names: list[str], size: tuple[int, int] = SIZE, masks: bool = True) -> dict:
    """A COCO file in which every image has a cat, every second one a dog, too."""
    annotations = []
    for i in range(len(names)):
        for label in (3, 7)[: 1 + i % 2]:
            annotation = dict(id=len(annotations) + 1, image_id=i, category_id=label, bbox=[8.0, 6.0, 16.0, 16.0])
            annotation |= dict(area=256.0, iscrowd=0) | (dict(segmentation=[square()]) if masks else {})
            annotations.append(annotation)
    images = [dict(id=i, file_name=name, width=size[0], height=size[1]) for i, name in enumerate(names)]
    categories = [dict(id=3, name='cat'), dict(id=7, name='dog')]
    return dict(images=images, annotations=annotations, categories=categories)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, change) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_coco(root: Path, count: int = 6) -> Path:
    """One file in annotations/, images in images/, no splits."""
    names = [f'{i}.jpg' for i in range(count)]
    for name in names:
        image(root / 'images' / name)
    write_json(root / 'annotations/all.json', coco_content(names))
    return root


def xml_text(name: str, objects: list[tuple], size: tuple[int, int] | None = SIZE) -> str:
    """A VOC file; each object is a name, xmin, ymin, xmax and ymax."""
    things = ''.join(
        f'<object><name>{n}</name><difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>'
        f'<ymax>{d}</ymax></bndbox></object>'
        for n, a, b, c, d in objects
    )
    said = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>' if size else ''
    return f'<annotation><filename>{name}</filename>{said}{things}</annotation>'


def make_voc(root: Path, count: int = 6) -> Path:
    """Images and xml files side by side in one folder."""
    for i in range(count):
        image(root / f'{i}.jpg')
        objects = [('cat', 9, 7, 25, 23), ('dog', 20, 10, 40, 30)][: 1 + i % 2]
        (root / f'{i}.xml').write_text(xml_text(f'{i}.jpg', objects))
    return root


def make_yolo(root: Path, count: int = 4) -> Path:
    """data.yaml, train/ and valid/ with images/ and labels/; boxes, and a polygon in every second file."""
    for split in ('train', 'valid'):
        for i in range(count):
            image(root / split / 'images' / f'{i}.jpg')
            file = root / split / 'labels' / f'{i}.txt'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('0 0.5 0.5 0.25 0.5\n' + '1 0.25 0.25 0.75 0.25 0.5 0.75\n' * (i % 2))
    (root / 'data.yaml').write_text('train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [cat, dog]\n')
    return root


def make_labelme(root: Path, count: int = 6) -> Path:
    """A json file beside each image."""
    for i in range(count):
        image(root / f'{i}.jpg')
        points = np.reshape(square(), (-1, 2)).tolist()
        shapes = [dict(label=name, points=points, shape_type='polygon') for name in CLASSES[: 1 + i % 2]]
        content = dict(shapes=shapes, imagePath=f'{i}.jpg', imageData=None, imageWidth=SIZE[0], imageHeight=SIZE[1])
        write_json(root / f'{i}.json', content)
    return root


def write_map(path: Path, content: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(content).save(path)
    return path


def label_map(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A label map of vertical stripes, one for each value."""
    stripes = np.array_split(np.arange(size[0]), len(values))
    row = np.concatenate([np.full(len(part), value) for part, value in zip(stripes, values, strict=True)])
    return np.tile(row.astype(np.uint8), (size[1], 1))


def make_masks(root: Path, count: int = 6, values: tuple[int, ...] = (0, 1, 2)) -> Path:
    """images/ and masks/ with numbers of classes."""
    for i in range(count):
        image(root / 'images' / f'{i}.jpg')
        write_map(root / 'masks' / f'{i}.png', label_map(*values))
    return root


def make_folders(root: Path, count: int = 5) -> Path:
    """A folder for each class."""
    for name in CLASSES:
        for i in range(count):
            image(root / name / f'{name}{i}.jpg')
    return root


MAKERS = dict(
    coco=make_coco, voc=make_voc, yolo=make_yolo, labelme=make_labelme, masks=make_masks, folders=make_folders
)
TASKS = dict.fromkeys(('coco', 'voc', 'yolo', 'labelme'), 'boxes') | dict(masks='maps', folders='labels')
CONFIGS = dict(
    boxes='configs/custom/custom_mask_rcnn_swin_t.py',
    maps='configs/custom/custom_upernet_swin_t.py',
    labels='configs/custom/custom_classifier_dinov2_s.py',
)

_SWIN = {
    'model.backbone.base.init_cfg': None,
    'model.backbone.base.embed_dims': 12,
    'model.backbone.base.depths': [1, 1, 1, 1],
    'model.backbone.base.num_heads': [1, 1, 2, 2],
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'train_dataloader.batch_size': 2,
    'default_hooks.logger.interval': 1,
    **{f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')},
    **{f'{split}_dataloader.persistent_workers': False for split in ('train', 'val', 'test')},
}
_SMALL_BOXES = {f'{s}_dataloader.dataset.pipeline.{i}.scale': (64, 64) for s, i in dict(train=2, val=1, test=1).items()}
NARROW = {
    'custom_retinanet_swin_t': {
        **_SWIN,
        **_SMALL_BOXES,
        'model.neck.in_channels': [12, 24, 48, 96],
        'model.neck.out_channels': 16,
        'model.bbox_head.in_channels': 16,
        'model.bbox_head.feat_channels': 16,
        'model.bbox_head.norm_cfg.num_groups': 4,
        'model.bbox_head.stacked_convs': 1,
        'model.test_cfg.score_thr': 0.0,
        'model.test_cfg.max_per_img': 10,
    },
    'custom_mask_rcnn_swin_t': {
        **_SWIN,
        **_SMALL_BOXES,
        'model.neck.in_channels': [12, 24, 48, 96],
        'model.neck.out_channels': 16,
        'model.rpn_head.in_channels': 16,
        'model.rpn_head.feat_channels': 16,
        'model.roi_head.bbox_roi_extractor.out_channels': 16,
        'model.roi_head.bbox_head.in_channels': 16,
        'model.roi_head.bbox_head.fc_out_channels': 16,
        'model.train_cfg.rpn_proposal.max_per_img': 16,
        'model.test_cfg.rpn.max_per_img': 16,
        'model.test_cfg.rcnn.score_thr': 0.0,
        'model.test_cfg.rcnn.max_per_img': 5,
    },
    'custom_upernet_swin_t': {
        **_SWIN,
        'model.decode_head.in_channels': [12, 24, 48, 96],
        'model.decode_head.channels': 16,
        'model.data_preprocessor.size': (64, 64),
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
    },
    'custom_classifier_dinov2_s': {
        **{key: value for key, value in _SWIN.items() if 'base.' not in key},
        'model.backbone.base.init_cfg': None,
        'model.backbone.base.arch': dict(
            _delete_=True, embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32
        ),
        'model.backbone.base.img_size': 56,
        'model.backbone.peft.bottleneck': 8,
        'model.head.in_channels': 16,
        'train_dataloader.dataset.pipeline.1.scale': 56,
        'val_dataloader.dataset.pipeline.2.crop_size': 56,
        'test_dataloader.dataset.pipeline.2.crop_size': 56,
    },
}
"""What makes the configs for one's own data small enough to train in seconds."""
NARROW_MASKS = {
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16,
}
