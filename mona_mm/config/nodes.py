"""Change a config wherever something stands in it."""

from collections.abc import Callable, Iterator
from typing import Any

from mmengine.config import Config

SPLITS = ('train', 'val', 'test', 'sensitivity')
"""The splits of a config, each of which is defined by its ``<split>_dataloader``."""


def datasets(cfg: Config, split: str) -> Iterator[dict]:
    """Yield the data sets of a split, also those within wrappers (RepeatDataset, ConcatDataset, ...)."""
    pending = [(cfg.get(f'{split}_dataloader') or {}).get('dataset')]
    while pending:
        dataset = pending.pop(0)
        inner = dataset and (dataset.get('dataset') or dataset.get('datasets'))
        if inner:
            pending += inner if isinstance(inner, list | tuple) else [inner]
        elif dataset:
            yield dataset


def map_children(node: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every child of a dict or list in place, and of a tuple in a new tuple.

    Lazy imports of a pure-Python config stay lazy, since a class could not be dumped as text.
    """
    if isinstance(node, tuple):
        return tuple(function(child) for child in node)
    items = dict.items(node) if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        node[key] = function(child)
    return node


def dicts_of(node: Any) -> Iterator[dict]:
    """Yield every dict in a part of a config, the part itself included."""
    if isinstance(node, dict):
        yield node
    children = dict.values(node) if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    for child in list(children):
        yield from dicts_of(child)


def set_num_classes(node: Any, count: int) -> None:
    """Set every ``num_classes`` in a part of a config, in place, and what has one value or one weight a class."""
    for part in dicts_of(node):
        old = dict.get(part, 'num_classes')
        if 'num_classes' in part:
            part['num_classes'] = count
        if 'num_things_classes' in part:  # the heads of panoptic models, which know instances alone here
            old, part['num_things_classes'], part['num_stuff_classes'] = part['num_things_classes'], count, 0
        for loss in dicts_of(part):
            weights = dict.get(loss, 'class_weight')
            if isinstance(weights, list | tuple) and isinstance(old, int) and len(weights) - old in (0, 1):
                rest = list(weights[old:])
                loss['class_weight'] = [1.0] * count + rest if old != count else list(weights)
