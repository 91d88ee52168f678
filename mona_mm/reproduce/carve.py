"""Split validation images off a training set that has no validation split, by a seed and stratified by class."""

import json
import os.path as osp
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
from mmengine.config import Config

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
    content = json.loads(Path(osp.join(dataset.data_root, dataset.ann_file)).read_text(encoding='utf-8'))
    frequency = Counter(annotation['category_id'] for annotation in content['annotations'])
    rarest = {image['id']: 0 for image in content['images']}  # 0 for an image without objects
    for annotation in content['annotations']:
        image, category = annotation['image_id'], annotation['category_id']
        if not rarest[image] or (frequency[category], category) < (frequency[rarest[image]], rarest[image]):
            rarest[image] = category
    chosen = choose({image['file_name']: rarest[image['id']] for image in content['images']})
    files = {}
    for split, inside in (('train', False), ('val', True)):
        images = [image for image in content['images'] if (image['file_name'] in chosen) == inside]
        ids = {image['id'] for image in images}
        annotations = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
        files[split] = str(folder / f'{split}.json')
        AtomicLocalBackend().put_text(
            json.dumps({**content, 'images': images, 'annotations': annotations}), files[split]
        )
    dataset.ann_file = files['train']
    cfg.val_dataloader.dataset.update(ann_file=files['val'], data_prefix=dict(dataset.data_prefix))
    cfg.val_evaluator.ann_file = files['val']
