"""YOLO's text files: boxes and polygons, with data.yaml, names of classes in a file, or none."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from mona_mm.errors import ConfigError
from mona_mm.own_data.images import is_image, walk
from mona_mm.own_data.layout import Folder, Layout, class_names, listed_names
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import SPLITS, OwnData, Sample
from mona_mm.own_data.text import read_text, says

_MOST_NUMBERS = 20_000  # classes without names, beyond which a number is a mistake
_NOT_LABELS = ('classes', 'labels', 'names', 'class_names', 'label_names', 'readme', 'source', 'notes', 'license')


class Yolo(Layout):
    """Annotations in YOLO's format: a text file for each image, a line for each object."""

    name, title, tasks = 'yolo', 'YOLO txt', ('boxes', 'maps')

    def recognise(self, folder: Folder) -> bool:
        if _settings_file(folder):
            return True
        return any(map(_is_labels, _label_files(folder)))

    def read(self, folder: Folder) -> OwnData:
        settings = _read_settings(folder)
        files = {(path.parent, path.stem): path for path in _label_files(folder)}
        images = _images_by_split(folder, settings)
        names = _names(folder, settings, files.values())
        data = OwnData(self.title, class_names(names, folder.findings, 'the names of classes'), {}, folder.findings)
        objects, used, without = Objects(folder.findings), set(), []
        if settings.get('kpt_shape'):
            data.notes.append('the labels have key points behind their boxes: only the boxes are read')
        for split, paths in images.items():
            samples = data.splits.setdefault(split, [])
            for image in paths:
                sample = folder.sample(image)
                if sample is None:
                    continue
                file = next((files[key] for key in _label_places(image) if key in files), None)
                if file is None:
                    without.append(image)
                else:
                    used.add(file)
                    _read_labels(folder, file, sample, len(names), objects, bool(settings.get('kpt_shape')))
                samples.append(sample)
        objects.finish()
        turned = [sample for samples in data.splits.values() for sample in samples if _is_turned(folder, sample)]
        if turned:
            data.notes.append(
                f'{len(turned)} images have a rotation in their EXIF data, which the labels are taken to follow '
                f'({turned[0].image.name})'
            )
        if without and not used:
            folder.findings.error(
                'no image has a file of labels', '', 'they belong in labels/ beside images/, or beside the images', 0
            )
        elif without:
            text = 'images have no file of labels'
            folder.findings.warn(text, folder.show(without[0]), 'taken as images without objects', len(without))
        rest = [path for path in files.values() if path not in used and _is_labels(path)]
        if rest:
            folder.findings.warn('files of labels have no image', folder.show(rest[0]), 'not used', len(rest))
        return data


def _is_turned(folder: Folder, sample: Sample) -> bool:
    header = folder.header(sample.image)
    return header.stored != (header.width, header.height)


def _settings_file(folder: Folder) -> Path | None:
    """The file that lists classes and splits: data.yaml, or another with ``names`` in it."""
    files = sorted(folder.with_suffix('.yaml', '.yml'), key=lambda path: (len(path.parts), path.name != 'data.yaml'))
    return next((path for path in files if says(path.read_bytes(), 'names:')), None)


def _read_settings(folder: Folder) -> dict[str, Any]:
    path = _settings_file(folder)
    if path is None:
        return {}
    text = read_text(path)
    try:
        settings = yaml.safe_load(text)
        as_written = yaml.load(text, yaml.BaseLoader)  # in names, which may be no, on, null or 1:30, all is text
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f'{path} is no YAML file: {" ".join(str(error).split())}') from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{path} has no settings: it needs names and the folders of train and val.')
    return {**settings, 'names': as_written.get('names'), 'file': path}


def _label_files(folder: Folder) -> list[Path]:
    lists = {folder.root / name for name in ('train.txt', 'val.txt', 'valid.txt', 'test.txt')}
    return [
        path
        for path in folder.with_suffix('.txt')
        if path not in lists and path.stem.lower().split('.')[0] not in _NOT_LABELS and 'ImageSets' not in path.parts
    ]


def _is_labels(path: Path) -> bool:
    """Whether the first line that is not empty is a number of a class and at least four numbers from 0 to 1."""
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        words = next((line.split() for line in file if line.strip()), [])
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return False
    return len(numbers) >= 5 and numbers[0].is_integer() and all(-0.5 <= value <= 1.5 for value in numbers[1:])


def _images_by_split(folder: Folder, settings: dict[str, Any]) -> dict[str, list[Path]]:
    given = {split: settings.get(split) or (settings.get('valid') if split == 'val' else None) for split in SPLITS}
    if any(given.values()):
        return {split: _images_of(folder, settings, split, value) for split, value in given.items() if value}
    splits = defaultdict(list)
    lists = [folder.root / name for name in ('train.txt', 'val.txt', 'valid.txt', 'test.txt')]
    for path in (path for path in lists if path.is_file()):
        split = 'val' if path.stem == 'valid' else path.stem
        splits[split] += _listed(folder, path)
    if splits:
        return dict(splits)
    for path in folder.images.paths:
        splits[folder.split_of(path)].append(path)
    return dict(splits)


