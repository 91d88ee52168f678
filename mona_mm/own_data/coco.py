"""COCO's json: files of any names, images in any folders, ids with gaps."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.own_data.findings import Findings, short
from mona_mm.own_data.images import split_of_path
from mona_mm.own_data.layout import Folder, Layout, class_names
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import OwnData, Sample

_PARTS = ('images', 'annotations', 'categories')


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: if it does not parse; it names the file, and the place.
    """
    try:
        with open(path, encoding='utf-8-sig') as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{path} is no JSON file ({error}): it may be empty, cut short or of another kind.') from None


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
    if not good:
        return False
    for part in _PARTS:
        ids = Counter(entry['id'] for entry in raw[part] if 'id' in entry)
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
        return any(_looks_like_coco(path) for path in folder.with_suffix('.json'))

    def read(self, folder: Folder) -> OwnData:
        contents = {path: read_json(path) for path in folder.with_suffix('.json') if _looks_like_coco(path)}
        contents = _chosen(folder, contents)
        names: dict[str, None] = {}
        for path, raw in contents.items():
            self._check(folder, path, raw)
            listed = raw.get('categories') if isinstance(raw, dict) else None
            listed = listed if isinstance(listed, list) else []
            found = [str(c['name']) for c in listed if isinstance(c, dict) and c.get('name') is not None]
            names.update(dict.fromkeys(class_names(found, folder.findings, folder.show(path))))
        folder.findings.raise_errors()
        used = _used_names(contents)
        # Exports of Roboflow have a first category that stands above the others and has no objects.
        above = {str(c.get('supercategory')) for raw in contents.values() for c in raw['categories']}
        classes = tuple(name for name in names if name in used or not (name in above and len(names) > 1))
        data = OwnData(self.title, classes, defaultdict(list), folder.findings)
        objects, votes = Objects(folder.findings), Counter()
        for path, raw in contents.items():
            split = split_of_path(path, folder.root) or ''
            data.splits[split] += _read_file(folder, path, raw, split, data.classes, objects, votes)
        objects.finish()
        if votes['stored']:
            data.keep_orientation = True
            data.notes.append(
                f'{votes["stored"]} images have a rotation in their EXIF data that the annotations do not '
                'follow: it is '
                'not applied'
            )
            if votes['turned']:
                folder.findings.error(
                    'images were annotated after the rotation of their EXIF data, others before it',
                    '',
                    'rotate the files themselves',
                    votes['turned'],
                )
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


def _looks_like_coco(path: Path) -> bool:
    """Whether a file says the words of the format, or parses as no JSON and is named as COCO's files are."""
    with open(path, 'rb') as file:
        start = file.read(1 << 16)
        file.seek(max(0, os.path.getsize(path) - (1 << 20)))
        text = start + file.read()
    if b'"images"' in text and (b'"annotations"' in text or b'"categories"' in text):
        return True
    name = path.name.lower()
    named = name.startswith('instances') or name.endswith('.coco.json') or path.parent.name.lower() == 'annotations'
    return named and not any(word in text for word in (b'"shapes"', b'"imagePath"'))


def _chosen(folder: Folder, contents: dict[Path, Any]) -> dict[Path, Any]:
    """The files of objects: without captions, and key points only where there is nothing else."""
    contents = {
        path: raw for path, raw in contents.items() if not path.name.startswith(('captions_', 'image_info_', 'stuff_'))
    }
    instances = {path: raw for path, raw in contents.items() if path.name.startswith('instances')}
    for path in set(contents) - set(instances) if instances else ():
        folder.findings.warn('other json files are not read, as there are files named instances_*', folder.show(path))
    return instances or contents


def _used_names(contents: dict[Path, dict]) -> set[str]:
    used = set()
    for raw in contents.values():
        names = {category['id']: str(category['name']).strip() for category in raw['categories']}
        used |= {names[entry['category_id']] for entry in raw['annotations']}
    return used


def _read_file(
    folder: Folder, path: Path, raw: dict, split: str, classes: tuple[str, ...], objects: Objects, votes: Counter
) -> list[Sample]:
    labels = {
        category['id']: classes.index(str(category['name']).strip())
        for category in raw['categories']
        if str(category['name']).strip() in classes
    }
    by_image = defaultdict(list)
    for entry in raw['annotations']:
        by_image[entry['image_id']].append(entry)
    samples = []
    for entry in raw['images']:
        image = folder.images.find(str(entry['file_name']), path.parent, split)
        if image is None:
            folder.unreadable(f'{entry["file_name"]}, which {folder.show(path)} lists')
            continue
        sample = folder.sample(image)
        if sample is None or not _check_size(folder, sample, entry, votes):
            continue
        for annotation in by_image[entry['id']]:
            if annotation.get('ignore'):
                continue
            box, mask = annotation.get('bbox') or None, annotation.get('segmentation')
            if box is not None and not _is_box(box):
                folder.findings.error('boxes are not four numbers', f'{image.name}: {str(box)[:60]}')
                continue
            label, crowd = labels[annotation['category_id']], bool(annotation.get('iscrowd'))
            objects.add(sample, label, box, mask, crowd, annotation.get('area') if mask else None)
        samples.append(sample)
    return samples


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)


def _check_size(folder: Folder, sample: Sample, entry: dict, votes: Counter) -> bool:
    """Compare the size in the json with the file's; return whether the annotations can be in the file's pixels."""
    width, height = entry.get('width'), entry.get('height')
    if not width or not height:
        folder.findings.warn('images have no size in the json', sample.image.name, 'taken from the files')
        return True
    header = folder.header(sample.image)
    said, turned, stored = (int(width), int(height)), (header.width, header.height), header.stored
    if turned != stored and said in (turned, stored):
        votes['turned' if said == turned else 'stored'] += 1
        sample.width, sample.height = said
        return True
    if said == turned:
        return True
    example = f'{sample.image.name}: {width} x {height} in the json, {header.width} x {header.height} in the file'
    if said == turned[::-1]:
        folder.findings.warn('images have width and height swapped in the json', example, 'taken from the files')
        return True
    folder.findings.error('images have another size than the json says', example, 'annotate the files as they are')
    return False
