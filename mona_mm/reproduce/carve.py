"""Split validation images off a training set that has no validation split, by a seed and stratified by class."""

import copy
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from mmengine.config import Config, ConfigDict

from mona_mm.checkpoint.atomic import AtomicLocalBackend

SEED = 0
EVERY = 5
"""One image in this many is chosen for validation."""


def choose(groups: Mapping[str, Hashable], seed: int = SEED, every: int = EVERY) -> set[str]:
    """Choose the images for validation.

    Each group contributes one image in ``every``, rounded, and at least one if it has two or more images.

    Args:
        groups: the group of each image, by the name of the image.
        seed: the seed of the choice, which depends on nothing else but the names and groups.
        every: the number of images in a group for each image that is chosen.
    """
    generator, chosen = np.random.default_rng(seed), set()
    for group in sorted(set(groups.values()), key=str):
        names = sorted(name for name, own in groups.items() if own == group)
        count = max(round(len(names) / every), 1) if len(names) > 1 else 0
        chosen.update(names[i] for i in generator.permutation(len(names))[:count])
    return chosen


def carve_coco(cfg: Config, folder: Path) -> None:
    """Split the annotation file of a COCO training set in two, and make a config train and validate on the two parts.

    The rarest class in an image determines the group of the image.

    Args:
        cfg: the config, which is changed in place, except for its test set.
        folder: the folder into which the two files are written.
    """
    dataset = cfg.train_dataloader.dataset
    content = json.loads(_annotations(dataset).read_text(encoding='utf-8'))
    classes: dict[int, list[int]] = {image['id']: [] for image in content['images']}
    for annotation in content['annotations']:
        classes[annotation['image_id']].append(annotation['category_id'])
    groups = rarest(classes)
    chosen = choose({image['file_name']: groups[image['id']] for image in content['images']})
    files = {}
    for split, inside in (('train', False), ('val', True)):
        images = [image for image in content['images'] if (image['file_name'] in chosen) == inside]
        ids = {image['id'] for image in images}
        annotations = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
        files[split] = _write(json.dumps({**content, 'images': images, 'annotations': annotations}), folder, split)
    _use(cfg, files)
    cfg.val_evaluator.ann_file = files['val']


def carve_voc(cfg: Config, folder: Path) -> None:
    """Split the list of the training images of a VOC data set in two, as :func:`carve_coco` does for COCO."""
    dataset = cfg.train_dataloader.dataset
    annotations = Path(dataset.data_root, dataset.data_prefix.get('sub_data_root', ''), 'Annotations')
    names = _annotations(dataset).read_text(encoding='utf-8').split()
    classes = {
        name: [thing.findtext('name') for thing in ElementTree.parse(annotations / f'{name}.xml').iterfind('object')]
        for name in names
    }
    _split_list(cfg, folder, dict(zip(names, names, strict=True)), rarest(classes))


def carve_labels(cfg: Config, folder: Path) -> None:
    """Split a list of training images and their labels in two, as :func:`carve_coco` does for COCO.

    A line of the list is the path of an image and the number of its class.
    """
    lines = _annotations(cfg.train_dataloader.dataset).read_text(encoding='utf-8').splitlines()
    paths = {line.rpartition(' ')[0]: line for line in lines}
    _split_list(cfg, folder, paths, {path: line.rpartition(' ')[2] for path, line in paths.items()})


def rarest(classes: Mapping[Hashable, Sequence[Any]]) -> dict[Hashable, Any]:
    """The class of an image that has the fewest objects in all images, by image; None for an image without objects."""
    frequency = Counter(cls for own in classes.values() for cls in own)
    return {image: min(own, key=lambda cls: (frequency[cls], cls)) if own else None for image, own in classes.items()}


def _split_list(cfg: Config, folder: Path, lines: Mapping[str, str], groups: Mapping[str, Hashable]) -> None:
    """Write the lines of the images for training and of those for validation, and make a config use the two files."""
    chosen = choose(groups)
    files = {}
    for split, inside in (('train', False), ('val', True)):
        kept = [line for name, line in lines.items() if (name in chosen) == inside]
        files[split] = _write('\n'.join([*kept, '']), folder, split, '.txt')
    _use(cfg, files)


def _annotations(dataset: ConfigDict) -> Path:
    return Path(dataset.data_root, dataset.ann_file)


def _write(text: str, folder: Path, split: str, suffix: str = '.json') -> str:
    file = str(folder / f'{split}{suffix}')
    AtomicLocalBackend().put_text(text, file)
    return file


def _use(cfg: Config, files: Mapping[str, str]) -> None:
    """Make a config train and validate on the images of its training set that two annotation files list."""
    dataset = cfg.train_dataloader.dataset
    dataset.ann_file = files['train']
    cfg.val_dataloader.dataset.ann_file = files['val']
    if 'data_prefix' in dataset:
        cfg.val_dataloader.dataset.data_prefix = copy.deepcopy(dataset.data_prefix)
