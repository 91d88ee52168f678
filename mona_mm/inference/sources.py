"""Find the images to predict: files, folders, patterns, and the frames of videos; and names for what is written."""

import glob
import os.path as osp
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mona_mm.errors import MissingFileError, UserError
from mona_mm.own_data.images import SUFFIXES, walk

IMAGES = tuple(sorted(SUFFIXES))
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')


@dataclass(frozen=True)
class Source:
    """An image file or a video, and the name of what is written for it: a relative path without suffix."""

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.lower().endswith(VIDEOS)


def find_sources(inputs: Sequence[str], out: Path | None = None) -> list[Source]:
    """Find the images and videos that inputs stand for.

    Args:
        inputs: files, folders (searched with their sub-folders) and patterns (``'images/*.jpg'``, ``**`` for folders).
        out: the folder that predictions are written into. What an earlier run has left there is no input, unless an
            input is within it.

    Returns:
        Each file once, in the order of the inputs. No two have the same name: names keep the folders below the one that
        all files share, and of equal names in a folder (``a.jpg``, ``a.png``) the suffix.

    Raises:
        MissingFileError: if an input stands for nothing.
        UserError: if a file that is named is neither an image nor a video.
    """
    files: dict[str, None] = {}
    for text in inputs:
        found = _files(text)
        if out is not None and not _is_within(text, out):
            found = [file for file in found if not _is_within(file, out)]
        if not found:
            raise MissingFileError(
                f'{text}: there are no images or videos ({", ".join(IMAGES + VIDEOS)}). Give a file, folder or pattern.'
            )
        files |= dict.fromkeys(osp.abspath(file) for file in found)
    for file in files:
        if not file.lower().endswith(IMAGES + VIDEOS):
            raise UserError(f'{file} is neither an image ({", ".join(IMAGES)}) nor a video ({", ".join(VIDEOS)}).')
    root = osp.commonpath([osp.dirname(file) for file in files])
    names = {file: osp.splitext(osp.relpath(file, root))[0] for file in files}
    count = Counter(names.values())
    return [Source(f, name if count[name] == 1 else osp.relpath(f, root)) for f, name in names.items()]


def _is_within(path: str, folder: Path) -> bool:
    return Path(osp.abspath(path)).is_relative_to(osp.abspath(folder))


def _files(text: str) -> list[str]:
    if osp.isfile(text):
        return [text]
    found = map(str, walk(Path(text))) if osp.isdir(text) else filter(osp.isfile, glob.glob(text, recursive=True))
    return sorted(file for file in found if file.lower().endswith(IMAGES + VIDEOS))


def frames(video: str, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number and the image, in BGR, of every n-th frame of a video; none if it cannot be read."""
    capture = cv2.VideoCapture(video)
    try:
        number = 0
        while True:
            found, image = capture.read()
            if not found:
                break
            if number % every == 0:
                yield number, image
            number += 1
    finally:
        capture.release()


def write_image(file: Path, image: np.ndarray) -> None:
    """Write an image, in BGR or as a map of numbers, creating its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(cv2.imencode(file.suffix, image)[1].tobytes())
