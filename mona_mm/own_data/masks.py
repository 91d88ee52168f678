"""Images and label maps: numbers of classes, binary masks, colours of a palette."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from mona_mm.errors import ConfigError
from mona_mm.own_data.images import LABEL_MAP_FOLDER, open_image, split_of
from mona_mm.own_data.layout import Folder, Layout, class_names, classes_file
from mona_mm.own_data.samples import OwnData, Sample
from mona_mm.own_data.text import lines_of, read_text

_MASK_FOLDER = re.compile(rf'{LABEL_MAP_FOLDER.pattern}|annot|^labels?$|^ann(_dir|s)?$')
_MASK_NAME = re.compile(
    r'[_\-. ](labeltrainids|labelids|masks?|labels?|gt|seg|segmentation|annotation|groundtruth|l|p)$', re.IGNORECASE
)
_GT_NAME = re.compile(r'_(gtfine|gtcoarse)$', re.IGNORECASE)
_OTHER_NAME = re.compile(r'_(color|colour|instanceids|instancetrainids|overlay)$', re.IGNORECASE)
_IMAGE_NAME = re.compile(r'_(leftimg8bit|image|img|rgb|sat)$', re.IGNORECASE)
_PREFIX = re.compile(r'^(image|img|masks?|labels?|gt|seg)[_\-. ](?=.*\d)', re.IGNORECASE)
_NAME_FILES = (
    *('classes.txt', 'labels.txt', 'class_names.txt', 'names.txt', 'class_dict.csv', 'classes.csv'),
    *('label_colors.txt', 'labelmap.txt', 'colors.txt', '_classes.csv'),
)
_COLOURED = 1 << 24  # added to the values of a label map that has colours
IGNORED = 255
"""The value of pixels that belong to no class."""
MOST_CLASSES = IGNORED
"""The most classes in label maps of 8 bits, from 0 to the last value below that of no class."""


class Masks(Layout):
    """Images for semantic segmentation, each with a label map."""

    name, title, tasks = 'masks', 'images and label maps', ('maps',)

    def recognise(self, folder: Folder) -> bool:
        masks, images = _two_kinds(folder)
        keys = {_key(path) for path in masks}
        return any(_key(path) in keys for path in images)

    def read(self, folder: Folder) -> OwnData:
        masks, images = _two_kinds(folder)
        lists = _image_sets(folder)
        rest = [image for image in images if image.stem not in lists] if lists else []
        if rest:
            folder.findings.warn('images are in no list of ImageSets', folder.show(rest[0]), 'not used', len(rest))
            images = [image for image in images if image.stem in lists]
        pairs = _pairs(folder, masks, images)
        splits: dict[str, list[Sample]] = defaultdict(list)
        values, turned = _Values(), Counter()
        for image, mask in pairs.items():
            sample = folder.sample(image)
            if sample is None:
                continue
            content = read_map(mask)
            if isinstance(content, str):
                folder.unreadable(f'{folder.show(mask)}: {content}')
                continue
            if not _check_size(folder, sample, content.shape[1::-1], mask, turned):
                continue
            sample.present = values.add(content, folder.show(mask))
            sample.label_map = mask
            splits[lists.get(image.stem) or _split(folder, image, mask) or ''].append(sample)
        if not values.counts:
            folder.findings.raise_errors()
            raise ConfigError(f'{folder.root}: there is no image with a label map.')
        data = OwnData(self.title, (), dict(splits), folder.findings, keep_orientation=bool(turned['stored']))
        samples = [sample for samples in splits.values() for sample in samples]
        data.coloured = any(value >= _COLOURED for value in values.counts)
        if data.coloured:
            values = _colours_of(folder, samples)
        _name_values(folder, data, values)
        if len(data.classes) == 1:
            folder.findings.error(f'label maps hold only one class, {data.classes[0]}: a segmentor needs two', count=0)
        if len(data.classes) > MOST_CLASSES:
            text = f'label maps can have {MOST_CLASSES} classes at most, and there are {len(data.classes)}'
            folder.findings.error(text, count=0)
        folder.findings.raise_errors()
        for sample in samples:
            sample.present = tuple(np.unique(to_classes(np.array(sample.present), data)).tolist())
        return data


def read_map(path: Path, coloured: bool | None = None) -> np.ndarray | str:
    """Read a label map as numbers (H, W); if that fails, return the reason.

    Args:
        path: the file.
        coloured: whether its values are colours, 0xRRGGBB, which a palette may stand for. By default they are if it has
            three channels that differ, and are marked with a bit beyond 24; the colours of a palette are not looked at.
    """
    try:
        with open_image(path) as image:
            if coloured or image.mode in ('RGB', 'RGBA', 'CMYK', 'YCbCr'):
                channels = np.asarray(image.convert('RGB')).astype(np.int32)
                colours = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
                if coloured:
                    return colours
                is_grey = (channels == channels[..., :1]).all()
                return channels[..., 0] if is_grey else colours | _COLOURED
            content = np.asarray(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        return 'no image that Pillow knows' if isinstance(error, UnidentifiedImageError) else str(error)
    content = content[..., 0] if content.ndim == 3 else content
    if content.dtype.kind == 'f' and (content != content.astype(np.int32)).any():
        return 'its values are no whole numbers'
    return content.astype(np.int32)


def _colours_of(folder: Folder, samples: list[Sample]) -> '_Values':
    """The colours in label maps of which some have colours and others are grey or have a palette."""
    values = _Values()
    for sample in samples:
        if max(sample.present) >= _COLOURED:
            found = np.array(sample.present) & ~_COLOURED
        else:
            found = np.unique(read_map(sample.label_map, coloured=True))
        sample.present = values.add(found, folder.show(sample.label_map))
    return values


class _Values:
    """The values in all label maps, with the first file that has each, and the first file that is a JPEG."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()
        self.first: dict[int, str] = {}
        self.lossy = ''

    def add(self, content: np.ndarray, file: str) -> tuple[int, ...]:
        """Count the values of a label map, and return them."""
        if file.lower().endswith(('.jpg', '.jpeg', '.jpe', '.jfif')):
            self.lossy = self.lossy or file
        if content.min() >= 0 and content.max() < 1 << 16:
            counts = np.bincount(content.ravel())
            found = np.flatnonzero(counts)
            counts = counts[found]
        else:
            found, counts = np.unique(content, return_counts=True)
        if len(found) > 4096:  # a photograph
            found, counts = found[:4096], counts[:4096]
        for value, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.counts[value] += count
            self.first.setdefault(value, file)
        return tuple(found.tolist())


