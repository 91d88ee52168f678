"""Image files: what their headers say, whether they are whole, which are equal."""

import contextlib
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

SUFFIXES = frozenset(
    ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.pnm', '.jp2')
    + ('.gif',)
)
"""The suffixes of files that count as images, in lower case."""

OTHER_SUFFIXES = frozenset(
    ('.heic', '.heif', '.avif', '.jxl', '.svg', '.psd', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.raw', '.dcm', '.exr')
)
"""The suffixes of images that OpenCV does not read, in lower case."""

LABEL_MAP_FOLDER = re.compile(r'mask|segmentation|^segs?$|^gt|ground_?truth|label_?ids')
"""What the names of folders have, in lower case, that hold label maps and no images."""

LARGEST = 1 << 30
"""The most pixels that OpenCV decodes unless it is told otherwise."""

_ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND'}
"""The first bytes of a JPEG and a PNG, and the marker at the end of a whole one."""

_TAIL = 1 << 12  # bytes at the end of a file in which the marker is looked for
_EXAMPLE = 1 << 12  # bytes in the middle of a file that are compared before whole files are


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file say.

    Args:
        width, height: the size after the rotation that the EXIF data ask for, in which the libraries load it.
        stored: the size as stored, (width, height).
        mode: Pillow's name of the kind of pixel.
        problem: why the libraries could not load it, or ``''``.
    """

    width: int = 0
    height: int = 0
    stored: tuple[int, int] = (0, 0)
    mode: str = ''
    problem: str = ''


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith('.')


def read_header(path: str | os.PathLike) -> Header:
    """Read the header of an image file, and its end, without decoding it where that is not needed."""
    try:
        if not os.path.getsize(path):
            return Header(problem='the file is empty')
        with open_image(path) as image:
            stored, mode, kind = image.size, image.mode, image.format
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        return Header(problem='there is no such file')
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = 'no image that Pillow knows' if isinstance(error, UnidentifiedImageError) else str(error)
        return Header(problem=reason or type(error).__name__)
    width, height = reversed(stored) if turned else stored
    problem = ''
    if width * height >= LARGEST:
        problem = f'{width} x {height} pixels are more than OpenCV reads'
    elif truncation(path):
        problem = 'the file is cut short'
    elif mode == 'F' or kind not in ('JPEG', 'PNG'):  # the kinds that OpenCV may not read
        problem = '' if load(path) is not None else f'OpenCV cannot read this {kind} file'
    return Header(width, height, stored, mode, problem)


@contextlib.contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image by Pillow, however large it is: the data are one's own, and no attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def load(path: str | os.PathLike) -> np.ndarray | None:
    """Load an image as the libraries do by default: three 8-bit channels, rotated as the EXIF data ask for.

    None if OpenCV cannot.
    """
    try:
        return mmcv.imread(str(path))
    except Exception:  # OpenCV's own errors have one class and no kinds
        return None


def truncation(path: str | os.PathLike) -> str:
    """Why a JPEG or PNG cannot be decoded to its end, in the decoder's words; empty if it can, and for other kinds.

    OpenCV returns an image that is cut off, grey from there on, without an error. The end of the file is looked at, and
    only one without its marker is decoded: other bytes may follow the image, or the marker alone may be missing.
    """
    with open(path, 'rb') as file:
        end = _ENDS.get(file.read(2))
        if end is None:
            return ''
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        if end in file.read():
            return ''
    try:
        with open_image(path) as image:
            image.load()
    except Exception as reason:  # Pillow raises anything for a damaged file
        return first_line(reason)
    return ''


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip('.')


def equal_files(paths: Iterable[str], side: Callable[[str], object] = str) -> list[list[str]]:
    """Find the files of equal content, as groups of two or more paths; files that do not exist are left out.

    Files of one size are compared by the digest of a few bytes, and those that still look equal by that of all.

    Args:
        paths: the files.
        side: the side that a path is on; groups whose files are all on one side are not looked at. By default each
            file is a side of its own.
    """
    by_size = defaultdict(list)
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            by_size[os.stat(path).st_size].append(path)
    groups = [group for size, group in by_size.items() if size and len(set(map(side, group))) > 1]
    for digest in (_digest_of_middle, _digest):
        groups = [part for group in groups for part in _parts(group, digest) if len(set(map(side, part))) > 1]
    return groups


def _parts(group: list[str], digest: Callable[[str], bytes]) -> list[list[str]]:
    parts = defaultdict(list)
    for path in group:
        parts[digest(path)].append(path)
    return list(parts.values())


def _digest_of_middle(path: str) -> bytes:
    with open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) // 2 - _EXAMPLE // 2))
        return hashlib.blake2b(file.read(_EXAMPLE)).digest()


def _digest(path: str) -> bytes:
    digest = hashlib.blake2b()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


class ImageIndex:
    """The images below a folder, found by the names that annotations give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = sorted(path for path in walk(root) if is_image(path.name))
        self._by_name, self._by_stem = defaultdict(list), defaultdict(list)
        for path in self.paths:
            self._by_name[_plain(path.name)].append(path)
            if not any(LABEL_MAP_FOLDER.search(part.lower()) for part in path.relative_to(root).parts[:-1]):
                self._by_stem[_plain(path.stem)].append(path)

    def named(self, name: str) -> list[Path]:
        """The images with the file name of an annotation, in any folder; those with another suffix if there is none.

        Label maps are none of the latter.
        """
        name = name.replace('\\', '/').rpartition('/')[2]
        return self._by_name.get(_plain(name)) or self._by_stem.get(_plain(os.path.splitext(name)[0]), [])

    def find(self, name: str, near: Path, split: str = '') -> Path | None:
        """The image that an annotation names: by its whole path, else by the end of its path.

        Among several, those that share most of the named folders are taken, then those of the split's folder, then the
        nearest to the folder of the annotation.

        Args:
            name: a file name, with folders or without; of the other systems', too.
            near: the folder of the annotation.
            split: the split, whose name may be that of a folder.
        """
        found, name = self.named(name), name.replace('\\', '/')
        for folder in (near, self.root):
            if is_image(name) and (folder / name).is_file():
                return Path(os.path.normpath(folder / name))
        parts = name.split('/')
        if len(found) < 2:
            return found[0] if found else None

        def fit(path: Path) -> tuple:
            shared = 0
            for mine, theirs in zip(reversed(path.parts[:-1]), reversed(parts[:-1]), strict=False):
                if mine != theirs:
                    break
                shared += 1
            folders = path.relative_to(self.root).parts[:-1] if path.is_relative_to(self.root) else ()
            in_split = bool(split) and any(split_of(folder) == split for folder in folders)
            common = len(os.path.commonpath([path.parent, near]))
            return shared, in_split, path.name == parts[-1], common

        best = max(map(fit, found))
        best_paths = [path for path in found if fit(path) == best]
        return best_paths[0] if len(best_paths) == 1 else None


def _plain(name: str) -> str:
    """A file name as it is compared: without case, and with accents as one character, as other systems write them."""
    return unicodedata.normalize('NFC', name).lower()


_SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', 'lost+found', '$RECYCLE.BIN', 'System Volume Information')


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one of those that systems make for themselves."""
    return name.startswith(('.', *_SYSTEM_FOLDERS))


def walk(root: Path) -> Iterable[Path]:
    """Yield all files below a folder, but for hidden ones, in a fixed order; links to folders are followed once.

    Raises:
        PermissionError: if a folder may not be read, which would hide a part of the data.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise_if_forbidden):
        real = os.path.realpath(folder)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(folder, name) for name in sorted(files) if not is_hidden(name))


def _raise_if_forbidden(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise error


_SPLITS = dict(
    train=('train', 'training', 'trainval'),
    val=('val', 'valid', 'validation', 'dev'),
    test=('test', 'testing'),
)


def split_of(name: str) -> str | None:
    """The split that a folder or file name speaks of: ``instances_train2017``, ``valid``, ``img_test``; else None."""
    words = ''.join(c if c.isalpha() else ' ' for c in name.lower()).split()
    found = [split for split, names in _SPLITS.items() if any(word in names for word in words)]
    return found[0] if len(found) == 1 else None


def split_of_path(path: Path, root: Path) -> str | None:
    """The split that a path below ``root`` speaks of, by its own name or else by its folders, the nearest first."""
    parts = path.relative_to(root).parts
    names = [os.path.splitext(parts[-1])[0], *reversed(parts[:-1])] if parts else []
    return next((split for split in map(split_of, names) if split), None)
