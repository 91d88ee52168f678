"""Draw a small instance-segmentation data set of shapes in COCO's layout, on which ``tools/demo.py`` trains.

Every image shows a few textured, rotated shapes that partly cover each other, over a gradient with clutter. Colour and
texture are independent of the class, so a model has to recognise outlines.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from pycocotools import mask as mask_utils

from mona_mm.errors import ConfigError

CLASSES = ('disc', 'square', 'triangle', 'star')

_STAMP = 'demo_dataset.json'
_VERSION = 1  # of the drawing; sets of another version are drawn again
_SPLITS = ('train', 'val')
_SIZE = 128  # side of the images, in pixels
_SUPERSAMPLING = 4  # outlines are drawn this much larger, then averaged
_MIN_VISIBLE = 0.5  # share of a shape that later ones must leave uncovered


def make_demo_dataset(root: str | Path, train: int = 400, val: int = 60, seed: int = 0) -> Path:
    """Draw the data set into ``root``, unless it is there already. The same arguments give the same bytes.

    Args:
        root: a folder that does not exist, is empty, or was made by an earlier call, whose set is replaced if it had
            other arguments or was interrupted.
        train: number of training images (``train2017/``, ``annotations/instances_train2017.json``).
        val: number of validation images (``val2017/``, ``annotations/instances_val2017.json``).
        seed: seed of the random numbers.

    Returns:
        ``root`` as a path.

    Raises:
        ConfigError: if ``root`` holds other files, or a number is negative.
    """
    if min(train, val, seed) < 0:
        raise ConfigError(f'make_demo_dataset: train={train}, val={val} and seed={seed} must not be negative.')
    root = Path(root)
    wanted = dict(version=_VERSION, train=train, val=val, seed=seed)
    stamp = _read_stamp(root)
    if stamp == {**wanted, 'complete': True} and all(path.is_file() for path in _files(root, train, val)):
        return root

    for split in _SPLITS:
        shutil.rmtree(root / f'{split}2017', ignore_errors=True)
        (root / f'{split}2017').mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    # Written first, so that the next call recognises the folder of an interrupted one.
    _write_json(root / _STAMP, {**wanted, 'complete': False})
    for number, (split, count) in enumerate(zip(_SPLITS, (train, val), strict=True)):
        _write_split(root, split, count, np.random.default_rng([seed, number]))
    _write_json(root / _STAMP, {**wanted, 'complete': True})
    return root


def _read_stamp(root: Path) -> dict[str, Any] | None:
    """The contents of the stamp in ``root``; None if the folder is empty or does not exist."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        stamp = json.loads((root / _STAMP).read_text(encoding='utf-8'))
        if 'complete' in stamp:
            return stamp
    except (OSError, TypeError, ValueError):
        pass
    raise ConfigError(
        f'{root} holds other files than the demo data, and is left alone. Name another folder (--data-root).'
    )


def _files(root: Path, train: int, val: int) -> Iterator[Path]:
    for split, count in zip(_SPLITS, (train, val), strict=True):
        yield _annotation_file(root, split)
        yield from (root / f'{split}2017' / _image_name(i) for i in range(1, count + 1))


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'instances_{split}2017.json'


def _image_name(image_id: int) -> str:
    return f'{image_id:012d}.jpg'


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


def _write_split(root: Path, split: str, count: int, rng: Generator) -> None:
    images, annotations = [], []
    for image_id in range(1, count + 1):
        image, shapes = draw_image(rng)
        name = _image_name(image_id)
        cv2.imwrite(str(root / f'{split}2017' / name), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        images.append(dict(id=image_id, file_name=name, height=_SIZE, width=_SIZE))
        for category_id, mask in shapes:
            # Run lengths, since a polygon can neither cover exactly these pixels nor have a hole.
            rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=category_id,
                    segmentation=dict(size=[_SIZE, _SIZE], counts=rle['counts'].decode()),
                    area=int(mask_utils.area(rle)),
                    bbox=mask_utils.toBbox(rle).tolist(),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, start=1)]
    _write_json(
        _annotation_file(root, split),
        dict(
            info=dict(description='mona_mm demo shapes'), images=images, annotations=annotations, categories=categories
        ),
    )