def _is_mask_folder(name: str) -> bool:
    return bool(_MASK_FOLDER.search(name.lower()))


def _two_kinds(folder: Folder) -> tuple[list[Path], list[Path]]:
    """The label maps and the images of a folder: told apart by their folders, else by the ends of their names."""
    masks, images = [], []
    for path in folder.images.paths:
        parts = path.relative_to(folder.root).parts[:-1]
        if _OTHER_NAME.search(path.stem) or 'SegmentationObject' in parts:
            continue
        (masks if any(map(_is_mask_folder, parts)) else images).append(path)
    if not masks:
        masks = [path for path in images if _MASK_NAME.search(path.stem)]
        keys = {_key(path) for path in masks}
        masks_set = set(masks)
        images = [path for path in images if path not in masks_set]
        if not any(_key(path) in keys for path in images):
            masks = []
    kinds = {_suffix(path) for path in masks}
    if 'labeltrainids' in kinds:
        masks = [path for path in masks if _suffix(path) == 'labeltrainids']
    return masks, images


def _suffix(path: Path) -> str:
    found = _MASK_NAME.search(path.stem)
    return found[1].lower() if found else ''


def _key(path: Path) -> str:
    """What the names of an image and of its label map have in common."""
    stem = _PREFIX.sub('', _IMAGE_NAME.sub('', path.stem))
    return _GT_NAME.sub('', _MASK_NAME.sub('', stem)).lower()


def _split(folder: Folder, image: Path, mask: Path) -> str | None:
    for path in (image, mask):
        for name in reversed(path.relative_to(folder.root).parts[:-1]):
            split = split_of(name) or split_of(re.sub(r'(annot|_?masks?|_?labels?)$', '', name.lower()))
            if split:
                return split
    return None


def _image_sets(folder: Folder) -> dict[str, str]:
    """The split of every image, by its name, in the lists of VOC's devkit for segmentation; empty without lists."""
    lists = [path for path in folder.with_suffix('.txt') if path.parent.parts[-2:] == ('ImageSets', 'Segmentation')]
    lists = [path for path in lists if path.stem in ('train', 'val', 'test')]
    found: dict[str, str] = {}
    for path in lists if any(path.stem == 'train' for path in lists) else ():
        for line in filter(None, lines_of(path)):
            found.setdefault(line.rpartition('/')[2], path.stem)
    return found


