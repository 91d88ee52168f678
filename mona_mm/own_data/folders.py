"""A folder for each class, with or without folders of splits above them."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from mona_mm.own_data.images import is_hidden, split_of
from mona_mm.own_data.layout import Folder, Layout, class_names, natural
from mona_mm.own_data.samples import OwnData

_NO_CLASSES = frozenset(
    [
        'images',
        'image',
        'imgs',
        'img',
        'jpegimages',
        'annotations',
        'annotation',
        'labels',
        'label',
        'masks',
        'mask',
        'segmentationclass',
    ]
)


class ClassFolders(Layout):
    """Images for classification, in a folder for each class."""

    name, title, tasks = 'folders', 'a folder per class', ('labels',)

    def recognise(self, folder: Folder) -> bool:
        found, _ = _by_class(folder)
        names = {name for classes in found.values() for name in classes}
        return bool(names) and not all(name.lower() in _NO_CLASSES for name in names)

    def read(self, folder: Folder) -> OwnData:
        found, loose = _by_class(folder)
        names = sorted({name for classes in found.values() for name in classes}, key=natural)
        data = OwnData(self.title, class_names(names, folder.findings, 'the folders'), {}, folder.findings)
        if len(names) < 2:
            folder.findings.error(f'there is only one class, {names[0]}: a classifier needs two', count=0)
        empty = _empty(folder, found)
        if empty:
            folder.findings.warn('folders of classes have no image', empty[0], 'not a class', len(empty))
        if loose:
            folder.findings.warn('images are in no folder of a class', folder.show(loose[0]), 'not used', len(loose))
        for split, classes in found.items():
            samples = data.splits.setdefault(split, [])
            for name, paths in classes.items():
                for path in paths:
                    sample = folder.sample(path)
                    if sample is not None:
                        sample.label = names.index(name)
                        samples.append(sample)
        _check_names(folder, found)
        return data


def _by_class(folder: Folder) -> tuple[dict[str, dict[str, list[Path]]], list[Path]]:
    """The images of each split and class, and those in no class.

    Folders of splits may be above those of classes, or below them. A folder that holds all of them, as archives have
    it, is no class.
    """
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    loose = []
    base = _base(folder)
    inner = {path: path.relative_to(base).parts[:-1] for path in folder.images.paths}
    above = _splits_above(inner.values())
    below = bool(inner) and not above and all(len(parts) > 1 and split_of(parts[1]) for parts in inner.values())
    for path, parts in inner.items():
        split = split_of(parts[1]) if below else above.get(parts[0]) if above and parts else ''
        names = parts[1:] if above else parts
        if split is None or not names:
            loose.append(path)
        else:
            found[split][names[0]].append(path)
    return {split: dict(classes) for split, classes in found.items()}, loose


def _base(folder: Folder) -> Path:
    """The folder below which those of splits or classes are: the lowest that has all images and no image itself."""
    base = folder.root
    while True:
        parents = [path.relative_to(base).parts[:-1] for path in folder.images.paths]
        tops = {parts[0] if parts else '' for parts in parents}
        (only,) = tops if len(tops) == 1 else ('',)
        if not only or split_of(only) or any(len(parts) < 2 for parts in parents):
            return base
        base = base / only


def _splits_above(parents: Collection[tuple[str, ...]]) -> dict[str, str | None]:
    """The split of each folder at the top, if these are splits and not classes, one of which may be called train.

    They are if all of them, or two of them, have the name of a split, or if one has folders inside and no other has.
    """
    tops = {parts[0]: split_of(parts[0]) for parts in parents if parts}
    named = [top for top, split in tops.items() if split]
    deep = {parts[0] for parts in parents if len(parts) > 1}
    if not deep.intersection(named):
        return tops if tops and len(named) == len(tops) else {}
    found = {tops[top] for top in named}
    return tops if len(named) == len(tops) or len(found) > 1 or deep == set(named) else {}


def _empty(folder: Folder, found: dict[str, dict[str, list[Path]]]) -> list[str]:
    """The names of the folders beside those of classes that have no image."""
    names = {name for classes in found.values() for name in classes}
    places = {path for classes in found.values() for paths in classes.values() for path in paths}
    beside = {parent.parent for path in places for parent in path.parents if parent.name in names}
    inner = [path for place in beside if place.is_relative_to(folder.root) for path in place.iterdir() if path.is_dir()]
    has_image = {parent for path in folder.images.paths for parent in path.parents}
    return sorted({path.name for path in inner if path not in has_image and not is_hidden(path.name)} - names)


def _check_names(folder: Folder, found: dict[str, dict[str, list[Path]]]) -> None:
    """Refuse classes that a validation or test split has and the training split has not."""
    if 'train' not in found:
        return
    for split, classes in found.items():
        for name in sorted(set(classes) - set(found['train'])):
            folder.findings.error(f'classes of {split} are not in train', name, 'rename or move their folders')
