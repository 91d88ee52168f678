"""Write predictions: pictures, and COCO's JSON, label maps or a table, by what the model predicts."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import UserError
from mona_mm.inference.predict import Predicted
from mona_mm.inference.sources import write_image
from mona_mm.report.pictures import class_colour, draw_box, draw_labels, draw_outlines, outlines_of, palette, titled

_TOP = 5  # the classes of an image that are written


class Writer(ABC):
    """Write the predictions of one kind of model into a folder.

    Args:
        folder: the folder.
        classes: the names of the classes.
        score: the least score of what is drawn and written.
        pictures: whether to draw pictures.
    """

    field: str
    """What a sample of the model must have."""

    def __init__(self, folder: Path, classes: Sequence[str], score: float, pictures: bool = True) -> None:
        self.folder = folder
        self.classes = list(classes)
        self.score = score
        self.pictures = pictures

    def add(self, item: Predicted) -> None:
        """Take a prediction.

        Raises:
            UserError: if it is not what this writer writes (a panoptic segmentation, for one).
        """
        if self.field not in item.sample:
            raise UserError(f'The model predicts no {self.field}, but {", ".join(item.sample.keys())}.')
        self.take(item)
        if self.pictures:
            image = item.image()
            write_image(self.folder / 'pictures' / f'{item.name}.jpg', self.draw(image, item))

    def name_of(self, index: int) -> str:
        """The name of a class; its number if it has no name."""
        return self.classes[index] if index < len(self.classes) else str(index)

    @abstractmethod
    def take(self, item: Predicted) -> None:
        """Take what is to be written of a prediction."""

    @abstractmethod
    def draw(self, image: np.ndarray, item: Predicted) -> np.ndarray:
        """The image with the prediction over it."""

    @abstractmethod
    def finish(self) -> str:
        """Write what is written at the end; return what was found, in words."""


class DetectionWriter(Writer):
    """``predictions.json``: images, categories and annotations of COCO's format, with a ``score`` each.

    It is a data set as it is. The ids of categories are the numbers of the classes from 1 on.
    """

    field = 'pred_instances'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def _kept(self, item: Predicted) -> Any:
        found = item.sample.pred_instances
        return found[found.scores >= self.score].cpu()

    def take(self, item: Predicted) -> None:
        height, width = item.sample.ori_shape[:2]
        name = f'{item.name}.jpg' if item.frame is not None else item.path
        image = dict(id=len(self._images) + 1, file_name=name, width=int(width), height=int(height))
        self._images.append(image)
        found = self._kept(item)
        for i in range(len(found)):
            x1, y1, x2, y2 = found.bboxes[i].tolist()
            entry = dict(
                id=len(self._annotations) + 1,
                image_id=image['id'],
                category_id=int(found.labels[i]) + 1,
                bbox=[round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                area=round((x2 - x1) * (y2 - y1), 2),
                iscrowd=0,
                score=round(float(found.scores[i]), 5),
            )
            if 'masks' in found:
                code = coco_mask.encode(np.asfortranarray(np.asarray(found.masks[i]).astype(np.uint8)))
                entry['segmentation'] = dict(size=code['size'], counts=code['counts'].decode())
                entry['area'] = float(coco_mask.area(code))
            self._annotations.append(entry)

    def draw(self, image: np.ndarray, item: Predicted) -> np.ndarray:
        found = self._kept(item)
        for i in range(len(found)):
            label = int(found.labels[i])
            if 'masks' in found:
                draw_outlines(image, outlines_of(np.asarray(found.masks[i])), class_colour(label))
            text = f'{self.name_of(label)} {float(found.scores[i]):.2f}'
            draw_box(image, found.bboxes[i].tolist(), class_colour(label), text, scale=max(image.shape[:2]) / 600)
        return image

    def finish(self) -> str:
        highest = max((a['category_id'] for a in self._annotations), default=0)
        categories = [dict(id=i + 1, name=self.name_of(i)) for i in range(max(len(self.classes), highest))]
        content = dict(images=self._images, categories=categories, annotations=self._annotations)
        AtomicLocalBackend().put_text(json.dumps(content), self.folder / 'predictions.json')
        return (
            f'{len(self._annotations)} objects of a score of at least {self.score}: {self.folder / "predictions.json"}'
        )


class SegmentationWriter(Writer):
    """``masks/NAME.png`` with the number of the class in each pixel, and ``classes.txt`` with their names.

    A pixel whose class has a probability below the least score is 255 (65535 beyond 255 classes).
    """

    field = 'pred_sem_seg'

    def _labels(self, item: Predicted) -> np.ndarray:
        labels = item.sample.pred_sem_seg.data[0].cpu().numpy()
        labels = labels.astype(np.uint8 if len(self.classes) < 255 else np.uint16)
        if self.score > 0 and 'seg_logits' in item.sample:
            logits = item.sample.seg_logits.data.float()
            sure = logits.softmax(0).max(0).values if len(logits) > 1 else (logits.sigmoid() - 0.5).abs()[0] + 0.5
            labels[(sure < self.score).cpu().numpy()] = np.iinfo(labels.dtype).max
        return labels

    def take(self, item: Predicted) -> None:
        write_image(self.folder / 'masks' / f'{item.name}.png', self._labels(item))

    def draw(self, image: np.ndarray, item: Predicted) -> np.ndarray:
        labels = self._labels(item)
        return draw_labels(image, labels, palette(max(len(self.classes), 1)))

    def finish(self) -> str:
        lines = ''.join(f'{index} {name}\n' for index, name in enumerate(self.classes))
        AtomicLocalBackend().put_text(lines, self.folder / 'classes.txt')
        return f'label maps: {self.folder / "masks"}, the names of their numbers: {self.folder / "classes.txt"}'


class ClassificationWriter(Writer):
    """``predictions.csv``: the best class of each image with its score, and the best five.

    Of an image that may have several classes, those of at least the least score, 0.5 if none is given.
    """

    field = 'pred_score'

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._rows: list[list[str]] = []

    def _best(self, item: Predicted) -> list[tuple[str, float]]:
        scores = item.sample.pred_score.float().cpu().numpy()
        order = np.argsort(-scores, kind='stable')[:_TOP]
        return [(self.name_of(int(i)), float(scores[i])) for i in order]

    def take(self, item: Predicted) -> None:
        best = self._best(item)
        label = item.sample.get('pred_label')
        if label is not None and label.numel() == 1:
            found = best[0][0] if best[0][1] >= self.score else ''
        else:
            found = ' '.join(name for name, score in best if score >= (self.score or 0.5))
        name = item.path if item.frame is None else f'{item.name}.jpg'
        self._rows.append([name, found, f'{best[0][1]:.4f}', '; '.join(f'{n} {s:.4f}' for n, s in best)])

    def draw(self, image: np.ndarray, item: Predicted) -> np.ndarray:
        if image.shape[1] < 200:
            image = cv2.resize(image, None, fx=200 / image.shape[1], fy=200 / image.shape[1])
        name, score = self._best(item)[0]
        return titled(image, f'{name} {score:.2f}')

    def finish(self) -> str:
        file = self.folder / 'predictions.csv'
        self.folder.mkdir(parents=True, exist_ok=True)
        with file.open('w', encoding='utf-8', newline='') as out:
            writer = csv.writer(out, lineterminator='\n')
            writer.writerow(['image', 'class', 'score', 'best'])
            writer.writerows(sorted(self._rows))
        return f'classes: {file}'


WRITERS = dict(mmdet=DetectionWriter, mmseg=SegmentationWriter, mmpretrain=ClassificationWriter)
"""The writer by the library of the model."""
