"""COCO's json: files of any names, images in any folders, ids with gaps."""

import json
import mmap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from mona_mm.own_data.findings import Findings, short
from mona_mm.own_data.images import split_of_path
from mona_mm.own_data.layout import Folder, Layout, class_names, pixels
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import OwnData, Sample
from mona_mm.own_data.text import read_json, says

_PARTS = ('images', 'annotations', 'categories')


def check_structure(raw: Any, file: str, needed: dict[str, tuple[str, ...]], findings: Findings) -> bool:
    """Check the parts, keys and ids of a COCO file; return whether its entries can be read.

    Args:
        raw: the content of the file.
        file: its name in messages.
        needed: the keys that each entry must have, by part.
        findings: where faults are noted.
    """
    missing = [part for part in _PARTS if not (isinstance(raw, dict) and isinstance(raw.get(part), list))]
    if missing:
        findings.error(f'{file} is not in COCO format: it has no list "{missing[0]}"', count=0)
        return False
    good = True
    for part, keys in needed.items():
        for key in keys:
            without = [entry for entry in raw[part] if not isinstance(entry, dict) or entry.get(key) is None]
            if without:
                good = False
                findings.error(f'entries of "{part}" in {file} have no "{key}"', _entry(without[0]), '', len(without))
    for part in _PARTS if good else ():
        for key in ('id', 'image_id', 'category_id'):
            wrong = [entry for entry in raw[part] if not isinstance(entry.get(key), int | float | str | None)]
            if wrong:
                good = False
                text = f'entries of "{part}" in {file} have a value of "{key}" that is neither a number nor text'
                findings.error(text, _entry(wrong[0]), '', len(wrong))
    if not good:
        return False
    for part in _PARTS:
        ids = Counter(entry['id'] for entry in raw[part] if entry.get('id') is not None)
        twice = [key for key, count in ids.items() if count > 1]
        if twice:
            text = f'ids occur more than once among the "{part}" of {file}'
            findings.error(text, f'id {twice[0]}', 'give every entry its own', len(twice))
    return good


def _entry(entry: Any) -> str:
    return short([json.dumps(entry, default=str)[:80]])


class Coco(Layout):
    """Annotations in COCO's format."""

    name, title, tasks = 'coco', 'COCO json', ('boxes', 'maps')

    def recognise(self, folder: Folder) -> bool:
        files = folder.with_suffix('.json')
        if any(map(_says_coco, files)):
            return True
        return any(map(_is_named_as_coco, files)) and not folder.with_suffix('.xml', '.txt')

    def read(self, folder: Folder) -> OwnData:
        contents = _contents(folder)
        names: dict[str, None] = {}
        for path, raw in contents.items():
            self._check(folder, path, raw)
        folder.findings.raise_errors()
        data = OwnData(self.title, (), defaultdict(list), folder.findings)
        for path, raw in contents.items():
            found = [category['name'] for category in _categories(raw, data.notes)]
            names.update(dict.fromkeys(class_names(found, folder.findings, folder.show(path))))
        folder.findings.raise_errors()
        data.classes = tuple(names)
        objects = Objects(folder.findings)
        for path, raw in contents.items():
            _read_file(folder, path, raw, data, objects)
        objects.finish()
        folder.settle_rotation(data)
        return data

    def _check(self, folder: Folder, path: Path, raw: dict) -> None:
        needed = dict(images=('id', 'file_name'), annotations=('image_id', 'category_id'), categories=('id', 'name'))
        if not check_structure(raw, folder.show(path), needed, folder.findings):
            return
        images, categories = {i['id'] for i in raw['images']}, {c['id'] for c in raw['categories']}
        for entry in raw['annotations']:
            if entry['image_id'] not in images:
                folder.findings.error('annotations are of images that the file does not list', _entry(entry))
            if entry['category_id'] not in categories:
                folder.findings.error('annotations are of categories that the file does not list', _entry(entry))
        names = Counter(str(image['file_name']) for image in raw['images'])
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            folder.findings.error('images are listed more than once', twice[0], 'list each once', len(twice))
        if not raw['images']:
            folder.findings.error(f'{folder.show(path)} lists no images', count=0)


