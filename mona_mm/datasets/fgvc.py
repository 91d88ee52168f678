"""The data sets of the fine-grained FGVC tasks, whose lists are in JSON."""

import json
import os.path as osp
from typing import Any

from mmpretrain.datasets import BaseDataset

from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.registry import DATASETS


@DATASETS.register_module()
class FGVCJson(BaseDataset):
    """Images and classes from a JSON object that maps the path of an image, below ``data_prefix``, to a class id.

    Ids are either all numbers or all names. The label of an id is its index among the sorted ids of the ``train.json``
    beside the list, so that labels are the same in a split that lacks some of the classes.

    Source of the format: Jia et al., "Visual Prompt Tuning", ECCV 2022, and its published lists.

    Args:
        ann_file: the list, ``train.json``, ``val.json`` or ``test.json``.

    Raises:
        MissingFileError: if the list or the ``train.json`` beside it does not exist.
        ConfigError: if one of them is not such an object, or a class of the list is not in ``train.json``.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        """The ``img_path`` and ``gt_label`` of every image, in the order of the list."""
        annotations = _read_list(self.ann_file)
        train_file = osp.join(osp.dirname(self.ann_file), 'train.json')
        labels = {id_: label for label, id_ in enumerate(sorted(set(_read_list(train_file).values())))}
        unknown = sorted(set(annotations.values()) - labels.keys(), key=str)
        if unknown:
            raise ConfigError(f'{self.ann_file} has images of class {unknown[0]!r}, of which {train_file} has none.')
        return [
            dict(img_path=osp.join(self.img_prefix, name), gt_label=labels[id_]) for name, id_ in annotations.items()
        ]


def _read_list(file: str) -> dict[str, int | str]:
    if not osp.isfile(file):
        raise MissingFileError(f'There is no {file}: FGVCJson needs the list of a split and train.json beside it.')
    with open(file, encoding='utf-8') as text:
        try:
            content = json.load(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f'{file} is not a JSON file: {error}.') from error
    types = {type(id_) for id_ in content.values()} if isinstance(content, dict) else set()
    if types not in ({int}, {str}):
        raise ConfigError(
            f'{file} must be a JSON object of image paths to ids of classes, all numbers or all names, such as '
            '{"001.Albatross/1.jpg": 1}.'
        )
    return content