def _images_of(folder: Folder, settings: dict[str, Any], split: str, value: Any) -> list[Path]:
    """The images of a split: of folders, of lists, or of several of them."""
    found, all_there = [], True
    for each in value if isinstance(value, list) else [value]:
        base, text = settings['file'].parent, str(each).replace('\\', '/')
        stripped = text
        while stripped.startswith('../'):
            stripped = stripped[3:]
        places = [base / str(settings.get('path') or ''), base, folder.root]
        tries = [place / part for part in dict.fromkeys((text, stripped)) for place in places]
        path = next((Path(os.path.normpath(place)) for place in tries if place.exists()), None)
        if path is None:
            all_there = False
            text, first = f'folders of {settings["file"].name} are not there', f'{split}: {each}'
            if split == 'test':  # exports name it even where they have no such images
                folder.findings.warn(text, first, 'not used')
            else:
                folder.findings.error(text, first)
        elif path.is_file():
            found += _listed(folder, path)
        else:
            found += sorted(image for image in walk(path) if is_image(image.name))
    if not found and all_there and split != 'test':
        folder.findings.error('splits have no image', f'{split}: {value}')
    return found


def _listed(folder: Folder, path: Path) -> list[Path]:
    found = []
    for line in read_text(path).splitlines():
        if line.strip():
            image = folder.images.find(line.strip(), path.parent)
            if image is None:
                folder.missing(line.strip(), path)
            else:
                found.append(image)
    return found


def _names(folder: Folder, settings: dict[str, Any], files: Any) -> list[Any]:
    names = settings.get('names')
    if isinstance(names, dict):
        numbers = {int(key) if key.isdecimal() else key: name for key, name in names.items()}
        if set(numbers) != set(range(len(names))):
            raise ConfigError(
                f'{settings["file"]}: the names must be those of the classes 0, 1, 2, ..., not of {", ".join(names)}.'
            )
        names = [numbers[key] for key in range(len(names))]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f'{settings["file"]}: names must be a list, not {names!r}.')
    if names:
        count = settings.get('nc')
        if count is not None and str(count) != str(len(names)):
            folder.findings.error(f'{settings["file"].name} has nc: {count}, but {len(names)} names', count=0)
        return names
    listed = listed_names(folder)
    if listed:
        return listed
    numbers = [int(line.split()[0]) for path in files if _is_labels(path) for line in _lines(path)]
    folder.findings.warn('no names of classes are there', '', 'numbers stand for them: write names into classes.txt', 0)
    count = max(numbers, default=0) + 1
    if count > _MOST_NUMBERS:
        text = f'a line of labels has the class {count - 1}, and there are no names of so many classes'
        raise ConfigError(f'{folder.root}: {text}. Write data.yaml or classes.txt, or mend the line.')
    return [str(number) for number in range(count)]


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding='utf-8-sig', errors='replace')
    return [line for line in text.splitlines() if line.split() and line.split()[0].isdecimal()]


def _label_places(image: Path) -> list[tuple[Path, str]]:
    """Where the labels of an image may be: labels/ in place of the last images/ of its path, or beside it."""
    parts = list(image.parent.parts)
    places = []
    for i in reversed(range(len(parts))):
        if parts[i].lower() in ('images', 'image', 'img', 'imgs', 'jpegimages'):
            places += [Path(*parts[:i], name, *parts[i + 1 :]) for name in ('labels', 'label')]
            break
    places += [image.parent, image.parent / 'labels', image.parent.parent / 'labels']
    return [(place, image.stem) for place in places]


def _read_labels(
    folder: Folder, file: Path, sample: Sample, classes: int, objects: Objects, has_points: bool = False
) -> None:
    """Read the objects of an image; with ``has_points`` the key points behind the boxes are left out."""
    for number, line in enumerate(file.read_text(encoding='utf-8-sig', errors='replace').splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f'{folder.show(file)}, line {number}: {line.strip()[:60]}'
        try:
            values = [float(word) for word in words]
        except ValueError:
            folder.findings.error('lines of labels are no numbers', where)
            continue
        values = values[:5] if has_points else values
        if len(values) == 6:
            folder.findings.error(
                'lines have six numbers', where, 'a box has five, a polygon an odd number from seven on'
            )
            continue
        if len(values) < 5 or len(values) % 2 == 0:
            folder.findings.error('lines are neither a box (5 numbers) nor a polygon (an odd number)', where)
            continue
        if not values[0].is_integer() or not 0 <= values[0] < classes:
            folder.findings.error(f'lines have a class that is none of 0 to {classes - 1}', where)
            continue
        if not all(-0.1 <= value <= 1.1 for value in values[1:]):
            folder.findings.error('lines have coordinates that are not from 0 to 1', where, 'divide by the image size')
            continue
        _add(objects, sample, int(values[0]), values[1:])


def _add(objects: Objects, sample: Sample, label: int, values: list[float]) -> None:
    size = (sample.width, sample.height)
    pixels = [value * size[i % 2] for i, value in enumerate(values)]
    if len(values) == 4:
        x, y, w, h = pixels
        objects.add(sample, label, (x - w / 2, y - h / 2, w, h))
    else:
        objects.add(sample, label, None, [pixels])