def _says_coco(path: Path) -> bool:
    """Whether a file has the keys of the format, wherever in it they stand."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return says(content, '"images"') and (says(content, '"annotations"') or says(content, '"categories"'))


def _is_named_as_coco(path: Path) -> bool:
    """Whether a file has the name or the place of a COCO file, though it lacks the keys: it may be empty or cut short.

    LabelMe's files may have this place, too.
    """
    name = path.name.lower()
    if not (name.startswith('instances') or name.endswith('.coco.json') or path.parent.name.lower() == 'annotations'):
        return False
    content = path.read_bytes()
    return not says(content, '"shapes"') and not says(content, '"imagePath"')


def _contents(folder: Folder) -> dict[Path, Any]:
    """The content of the files of objects: without captions, and key points only where there is nothing else."""
    files = [p for p in folder.with_suffix('.json') if not p.name.startswith(('captions_', 'image_info_', 'stuff_'))]
    good = {path for path in files if _says_coco(path)}
    contents = {path: read_json(path) for path in files if path in good or _is_named_as_coco(path)}
    for path in [path for path in contents if path not in good] if good else ():
        folder.findings.warn('json files are not in COCO format', folder.show(path), 'not used')
        del contents[path]
    instances = {path: raw for path, raw in contents.items() if path.name.startswith('instances')}
    for path in [path for path in contents if path not in instances] if instances else ():
        folder.findings.warn('other json files are not read, as there are files named instances_*', folder.show(path))
    return instances or contents


def _categories(raw: dict, notes: list[str]) -> list[dict]:
    """The categories of a file that are classes.

    Exports of Roboflow have a first category that stands above the others and has no objects; it may have the name of
    one of them.
    """
    used = {entry['category_id'] for entry in raw['annotations']}

    def stands_above(category: dict) -> bool:
        name = str(category['name'])
        others = (other for other in raw['categories'] if other is not category)
        return category['id'] not in used and any(str(other.get('supercategory')) == name for other in others)

    above = [category for category in raw['categories'] if stands_above(category)]
    note = f'{", ".join(str(c["name"]) for c in above)}: above other categories and without objects, so no class'
    if above and note not in notes:
        notes.append(note)
    return [category for category in raw['categories'] if category not in above]


def _read_file(folder: Folder, path: Path, raw: dict, data: OwnData, objects: Objects) -> None:
    """Add the images of a file and their objects to the split that the file or else the folder of an image names."""
    numbers = {name: number for number, name in enumerate(data.classes)}
    labels = {category['id']: numbers.get(str(category['name']).strip()) for category in raw['categories']}
    split = split_of_path(path, folder.root)
    by_image = defaultdict(list)
    for entry in raw['annotations']:
        by_image[entry['image_id']].append(entry)
    for entry in raw['images']:
        image = folder.images.find(str(entry['file_name']), path.parent, split or '')
        if image is None:
            folder.missing(str(entry['file_name']), path)
            continue
        sample = folder.sample(image)
        if sample is None or not _has_size(folder, sample, entry):
            continue
        for annotation in by_image[entry['id']]:
            _add(folder, objects, sample, labels[annotation['category_id']], annotation)
        data.splits[split or folder.split_of(image)].append(sample)


def _add(folder: Folder, objects: Objects, sample: Sample, label: int, annotation: dict) -> None:
    name = sample.image.name
    if _flag(annotation.get('ignore')):
        folder.findings.warn('objects are marked with "ignore"', name, 'dropped, as the library does')
        return
    box, mask = annotation.get('bbox') or None, annotation.get('segmentation')
    if box is not None and not _is_box(box):
        folder.findings.error('boxes are not four numbers', f'{name}: {str(box)[:60]}')
        return
    area = annotation.get('area') if mask else None
    objects.add(sample, label, box, mask, _flag(annotation.get('iscrowd')), area)


def _flag(value: Any) -> bool:
    """A value of 0 or 1, which some tools write as text."""
    return value not in ('0', '0.0', 'false', 'False', '') and bool(value)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)


def _has_size(folder: Folder, sample: Sample, entry: dict) -> bool:
    """Compare the size in the json with the file's; return whether the annotations can be in the file's pixels."""
    width, height = (pixels(entry.get(key)) for key in ('width', 'height'))
    if width is None or height is None:
        what = f'{sample.image.name}: {entry.get("width")!r} x {entry.get("height")!r}'
        folder.findings.error('images have a size in the json that is no number', what)
        return False
    if not width or not height:
        folder.findings.warn('images have no size in the json', sample.image.name, 'taken from the files')
        return True
    return folder.fits(sample, (width, height), sample.image.name, 'json')
