"""Pascal VOC's xml: the devkit, one of its years, or xml files in any folders."""

import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

from mona_mm.own_data.images import split_of, split_of_path
from mona_mm.own_data.layout import Folder, Layout, class_names, classes_file, natural
from mona_mm.own_data.objects import Objects
from mona_mm.own_data.samples import OwnData, Sample


class Voc(Layout):
    """Annotations in Pascal VOC's format."""

    name, title, tasks = 'voc', 'Pascal VOC xml', ('boxes',)

    def recognise(self, folder: Folder) -> bool:
        files = folder.with_suffix('.xml')
        return any(b'<annotation' in path.read_bytes()[:4096] for path in files[:20]) or len(files) > 20

    def read(self, folder: Folder) -> OwnData:
        parsed = {path: root for path in folder.with_suffix('.xml') if (root := _parse(folder, path)) is not None}
        names = {str(thing.findtext('name')).strip() for root in parsed.values() for thing in root.iter('object')}
        listed = classes_file(folder)
        if listed:
            order = class_names(listed.read_text(encoding='utf-8').split('\n'), folder.findings, listed.name)
            order = tuple(name for name in order if name)
            unknown = sorted(names.difference(order))
            if unknown:
                folder.findings.error(f'names of objects are not in {listed.name}', unknown[0], '', len(unknown))
        else:
            order = class_names(sorted(names, key=natural), folder.findings, 'the xml files')
        data = OwnData(self.title, order, defaultdict(list), folder.findings)
        objects, used = Objects(folder.findings), Counter()
        split_by_stem = _image_sets(folder, parsed)
        for path, root in parsed.items():
            split = split_by_stem.get(path) if split_by_stem else split_of_path(path.parent, folder.root)
            if split_by_stem and split is None:
                folder.findings.warn('xml files are in no list of ImageSets/Main', folder.show(path), 'not used')
                continue
            sample = _sample(folder, path, root, split or '')
            if sample is None:
                continue
            used[sample.image] += 1
            for thing in root.iter('object'):
                _add(folder, objects, sample, thing, order)
            data.splits[split or ''].append(sample)
        objects.finish()
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
    by_place = {(path.parent.parent, path.stem): path for path in parsed}
    by_stem = {path.stem: path for path in parsed}
    for path in lists:
        base = path.parents[2]
        if path.stem == 'trainval' and any(other.stem == 'train' and other.parent == path.parent for other in lists):
            continue
        for line in path.read_text(encoding='utf-8').splitlines():
            stem = line.strip()
            if not stem:
                continue
            xml = by_place.get((base, stem)) or by_stem.get(stem)
            if xml is None and stem.rpartition(' ')[2] in ('1', '-1', '0'):
                stem = stem.rpartition(' ')[0].strip()
                xml = by_place.get((base, stem)) or by_stem.get(stem)
            if xml is None:
                if not any(p.stem == stem for p in folder.with_suffix('.xml')):
                    what = f'{folder.show(path)} lists {stem}'
                    folder.findings.error('images of a list have no xml file', what)
                continue
            result.setdefault(xml, split_of(path.stem))
    return result


def _sample(folder: Folder, path: Path, root: ET.Element, split: str) -> Sample | None:
    name = (root.findtext('filename') or '').strip()
    image = folder.images.find(path.stem, path.parent, split) or (name and folder.images.find(name, path.parent, split))
    if not image:
        folder.unreadable(f'{name or path.stem}, the image of {folder.show(path)}')
        return None
    sample = folder.sample(image)
    size = root.find('size')
    if sample is None or size is None:
        return sample
    try:
        said = tuple(int(float(size.findtext(key) or 0)) for key in ('width', 'height'))
    except ValueError:
        folder.findings.error('xml files have a size that is no number', folder.show(path))
        return None
    if 0 not in said and said != (sample.width, sample.height):
        example = (
            f'{folder.show(path)}: {said[0]} x {said[1]} in the xml, {sample.width} x {sample.height} in the image'
        )
        if said == (sample.height, sample.width):
            folder.findings.warn('xml files have width and height swapped', example, 'taken from the images')
        else:
            folder.findings.error(
                'images have another size than the xml says', example, 'annotate the files as they are'
            )
    return sample


def _add(folder: Folder, objects: Objects, sample: Sample, thing: ET.Element, classes: tuple[str, ...]) -> None:
    box = thing.find('bndbox')
    name = str(thing.findtext('name')).strip()
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


def _images_without_file(folder: Folder, used: set[Path], lists: dict) -> None:
    rest = [path for path in folder.images.paths if path not in used and 'Segmentation' not in path.parent.name]
    if rest and not lists:
        folder.findings.warn('images have no xml file', folder.show(rest[0]), 'not used', len(rest))
