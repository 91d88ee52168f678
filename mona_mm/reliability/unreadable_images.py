"""Name an image that cannot be read, or leave it out, in the processes that load data."""

import os.path as osp
from collections.abc import Callable
from functools import wraps
from logging import WARNING
from typing import Any

import cv2
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.logging import print_log

from mona_mm.errors import UnreadableImageError
from mona_mm.own_data.images import first_line, open_image, truncation

_UNREADABLE = (OSError, AssertionError, SyntaxError, cv2.error)
"""What backends raise: cv2 for an empty file, Pillow a SyntaxError for a broken PNG, mmcv an assertion for no image."""


class _Policy:
    """Whether images that cannot be read are left out, in this process and those that are forked from it."""

    skip = False


def check_images(skip: bool = False) -> None:
    """Let the transforms of all libraries that read images and label maps name a file that they cannot read.

    A local file that is cut off is found, too, see :func:`mona_mm.own_data.images.truncation`: its end, which the
    system has just read, is looked at.

    It holds for this process and for worker processes that are forked from it, which is mmengine's way to start them.

    Args:
        skip: leave such a file out, with a line in the log. A data set of mmengine then takes another image, drawn at
            random; for testing, every image is needed.

    Raises:
        UnreadableImageError: by the transforms.
    """
    _Policy.skip = skip
    for transform, key in ((LoadImageFromFile, 'img_path'), (LoadAnnotations, 'seg_map_path')):
        if not hasattr(transform.__call__, 'reads'):
            transform.__call__ = _checked(transform.__call__, key)


def _checked(call: Callable, key: str) -> Callable:
    @wraps(call)
    def checked(transform: Any, results: dict) -> Any:
        path = results.get(key)
        if not isinstance(path, str):
            return call(transform, results)
        try:
            loaded = call(transform, results)
            # A backend may keep the file elsewhere, or map its path.
            is_here = key == 'img_path' and loaded is not None and osp.isfile(path)
            problem = truncation(path) if is_here else ''
        except _UNREADABLE as error:
            problem = _reason(path, error)
            if not problem:
                raise
        if not problem:
            return loaded
        if _Policy.skip:
            print_log(f'{path} is left out: {problem}.', logger='current', level=WARNING)
            return None
        raise UnreadableImageError(
            f'The image {path} cannot be read: {problem}. Restore it, take it out of the annotations, or leave such '
            'images out of training with --skip-unreadable.'
        )

    checked.reads = key
    return checked


def _reason(path: str, error: Exception) -> str:
    """Why a file could not be loaded; empty if the reason is not the file."""
    if '://' in path:
        return str(error)
    if not osp.exists(path):
        return 'there is no such file'
    if not osp.isfile(path):
        return 'it is not a file'
    if osp.getsize(path) == 0:
        return 'it is empty'
    if isinstance(error, PermissionError):
        return 'it may not be read'
    try:
        with open_image(path) as image:
            image.load()
    except Exception as reason:  # Pillow raises anything for a damaged file
        return first_line(reason).replace(f' {path!r}', '')
    return "the pipeline's decoder does not know its format" if 'failed to load image' in str(error) else ''
