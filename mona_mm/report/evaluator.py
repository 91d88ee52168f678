"""What every kind of evaluation has in common: which images are kept, and what is shown of them."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]
"""The x and y of a line."""

SHOWN = 3
"""The number of images of each kind (best, worst, random) on a page."""


@dataclass
class Chart:
    """Lines over a common axis.

    Args:
        title: what is drawn.
        x: the name of the horizontal axis.
        lines: the lines by name.
        mark: a value on the horizontal axis to mark.
        caption: what else is to be said.
    """

    title: str
    x: str
    lines: dict[str, Curve]
    mark: float | None = None
    caption: str = ''


@dataclass
class Confusion:
    """How often each true class (rows) was predicted as each class (columns)."""

    counts: np.ndarray
    truths: list[str]
    predictions: list[str]
    caption: str


@dataclass
class Picture:
    """One image with predictions beside the truth, in BGR."""

    kind: str
    caption: str
    image: np.ndarray


@dataclass
class Evaluation:
    """What an evaluation has seen.

    Args:
        images: the number of images.
        score: the name of the score of a class.
        by_class: the score of each class, as a fraction; NaN for a class without samples.
        columns: the columns of the table of classes, each with what it means; the first two are class and score.
        rows: the rows of the table.
        charts: precision and recall, and scores by confidence.
        confusion: the confusion matrix; None where an image may have several classes.
        pictures: the best, the worst and some random images.
        remarks: what else must be known to read them.
    """

    images: int
    score: str = ''
    by_class: dict[str, float] = field(default_factory=dict)
    columns: list[tuple[str, str]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    confusion: Confusion | None = None
    pictures: list[Picture] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class Evaluator(ABC):
    """Collect what an evaluation sees, image by image, in bounded memory.

    Args:
        classes: the names of the classes.
        dataset: the data set, for truth that the samples of the model do not hold.
        images: the number of images that the loader will show to this process.
        most: the largest number of images to look at; of more, every n-th one is.
        most_pictures: the largest number of images of which enough is kept to draw them.
    """

    def __init__(
        self, classes: Sequence[str], dataset: Any, images: int, most: int = 5000, most_pictures: int = 100
    ) -> None:
        self.classes = list(classes)
        self.dataset = dataset
        self.stored = ignores_orientation(dataset)
        self._step = max(1, -(-images // most))
        self._picture_step = self._step * max(1, -(-images // (self._step * most_pictures)))
        self._shown = 0

    def add(self, samples: Sequence[Any]) -> None:
        """Take the samples of a batch, as the model's ``val_step`` returns them."""
        for sample in samples:
            if self._shown % self._step == 0:
                self.take(sample, self._shown, self._shown % self._picture_step == 0)
            self._shown += 1

    @abstractmethod
    def take(self, sample: Any, position: int, draw: bool) -> None:
        """Take one sample.

        Args:
            sample: the sample, with predictions and truth.
            position: its number in the evaluation.
            draw: whether it may have to be drawn later.
        """

    @abstractmethod
    def summary(self) -> Evaluation:
        """Sum up what was taken."""

    def class_name(self, index: int) -> str:
        """The name of a class; its number if it has no name."""
        return str(self.classes[index]) if 0 <= index < len(self.classes) else str(index)

    @property
    def remarks(self) -> list[str]:
        """Remarks on images that were not looked at."""
        return [f'Every {self._step}th image of the evaluation was looked at.'] if self._step > 1 else []


def ignores_orientation(dataset: Any) -> bool:
    """Whether the ``pipeline`` of a data set, which may be within wrappers, leaves the rotation in EXIF data out."""
    while inner := getattr(dataset, 'dataset', None) or getattr(dataset, 'datasets', None):
        dataset = inner[0] if isinstance(inner, list | tuple) else inner
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return any(str(getattr(step, 'color_type', '')).endswith('ignore_orientation') for step in steps)


def chosen(scores: Mapping[int, float]) -> list[tuple[str, int]]:
    """The best, the worst and some random images, by their scores; each image at most once, the same every time."""
    order = sorted(scores, key=lambda image: (-scores[image], image))
    best = order[:SHOWN]
    worst = [image for image in reversed(order) if image not in best][:SHOWN]
    rest = [image for image in sorted(order) if image not in best and image not in worst]
    others = sorted(random.Random(0).sample(rest, min(SHOWN, len(rest))))
    return [*(('best', i) for i in best), *(('worst', i) for i in worst), *(('random', i) for i in others)]


def share(value: float) -> str:
    """A fraction as text for a table, or a dash if it is not known."""
    return '-' if value != value else f'{value:.3f}'


def array(value: Any) -> np.ndarray:
    """A tensor or array-like as a numpy array."""
    return value.detach().cpu().float().numpy() if hasattr(value, 'detach') else np.asarray(value)
