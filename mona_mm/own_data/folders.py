"""A folder for each class, with or without folders of splits above them."""

from collections import Counter, defaultdict
from pathlib import Path

from mona_mm.own_data.images import split_of
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
        for name in _empty(folder, names):
            folder.findings.warn('folders of classes have no image', name, 'not a class')
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
    """The images of each split and class, and those in no class."""
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    loose = []
    tops = Counter(path.relative_to(folder.root).parts[0] for path in folder.images.paths)
    splits = {top: split_of(top) for top in tops if (folder.root / top).is_dir()}
    has_splits = bool(splits) and all(splits.values())
    for path in folder.images.paths:
        parts = path.relative_to(folder.root).parts
        inner = parts[1:] if has_splits else parts
        if len(inner) < 2:
            loose.append(path)
        else:
            found[splits[parts[0]] if has_splits else ''][inner[0]].append(path)
    return {split: dict(classes) for split, classes in found.items()}, loose


def _empty(folder: Folder, names: list[str]) -> list[str]:
    tops = [path for path in folder.root.iterdir() if path.is_dir() and not path.name.startswith('.')]
    inner = [p for top in tops for p in top.iterdir() if p.is_dir()] if all(split_of(t.name) for t in tops) else tops
    return sorted({path.name for path in inner} - set(names))


def _check_names(folder: Folder, found: dict[str, dict[str, list[Path]]]) -> None:
    """Refuse classes that a validation or test split has and the training split has not."""
    if 'train' not in found:
        return
    for split, classes in found.items():
        for name in sorted(set(classes) - set(found['train'])):
            folder.findings.error(f'classes of {split} are not in train', name, 'rename or move their folders')