def _pairs(folder: Folder, masks: list[Path], images: list[Path]) -> dict[Path, Path]:
    by_key = defaultdict(list)
    for path in masks:
        by_key[_key(path)].append(path)
    pairs, used = {}, set()
    for image in images:
        candidates = by_key.get(_key(image), [])
        candidates = [path for path in candidates if path.stem == image.stem] or candidates
        if len(candidates) > 1:
            split = _split(folder, image, image)
            candidates = [path for path in candidates if _split(folder, path, path) == split] or candidates
        if len(candidates) > 1:
            names = set(image.relative_to(folder.root).parts[:-1])
            best = max(len(names.intersection(path.parts)) for path in candidates)
            candidates = [path for path in candidates if len(names.intersection(path.parts)) == best]
        if len(candidates) == 1:
            if candidates[0] in used:
                folder.findings.warn('label maps are those of several images', folder.show(candidates[0]))
            pairs[image] = candidates[0]
            used.add(candidates[0])
        elif candidates:
            what = f'{folder.show(image)}: {folder.show(candidates[0])}, {folder.show(candidates[1])}'
            folder.findings.error('images have several label maps', what)
        elif folder.skip_unreadable:
            folder.findings.warn('images have no label map', folder.show(image), 'left out')
        else:
            text = 'add them, or leave the images out with --data-options skip=True'
            folder.findings.error('images have no label map', folder.show(image), text)
    rest = [path for path in masks if path not in used]
    if rest:
        folder.findings.warn('label maps have no image', folder.show(rest[0]), 'not used', len(rest))
    return pairs


def _check_size(folder: Folder, sample: Sample, size: tuple[int, ...], mask: Path, turned: Counter) -> bool:
    header = folder.header(sample.image)
    if header.stored != (header.width, header.height) and size in (header.stored, (header.width, header.height)):
        turned['stored' if size == header.stored else 'turned'] += 1
        if len(turned) > 1:
            text = 'label maps follow the rotation in the EXIF data of their images, others do not'
            folder.findings.error(text, folder.show(sample.image), 'rotate the files themselves')
        return True
    if size == (header.width, header.height):
        return True
    example = f'{folder.show(mask)}: {size[0]} x {size[1]}, its image: {header.width} x {header.height}'
    folder.findings.error('label maps have another size than their image', example)
    return False


# What the values mean -------------------------------------------------------------------------------------------


@dataclass
class _Named:
    """A line of a file of classes."""

    name: str
    number: int | None
    colour: int | None


def _read_names(folder: Folder) -> tuple[str, list[_Named]]:
    """The classes that a file beside the images lists: its name and its lines."""
    file = classes_file(folder, _NAME_FILES)
    if file is None:
        return '', []
    found = []
    for line in read_text(file).splitlines():
        words = [word for word in re.split(r'[,;:\t]+|\s+', line.split('#')[0].strip()) if word]
        if not words:
            continue
        number = colour = None
        if len(words) >= 4 and all(map(str.isdecimal, words[-3:])):
            colour, words = words[-3:], words[:-3]
        elif len(words) >= 4 and all(map(str.isdecimal, words[:3])):
            colour, words = words[:3], words[3:]
        if len(words) > 1 and words[0].isdecimal():
            number, words = int(words[0]), words[1:]
        red, green, blue = map(int, colour or (0, 0, 0))
        found.append(_Named(' '.join(words), number, red << 16 | green << 8 | blue if colour else None))
    if len(found) > 1 and _is_plain(found[0]) and not any(map(_is_plain, found[1:])):
        found = found[1:]  # the head of a table
    class_names([line.name for line in found], folder.findings, file.name)
    return file.name, found


def _is_plain(line: _Named) -> bool:
    return line.number is None and line.colour is None


def _name_values(folder: Folder, data: OwnData, values: _Values) -> None:
    """Decide what the values of the label maps mean: set the classes, the class of each value and the colours."""
    file, names = _read_names(folder)
    found = values.counts
    if min(found) < 0:
        folder.findings.error('label maps have negative values', values.first[min(found)])
    elif data.coloured:
        _colours(folder, data, values, file, names)
    elif _is_soft(found, values.lossy):
        data.threshold = 127
        _binary(data, names)
        data.notes.append('label maps are masks with soft edges: from 128 on a pixel is an object')
    elif set(found) == {0, 255} and len(names) <= 2:
        data.values = {0: 0, 255: 1}
        _binary(data, names)
        data.notes.append(
            'label maps are masks of 0 and 255: 255 is the class that is looked for, and nothing is ignored'
        )
    elif values.lossy:
        text = 'label maps are saved as JPEG, which changes the numbers of classes'
        folder.findings.error(text, values.lossy, 'save them as PNG', 0)
    else:
        _numbers(folder, data, values, file, names)


