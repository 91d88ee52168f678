"""The interface of a layout."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mona_mm.own_data.findings import Findings
from mona_mm.own_data.images import Header, ImageIndex, read_header, split_of_path
from mona_mm.own_data.samples import OwnData, Sample
from mona_mm.own_data.text import lines_of


@dataclass
class Folder:
    """A folder to read, with what all layouts need.

    Args:
        root: the folder, an absolute path.
        files: all its files.
        findings: where faults are noted.
        skip_unreadable: whether images that cannot be read are left out; otherwise they are errors.
        extracted: where images that are inside annotation files are written.
        turned: of images with a rotation in their EXIF data, how many were annotated as they are ``'stored'``, and how
            many ``'turned'``.
    """

    root: Path
    files: list[Path]
    findings: Findings = field(default_factory=Findings)
    skip_unreadable: bool = False
    extracted: Path | None = None
    turned: Counter = field(default_factory=Counter)
    _images: ImageIndex | None = None
    _headers: dict[Path, Header] = field(default_factory=dict)

    @property
    def images(self) -> ImageIndex:
        """The images below the folder."""
        if self._images is None:
            self._images = ImageIndex(self.root)
        return self._images

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """The files of some suffixes."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def show(self, path: Path) -> str:
        """A path as the report names it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def header(self, image: Path) -> Header:
        """The header of an image, read once."""
        if image not in self._headers:
            self._headers[image] = read_header(image)
        return self._headers[image]

    def split_of(self, path: Path) -> str:
        """The split that the folders above a file speak of; ``''`` if they speak of none."""
        if not path.is_relative_to(self.root):
            return ''
        return split_of_path(path.parent, self.root) or ''

    def sample(self, image: Path) -> Sample | None:
        """A sample of an image, with its size; None, noted as a fault, if it cannot be read."""
        if '\n' in image.name or '\r' in image.name or not _is_unicode(str(image)):
            self.unreadable(f'{str(self.show(image))!a}: the name of the file is not in UTF-8, or has a line break')
            return None
        header = self.header(image)
        if header.problem:
            self.unreadable(f'{self.show(image)}: {header.problem}')
            return None
        if header.mode.startswith('I'):
            self.findings.warn('images have 16 bits a channel', self.show(image), 'read as 8 bits, divided by 256')
        if header.width * header.height > 100_000_000:
            self.findings.warn(
                'images have more than 100 million pixels', self.show(image), 'slow to read: make them smaller'
            )
        return Sample(image, header.width, header.height)

    def fits(self, sample: Sample, said: tuple[int, int], where: str, source: str) -> bool:
        """Compare the size that annotations say with the file's; return whether they can be in the file's pixels.

        An image with a rotation in its EXIF data may have been annotated before or after it; the size of the sample
        becomes the one that is said.

        Args:
            sample: the image.
            said: width and height.
            where: the file to name in a message.
            source: the kind of the annotations in messages.
        """
        header = self.header(sample.image)
        turned = (header.width, header.height)
        if turned != header.stored and said in (turned, header.stored):
            self.turned['turned' if said == turned else 'stored'] += 1
            sample.width, sample.height = said
            return True
        if said == turned:
            return True
        example = f'{where}: {said[0]} x {said[1]} in the {source}, {turned[0]} x {turned[1]} in the file'
        if said == turned[::-1]:
            text = f'images have width and height swapped in the {source}'
            self.findings.warn(text, example, 'taken from the files')
            return True
        text = f'images have another size than the {source} says'
        self.findings.error(text, example, 'annotate the files as they are')
        return False

    def settle_rotation(self, data: OwnData) -> None:
        """Leave out the rotation in EXIF data if the annotations do not follow it; it is an error if only some do."""
        if not self.turned['stored']:
            return
        data.keep_orientation = True
        data.notes.append(
            f'{self.turned["stored"]} images have a rotation in their EXIF data that the annotations do not follow: it '
            'is not applied'
        )
        if self.turned['turned']:
            text = 'images were annotated after the rotation of their EXIF data, others before it'
            self.findings.error(text, '', 'rotate the files themselves', self.turned['turned'])

    def missing(self, name: str, annotation: Path, relation: str = 'which {} lists') -> None:
        """Note an image that an annotation names and :meth:`ImageIndex.find` has not found, or has found twice."""
        found = self.images.named(name)
        also = f': there are {self.show(found[0])} and {self.show(found[1])}' if len(found) > 1 else ''
        self.unreadable(f'{name}, {relation.format(self.show(annotation))}{also}')

    def unreadable(self, what: str) -> None:
        """Note an image that is missing or cannot be read."""
        if self.skip_unreadable:
            self.findings.warn('images are missing or cannot be read', what, 'left out')
        else:
            self.findings.error(
                'images are missing or cannot be read',
                what,
                'mend them, or leave them out with --data-options skip=True',
            )


class Layout(ABC):
    """A layout of a folder.

    ``name`` is what ``--data-options layout=`` names it by, ``title`` its name in the report, ``tasks`` which models it
    has data for: ``'boxes'`` for detectors, ``'maps'`` for segmentors, ``'labels'`` for classifiers.
    """

    name: str
    title: str
    tasks: Sequence[str]

    @abstractmethod
    def recognise(self, folder: Folder) -> bool:
        """Whether a folder has this layout."""

    @abstractmethod
    def read(self, folder: Folder) -> OwnData:
        """Read a folder. Faults are noted in its findings; only what leaves nothing to read raises a ConfigError."""


def _is_unicode(text: str) -> bool:
    """Whether a path is text: the bytes of a name in another encoding cannot be written into a list of files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pixels(value: object) -> int | None:
    """A width or height that an annotation says; 0 if it says none, None if it is no number."""
    try:
        return int(float(value or 0))
    except (TypeError, ValueError, OverflowError):
        return None


def class_names(names: Sequence[object], findings: Findings, source: str) -> tuple[str, ...]:
    """Names of classes as text, checked: none empty, none twice."""
    texts = tuple(str(name).strip() for name in names)
    known: set[str] = set()
    for number, text in enumerate(texts):
        if not text:
            findings.error('classes have no name', f'class {number} of {source}')
        elif text in known:
            findings.error('names of classes occur twice', f'{text!r} in {source}')
        elif '{{' in text:
            findings.error('names of classes have two braces, for which configs put in values', f'{text!r} in {source}')
        known.add(text)
    return texts


def natural(name: str) -> tuple:
    """A key that sorts names with numbers as people do: 2 before 10."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


_NAME_FILES = (
    *('classes.txt', 'labels.txt', 'obj.names', 'class_names.txt', 'names.txt', 'label_names.txt'),
    *('_classes.txt', '_darknet.labels'),
)


def classes_file(folder: Folder, names: Sequence[str] = _NAME_FILES) -> Path | None:
    """A text file with a name of a class in each line, if there is one: at the top of the folder, or below.

    Of files below the top, the content of all must be the same; otherwise it is noted as a fault.
    """
    top = next((folder.root / name for name in names if (folder.root / name).is_file()), None)
    if top is not None:
        return top
    below = [path for path in folder.files if path.name in names]
    for path in below[1:]:
        if lines_of(path) != lines_of(below[0]):
            what = f'{folder.show(below[0])}, {folder.show(path)}'
            folder.findings.error('files of classes differ', what, 'write one at the top of the folder')
            break
    return below[0] if below else None


def listed_names(folder: Folder) -> list[str] | None:
    """The lines of the file of classes, empty ones included, since each has its number; None without such a file.

    Raises:
        ConfigError: if the file is not in UTF-8.
    """
    file = classes_file(folder)
    return None if file is None else lines_of(file)