def draw_image(rng: Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw an image, ``(H, W, 3)`` uint8 BGR, and its shapes as category ids (from 1) and visible masks, ``(H, W)``
    bool."""
    image = _background(rng)
    shapes: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []  # of the whole shapes
    for _ in range(rng.integers(2, 5)):
        for _ in range(20):  # places to try; a crowded image gets fewer shapes
            kind = int(rng.integers(len(CLASSES)))
            coverage = _coverage(kind, rng)
            mask = coverage >= 0.5
            below = [(category_id, other & ~mask) for category_id, other in shapes]
            if all(rest.sum() >= _MIN_VISIBLE * area for (_, rest), area in zip(below, areas, strict=True)):
                shapes = [*below, (kind + 1, mask)]
                areas.append(int(mask.sum()))
                alpha = coverage[..., None]
                image = alpha * _paint(rng) + (1 - alpha) * image
                break
    noise = rng.normal(0, 4, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), shapes


def _coverage(kind: int, rng: Generator) -> np.ndarray:
    """How much of every pixel a random shape of a class covers, ``(H, W)`` in [0, 1]."""
    radius = rng.uniform(14, 30)
    centre = rng.uniform(radius, _SIZE - radius, 2)
    turn = rng.uniform(0, 2 * np.pi)
    squeeze = rng.uniform(0.75, 1.0)
    corners, inner = {'disc': (40, None), 'square': (4, None), 'triangle': (3, None), 'star': (5, 0.45)}[CLASSES[kind]]
    steps = corners if inner is None else 2 * corners
    angles = 2 * np.pi * np.arange(steps) / steps
    radii = np.where(np.arange(steps) % 2, inner or 1.0, 1.0) * radius
    x, y = radii * np.cos(angles), radii * np.sin(angles) * squeeze
    points = np.stack((x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)), axis=1) + centre

    large = np.zeros((_SIZE * _SUPERSAMPLING,) * 2, np.uint8)
    cv2.fillPoly(large, [np.rint(points * _SUPERSAMPLING).astype(np.int32)], 1)
    return large.reshape(_SIZE, _SUPERSAMPLING, _SIZE, _SUPERSAMPLING).mean(axis=(1, 3))


def _paint(rng: Generator) -> np.ndarray:
    """A random texture in two related colours, ``(H, W, 3)``."""
    colour = rng.uniform(30, 255, 3)
    colour[rng.integers(3)] = rng.uniform(200, 255)  # brighter than the background
    second = np.clip(colour + rng.uniform(-60, 60, 3), 0, 255)
    turn, period = rng.uniform(0, np.pi), rng.uniform(5, 12)
    y, x = np.mgrid[:_SIZE, :_SIZE]
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    stripes, across = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    pattern = (np.zeros_like(stripes), stripes, stripes * across)[rng.integers(3)]  # plain, striped, chequered
    return colour + (second - colour) * (0.5 + 0.5 * np.clip(4 * pattern, -1, 1))[..., None]


def _background(rng: Generator) -> np.ndarray:
    """A gradient with blurred blotches and thin lines, which are nothing to find, ``(H, W, 3)``."""
    y, x = np.mgrid[:_SIZE, :_SIZE] / (_SIZE - 1)
    turn = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.5 * ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn))[..., None]
    image = ramp * rng.uniform(30, 140, 3) + (1 - ramp) * rng.uniform(30, 140, 3)
    blotches = cv2.resize(rng.normal(0, 18, (8, 8, 3)), (_SIZE, _SIZE), interpolation=cv2.INTER_CUBIC)
    image = np.ascontiguousarray(image + blotches)
    for _ in range(rng.integers(2, 7)):
        start, end = rng.integers(0, _SIZE, (2, 2)).tolist()
        cv2.line(image, start, end, rng.uniform(20, 220, 3).tolist(), int(rng.integers(1, 3)))
    return image
