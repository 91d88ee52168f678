"""Pictures of the detections that the methods of a comparison make in the same test images."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.report.html import jpeg_of
from mona_mm.report.pictures import CLASS_COLOURS, class_colour, in_rows, titled
from mona_mm.reproduce.comparison import Cell, Comparison, Composer
from mona_mm.reproduce.records import Record, best_learning_rate

_SCORE = 0.3  # detections of a lower score are neither drawn nor counted
_IOU = 0.5
_WIDTH = 240  # of a panel, in pixels
_COLUMNS = 5

Boxes = list[tuple[list[float], int, float]]
"""Boxes ``[x, y, width, height]`` with the id of their class and their score."""


@dataclass(frozen=True)
class Picture:
    """A picture of one test image.

    Args:
        file: the name of the file.
        task: the name of the task.
        caption: what it shows.
        credit: the source and the licence of the image.
    """

    file: str
    task: str
    caption: str
    credit: str


def draw_pictures(composer: Composer, records: dict[Cell, Record], folder: Path) -> list[Picture]:
    """Draw the best image, the worst image and the one on which methods differ most, of every task that has credit.

    The predictions are those of the tests of the first seed, which a run keeps in its work dir. An image's score is
    its F1 at an IoU of 0.5, of detections with a score of at least 0.3.

    Args:
        composer: the builder of the configs, with the folders of the data and the work dirs.
        records: the results.
        folder: the folder for the pictures and their list, ``pictures.json``.
    """
    table, drawn = composer.table, []
    for task in table.tasks:
        found = _predictions(composer, records, task.name) if task.credit else {}
        if len(found) < 2:
            continue
        method = next(iter(found))
        config = composer.compose(Cell(task.name, method, table.rates(task.name, method)[0], table.seeds[0]))
        dataset = config.test_dataloader.dataset
        content = json.loads(Path(dataset.data_root, dataset.ann_file).read_text(encoding='utf-8'))
        truth = _by_image(content['annotations'])
        names = {category['id']: category['name'] for category in content['categories']}
        for kind, image, scores in _chosen(truth, found):
            entry = next(entry for entry in content['images'] if entry['id'] == image)
            source = Path(dataset.data_root, dataset.data_prefix.img, entry['file_name'])
            panels = {'annotation': truth[image], **{method: boxes.get(image, []) for method, boxes in found.items()}}
            labels = {method: f'{method}  F1 {scores[method]:.2f}' for method in found}
            name = f'{task.name}-{kind}.jpg'
            _draw(source, panels, labels, list(names), folder / name)
            caption = f'{_KINDS[kind]} Detections of a score of at least {_SCORE}; the classes are {_legend(names)}.'
            drawn.append(Picture(name, task.name, caption, f'{entry["file_name"]}, {task.credit}'))
    AtomicLocalBackend().put_text(
        json.dumps([asdict(picture) for picture in drawn], indent=1), folder / 'pictures.json'
    )
    return drawn


_KINDS = dict(
    best='The test image that the methods together detect best.',
    worst='The test image that they detect worst.',
    differ='The test image on which they differ most.',
)


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures in a folder; none if there is no list of them."""
    file = folder / 'pictures.json'
    return [Picture(**entry) for entry in json.loads(file.read_text(encoding='utf-8'))] if file.is_file() else []


def _predictions(composer: Composer, records: dict[Cell, Record], task: str) -> dict[str, dict[int, Boxes]]:
    """The detections of the first seed by method and image, of the methods that have been tested."""
    table: Comparison = composer.table
    found = {}
    for method in table.methods:
        lr = best_learning_rate(table, task, method, records)
        if lr is None:
            continue
        file = composer.work_dir / Cell(task, method, lr, table.seeds[0], 'test').folder / 'predictions.bbox.json'
        if file.is_file():
            kept = [box for box in json.loads(file.read_text(encoding='utf-8')) if box['score'] >= _SCORE]
            found[method] = _by_image(kept)
    return found


def _by_image(annotations: Sequence[Mapping[str, Any]]) -> dict[int, Boxes]:
    boxes: dict[int, Boxes] = {}
    for entry in annotations:
        box = entry['bbox'], entry['category_id'], entry.get('score', 1.0)
        boxes.setdefault(entry['image_id'], []).append(box)
    return boxes


def _chosen(
    truth: Mapping[int, Boxes], found: Mapping[str, Mapping[int, Boxes]]
) -> list[tuple[str, int, dict[str, float]]]:
    """The kind, the image and the scores of the methods, of each image to draw."""
    scores = {
        image: {method: f1(boxes, own.get(image, [])) for method, own in found.items()}
        for image, boxes in sorted(truth.items())
    }
    mean = {image: statistics.fmean(own.values()) for image, own in scores.items()}
    spread = {image: statistics.pstdev(own.values()) for image, own in scores.items()}
    images = dict(best=max(mean, key=mean.get), worst=min(mean, key=mean.get), differ=max(spread, key=spread.get))
    return [(kind, image, scores[image]) for kind, image in images.items()]


def f1(truth: Boxes, detections: Boxes) -> float:
    """The F1 of detections at an IoU of 0.5, each matched with the annotation of its class that overlaps it most."""
    left, hits = list(truth), 0
    for box, cls, _ in sorted(detections, key=lambda entry: -entry[2]):
        overlaps = [(iou(box, entry[0]), entry) for entry in left if entry[1] == cls]
        best = max(overlaps, key=lambda pair: pair[0], default=(0.0, None))
        if best[0] >= _IOU:
            left.remove(best[1])
            hits += 1
    return 2 * hits / max(len(truth) + len(detections), 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """The intersection over union of two boxes ``[x, y, width, height]``."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both) if both else 0.0


def _legend(names: Mapping[int, str]) -> str:
    return ', '.join(f'{name} ({CLASS_COLOURS[i % len(CLASS_COLOURS)][0]})' for i, name in enumerate(names.values()))


def _draw(
    source: Path, panels: Mapping[str, Boxes], labels: Mapping[str, str], classes: Sequence[int], file: Path
) -> None:
    """Write a JPEG of the image with the boxes of each panel."""
    image = cv2.imread(str(source))
    scale = _WIDTH / image.shape[1]
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    drawn = []
    for name, boxes in panels.items():
        panel = image.copy()
        for box, cls, _ in boxes:
            x, y, width, height = (round(scale * value) for value in box)
            cv2.rectangle(panel, (x, y), (x + width, y + height), class_colour(classes.index(cls)), 1, cv2.LINE_AA)
        drawn.append(titled(panel, labels.get(name, name)))
    AtomicLocalBackend().put(jpeg_of(in_rows(drawn, _COLUMNS)), file)
