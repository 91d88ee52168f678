"""Draw predictions and annotations over images: boxes, outlines and label maps in the colours of their classes."""

from collections.abc import Sequence

import cv2
import numpy as np
from mmengine.fileio import get

CLASS_COLOURS = (  # by name, and BGR as OpenCV has it
    ('red', (60, 60, 230)),
    ('green', (80, 190, 60)),
    ('blue', (230, 130, 50)),
    ('yellow', (40, 210, 240)),
    ('pink', (200, 110, 240)),
    ('cyan', (220, 210, 60)),
    ('orange', (50, 150, 250)),
)
"""The colours of the first classes in pictures of boxes; further ones repeat them."""

_WHITE = (255, 255, 255)


def class_colour(index: int) -> tuple[int, int, int]:
    """The colour, in BGR, of a class in pictures of boxes."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)][1]


def palette(count: int) -> np.ndarray:
    """Distinct colours ``(count, 3)`` in BGR for label maps; the hue of a class is far from those of its
    neighbours."""
    hues = (np.arange(count) * 0.618034 % 1 * 180).astype(np.uint8)
    values = np.where(np.arange(count) % 2, 235, 175).astype(np.uint8)
    return cv2.cvtColor(np.stack([hues, np.full_like(hues, 190), values], 1)[None], cv2.COLOR_HSV2BGR)[0]


def reading_flags(stored: bool) -> int:
    """OpenCV's flags for reading an image in BGR; with ``stored`` the rotation in its EXIF data is left out."""
    return cv2.IMREAD_COLOR | (cv2.IMREAD_IGNORE_ORIENTATION if stored else 0)


def read_image(path: str, width: int, stored: bool = False) -> tuple[np.ndarray, float]:
    """Read an image as the libraries do, from any of their storage backends, and make it ``width`` pixels wide.

    Args:
        path: the file.
        width: the width.
        stored: whether the rotation in its EXIF data is left out.

    Returns:
        The image ``(H, W, 3)`` in BGR, and the factor by which it was scaled.

    Raises:
        ValueError: if the file is no image.
    """
    image = cv2.imdecode(np.frombuffer(get(path), np.uint8), reading_flags(stored))
    if image is None:
        raise ValueError(f'{path} is not an image.')
    scale = width / image.shape[1]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (width, max(1, round(scale * image.shape[0]))), interpolation=interpolation), scale


def draw_box(
    image: np.ndarray, box: Sequence[float], colour: tuple[int, int, int], text: str = '', scale: float = 1.0
) -> None:
    """Draw a box ``(x1, y1, x2, y2)`` into an image, with a text at its upper left corner, larger by ``scale``."""
    scale = max(scale, 1.0)
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    line = max(1, round(scale))
    cv2.rectangle(image, (x1, y1), (x2, y2), colour, line, cv2.LINE_AA)
    if text:
        size = 0.32 * scale
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, line)
        y = max(y1, height + 3)
        cv2.rectangle(image, (x1, y - height - 3), (x1 + width + 2, y), colour, -1)
        cv2.putText(image, text, (x1 + 1, y - 2), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), line, cv2.LINE_AA)


def draw_outlines(image: np.ndarray, outlines: Sequence[np.ndarray], colour: tuple[int, int, int]) -> None:
    """Draw closed outlines, each ``(N, 2)``, into an image, half filled."""
    points = [np.round(outline).astype(np.int32) for outline in outlines]
    filled = image.copy()
    cv2.fillPoly(filled, points, colour)
    image[:] = cv2.addWeighted(image, 0.65, filled, 0.35, 0)
    cv2.polylines(image, points, True, colour, 1, cv2.LINE_AA)


def draw_labels(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """An image with a map of class numbers over it, resized to the image; numbers beyond the classes are left out."""
    labels = cv2.resize(labels.astype(np.int32), image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    known = (labels >= 0) & (labels < len(colours))
    drawn = image.copy()
    drawn[known] = (0.45 * image[known] + 0.55 * colours[labels[known]]).astype(np.uint8)
    return drawn


def titled(image: np.ndarray, title: str, colour: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """An image with a line of text above it, and a margin to its right and below."""
    line = np.full((18, image.shape[1], 3), 255, np.uint8)
    cv2.putText(line, title, (3, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([line, image]), 0, 4, 0, 4, cv2.BORDER_CONSTANT, value=_WHITE)


def in_rows(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size in rows of ``columns``, with white at the end of the last one."""
    images = [*images, *[np.full_like(images[0], 255)] * (-len(images) % columns)]
    return np.vstack([np.hstack(images[i : i + columns]) for i in range(0, len(images), columns)])


def outlines_of(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines, each ``(N, 2)``, of a mask ``(H, W)``."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [outline[:, 0] for outline in found]