def _is_soft(found: Counter, lossy: str) -> bool:
    """Whether values are those of a mask with soft edges: nearly all of them close to 0 and to 255, and others between.

    In a file that is lossy, few values are enough.
    """
    extreme = sum(count for value, count in found.items() if value <= 10 or 245 <= value <= 255)
    both = any(value <= 10 for value in found) and any(245 <= value <= 255 for value in found)
    return len(found) > (1 if lossy else 24) and both and max(found) <= 255 and extreme > 0.7 * sum(found.values())


def _binary(data: OwnData, names: list[_Named]) -> None:
    texts = [line.name for line in names]
    data.classes = tuple(texts) if len(texts) == 2 else ('background', texts[0] if len(texts) == 1 else 'foreground')


def _numbers(folder: Folder, data: OwnData, values: _Values, file: str, names: list[_Named]) -> None:
    numbers = sorted(value for value in values.counts if value != IGNORED)
    if not numbers:
        folder.findings.error('label maps hold nothing but 255, which is ignored', values.first[IGNORED], count=0)
        return
    if not names:
        if len(numbers) > 200:
            text = f'label maps hold {len(numbers)} different values: are they pictures, not maps of class numbers?'
            folder.findings.error(text, values.first[numbers[-1]], count=0)
            return
        data.values = {value: i for i, value in enumerate(numbers)}
        plain = numbers == [0, 1]
        data.classes = ('background', 'foreground') if plain else tuple(f'class {value}' for value in numbers)
        data.notes.append('no names of classes are there: write one a line into classes.txt')
        if IGNORED in values.counts:
            data.notes.append(
                '255 in the label maps is ignored: if it is a class, write numbers before the names, as in "255 car"'
            )
        return
    data.classes = tuple(line.name for line in names)
    if all(line.colour is not None for line in names):
        data.palette = [_rgb(line.colour) for line in names]
    if all(line.number is not None for line in names):
        data.values = {line.number: i for i, line in enumerate(names)}
    elif numbers[-1] < len(names):
        data.values = {i: i for i in range(len(names))}
    elif numbers[-1] == len(names):
        data.values = {0: IGNORED} | {i + 1: i for i in range(len(names))}
        data.notes.append(f'0 in the label maps is none of the {len(names)} classes of {file}: it is ignored')
    else:
        data.values = {}
    data.values.setdefault(IGNORED, IGNORED)
    unknown = [value for value in numbers if value not in data.values]
    if unknown:
        what = f'{unknown[-1]} in {values.first[unknown[-1]]}'
        text = f'numbers in label maps are none of the {len(names)} classes of {file}'
        fix = 'write the number before each name, as in "128 car"' if any(map(_is_plain, names)) else ''
        folder.findings.error(text, what, fix, len(unknown))


def _colours(folder: Folder, data: OwnData, values: _Values, file: str, names: list[_Named]) -> None:
    palette = [line for line in names if line.colour is not None]
    if palette:
        data.values = {line.colour: i for i, line in enumerate(palette)}
        data.classes = tuple(line.name for line in palette)
        unknown = [value for value in values.counts if value not in data.values]
        if unknown:
            what = f'{_rgb(unknown[0])} in {values.first[unknown[0]]}'
            folder.findings.error(f'colours of label maps are not in {file}', what, 'add them', len(unknown))
    else:
        colours = sorted(values.counts)
        if len(colours) > 200:
            text = f'label maps hold {len(colours)} colours: are they photographs, or saved as JPEG?'
            folder.findings.error(text, values.first[colours[-1]], 'write class numbers or exact colours as PNG', 0)
            return
        data.values = {colour: i for i, colour in enumerate(colours)}
        data.classes = tuple(f'#{colour:06x}' for colour in colours)
        if len(names) == len(colours):
            text = f'{file} names {len(names)} classes without their colours'
            folder.findings.error(text, '', 'write red, green, blue behind each', 0)
        data.notes.append('no names of colours are there: write "name red green blue" lines into classes.txt')
    data.palette = [_rgb(colour) for colour in data.values]


def _rgb(colour: int) -> tuple[int, int, int]:
    return colour >> 16, colour >> 8 & 255, colour & 255


def to_classes(content: np.ndarray, data: OwnData) -> np.ndarray:
    """A label map as the libraries read it: the numbers of classes in 8 bits, 255 where there is none."""
    if data.values is None and data.threshold is None:
        return content.astype(np.uint8)
    if data.threshold is not None:
        return (content > data.threshold).astype(np.uint8)
    keys = np.array(sorted(data.values))
    table = np.array([data.values[key] for key in keys.tolist()], np.uint8)
    place = np.minimum(np.searchsorted(keys, content), len(keys) - 1)
    return np.where(keys[place] == content, table[place], IGNORED).astype(np.uint8)
