"""Pascal VOC's xml: the devkit, one of its years, or xml files in any folders."""

import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

from mona_mm.own_data.images import is_image, split_of
from mona_mm.own_data.layout import Folder, Layout, class_names, classes_file, natural, pixels
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import OwnData, Sample
from mona_mm.own_data.text import lines_of

_ROOT = re.compile(rb'<annotation[\s>]')
"""The beginning of the content; without zero bytes it is the same in UTF-16."""


class Voc(Layout):
    """Annotations in Pascal VOC's format."""

    name, title, tasks = 'voc', 'Pascal VOC xml', ('boxes',)

    def recognise(self, folder: Folder) -> bool:
        files = folder.with_suffix('.xml')
        return any(_ROOT.search(path.read_bytes()[:4096].replace(b'\0', b'')) for path in files[:20]) or len(files) > 20

    def read(self, folder: Folder) -> OwnData:
        parsed = {path: root for path in folder.with_suffix('.xml') if (root := _parse(folder, path)) is not None}
        names = {name for root in parsed.values() for thing in root.iter('object') if (name := _name(thing))}
        listed = classes_file(folder)
        if listed:
            order = class_names([line for line in lines_of(listed) if line], folder.findings, listed.name)
            unknown = sorted(names.difference(order))
            if unknown:
                folder.findings.error(f'names of objects are not in {listed.name}', unknown[0], '', len(unknown))
        else:
            order = class_names(sorted(names, key=natural), folder.findings, 'the xml files')
        data = OwnData(self.title, order, defaultdict(list), folder.findings)
        objects, used = Objects(folder.findings), Counter()
        split_by_stem = _image_sets(folder, parsed)
        for path, root in parsed.items():
            split = split_by_stem.get(path) if split_by_stem else folder.split_of(path)
            if split_by_stem and split is None:
                folder.findings.warn('xml files are in no list of ImageSets/Main', folder.show(path), 'not used')
                continue
            sample = _sample(folder, path, root, split or '')
            if sample is None:
                continue
            used[sample.image] += 1
            for thing in root.iter('object'):
                _add(folder, objects, sample, thing, order)
            data.splits[split or folder.split_of(sample.image)].append(sample)
        objects.finish()
        folder.settle_rotation(data)
        twice = [image for image, count in used.items() if count > 1]
        if twice:
            folder.findings.error('images have more than one xml file', folder.show(twice[0]), '', len(twice))
        _images_without_file(folder, set(used), split_by_stem)
        return data


def _parse(folder: Folder, path: Path) -> ET.Element | None:
    try:
        root = ET.parse(path).getroot()
    except (ET.ParseError, ValueError, LookupError) as error:
        folder.findings.error('xml files do not parse', f'{folder.show(path)}: {error}')
        return None
    return root if root.tag == 'annotation' else None


def _image_sets(folder: Folder, parsed: dict[Path, ET.Element]) -> dict[Path, str]:
    """The split of every xml file that a list in ImageSets/Main names; empty without lists."""
    result: dict[Path, str] = {}
    lists = [p for p in folder.with_suffix('.txt') if p.parent.parts[-2:] == ('ImageSets', 'Main') and split_of(p.stem)]
    lists = [path for path in lists if path.stem in ('train', 'val', 'trainval', 'test', 'valid')]
    # trainval is the union of the other two, where they are there
    lists.sort(key=lambda path: path.stem != 'trainval')
    by_name = defaultdict(list)
    for path in parsed:
        by_name[path.stem].append(path)
    for path in lists:
        if path.stem == 'trainval' and any(other.stem == 'train' and other.parent == path.parent for other in lists):
            continue
        for line in filter(None, lines_of(path)):
            found = [xml for name in _listed_names(line) for xml in _named(by_name, name, path.parents[2])]
            if found:
                result.setdefault(found[0], split_of(path.stem))
            elif not any(xml.stem in _listed_names(line) for xml in folder.with_suffix('.xml')):
                folder.findings.error('images of a list have no xml file', f'{folder.show(path)} lists {line}')
    return result


def _listed_names(line: str) -> list[str]:
    """The names that a line of a list may mean: with the suffix of an image, or with 1, 0 or -1 behind it, without."""
    names = [line]
    if line.rpartition(' ')[2] in ('1', '-1', '0'):
        names.append(line.rpartition(' ')[0].strip())
    return names + [name.rpartition('.')[0] for name in names if is_image(name)]


def _named(by_name: dict[str, list[Path]], name: str, base: Path) -> list[Path]:
    """The xml files of a name, which may have folders before it; those of the list's own year first."""
    found = by_name.get(name.rpartition('/')[2], [])
    ends = [path for path in found if path.with_suffix('').as_posix().endswith(f'/{name}')]
    return sorted(ends, key=lambda path: not path.is_relative_to(base))


def _sample(folder: Folder, path: Path, root: ET.Element, split: str) -> Sample | None:
    name = (root.findtext('filename') or '').strip()
    image = folder.images.find(path.stem, path.parent, split) or (name and folder.images.find(name, path.parent, split))
    if not image:
        folder.missing(name or path.stem, path, 'the image of {}')
        return None
    sample = folder.sample(image)
    size = root.find('size')
    if sample is None or size is None:
        return sample
    said = (pixels(size.findtext('width')), pixels(size.findtext('height')))
    if None in said:
        folder.findings.error('xml files have a size that is no number', folder.show(path))
        return None
    return sample if 0 in said or folder.fits(sample, said, folder.show(path), 'xml') else None


def _add(folder: Folder, objects: Objects, sample: Sample, thing: ET.Element, classes: tuple[str, ...]) -> None:
    box = thing.find('bndbox')
    name = _name(thing)
    if not name:
        folder.findings.error('objects have no name', sample.image.name)
    if name not in classes:
        return
    try:
        x1, y1, x2, y2 = (float(box.findtext(key)) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
    except (TypeError, ValueError, AttributeError):
        folder.findings.error('objects have no box of four numbers', f'{name} in {sample.image.name}')
        return
    difficult = (thing.findtext('difficult') or '0').strip() in ('1', 'true', 'True')
    # VOC counts pixels from 1, as mmdet's XMLDataset undoes; other tools' boxes begin at 0 and are clipped
    objects.add(sample, classes.index(name), (x1 - 1, y1 - 1, x2 - x1, y2 - y1), ignored=difficult)


def _name(thing: ET.Element) -> str:
    """The name of the class of an object; empty if it has none."""
    return (thing.findtext('name') or '').strip()


def _images_without_file(folder: Folder, used: set[Path], lists: dict) -> None:
    rest = [path for path in folder.images.paths if path not in used and 'Segmentation' not in path.parent.name]
    if rest and not lists:
        folder.findings.warn('images have no xml file', folder.show(rest[0]), 'not used', len(rest))
