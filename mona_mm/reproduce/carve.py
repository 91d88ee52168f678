"""Set a validation split apart from the training images of a set that has none, by a seed, stratified by class."""

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
"""One image of so many is for validation."""


def choose(groups: Mapping[str, Hashable], seed: int = SEED, every: int = EVERY) -> set[str]:
    """The images for validation: of every group one in ``every``, rounded, and at least one of two or more.

    Args:
        groups: the group of each image by the image's name.
        seed: of the choice, which depends on the names and groups alone.
        every: see above.
    """
    generator, chosen = np.random.default_rng(seed), set()
    for group in sorted(set(groups.values()), key=str):
        names = sorted(name for name, own in groups.items() if own == group)
        count = max(round(len(names) / every), 1) if len(names) > 1 else 0
        chosen.update(names[i] for i in generator.permutation(len(names))[:count])
    return chosen


def carve_coco(cfg: Config, folder: Path) -> None:
    """Split the annotation file of a COCO training set in two, and set training and validation of a config to them.

    An image is of the group of the rarest class in it.

    Args:
        cfg: the config, which is changed; its test set stays.
        folder: where the two files are written.
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
