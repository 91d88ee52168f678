"""The report of what the data of a config hold: a few lines for the terminal, all of it for a file, and a picture."""

import os.path as osp
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError
from mona_mm.own_data import Findings, short
from mona_mm.report.html import chart_text, save_png

_MOST_LINES = 15
_MOST_SIZES = 20_000


@dataclass
class SplitReport:
    """What one split holds.

    Args:
        name: the split.
        read, kept: the number of images that the library has read, and that its filters leave.
        empty: of those kept, the number without an object.
        objects: the number of objects, or for a classifier of images, of each class; ignored ones not counted.
        images: the number of images in which each class occurs.
        present: for label maps, the number of maps, among those looked at, in which each class occurs.
        looked_at: the number of label maps looked at.
        paths: the image files.
        sizes, boxes: width and height of images and of boxes, in pixels, of some.
    """

    name: str
    read: int = 0
    kept: int = 0
    empty: int = 0
    objects: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    present: Counter = field(default_factory=Counter)
    looked_at: int = 0
    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    boxes: list[tuple[float, float]] = field(default_factory=list)
    has_objects: bool = False

    def add(self, reading: Any) -> None:
        """Add what a library has read, a :class:`mona_mm.data_check.reading.Reading`."""
        self.read += len(reading.samples)
        self.kept += len(reading.kept)
        for sample in reading.kept:
            self.paths.append(sample.get('img_path') if reading.is_local else None)
            if 'width' in sample and len(self.sizes) < _MOST_SIZES:
                self.sizes.append((sample['width'], sample['height']))
            label = sample.get('gt_label')
            labels = [] if label is None else label if isinstance(label, list | tuple) else [label]
            if 'instances' in sample:
                self.has_objects = True
                found = [instance for instance in sample['instances'] if not instance.get('ignore_flag')]
                labels = [instance['bbox_label'] for instance in found if 'bbox_label' in instance]
                self.empty += not labels
                for instance in found[: max(0, _MOST_SIZES - len(self.boxes))]:
                    x1, y1, x2, y2 = instance.get('bbox', (0, 0, 0, 0))
                    self.boxes.append((x2 - x1, y2 - y1))
            self.objects.update(int(label) for label in labels)
            self.images.update({int(label) for label in labels})

    def count(self, label: int) -> str:
        """What the table says about a class."""
        if self.looked_at:
            return f'{self.present[label]}'
        return f'{self.objects[label]}' + (f' ({self.images[label]})' if self.has_objects else '')


@dataclass
class DataReport:
    """What the data of a config hold.

    Args:
        classes: the names of the classes.
        splits: the splits that were read.
        findings: faults that were found in what the library has read.
        notes: what reading a folder has decided, one line each.
        earlier: the warnings of reading a folder, one line each.
    """

    classes: tuple[str, ...] | None = None
    splits: dict[str, SplitReport] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    notes: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)

    def add(self, split: SplitReport) -> None:
        """Add a split, unless nothing was read for it."""
        if split.read:
            self.splits[split.name] = split

    def splits_of_images(self) -> dict[str, set[str]]:
        """The splits that each image file is in; SPT measures sensitivity on training images, which is no fault."""
        result: dict[str, set[str]] = {}
        for name, split in self.splits.items():
            for path in split.paths:
                if path and name != 'sensitivity':
                    result.setdefault(path, set()).add(name)
        return result

    def judge(self) -> None:
        """Warn of classes without samples, of imbalance and of dropped images.

        Raises:
            ConfigError: if there is nothing to learn from.
        """
        for split in self.splits.values():
            if split.name in ('val', 'test') and split.has_objects and not split.objects:
                self.findings.warn(f'the {split.name} data have no object', '', 'their score says nothing', 0)
        train = self.splits.get('train')
        if train is None or self.classes is None:
            return
        counts = train.present if train.looked_at else train.objects
        if train.has_objects and not counts:
            raise ConfigError(
                f'The train data: {train.kept} images have no object of the classes {short(self.classes)}.'
            )
        if train.has_objects or counts:
            self._judge_classes(train, counts)
        for split in self.splits.values():
            if split.read > split.kept:
                reason = 'filter_cfg and indices' if split.name == 'train' else 'indices'
                self.findings.warn(
                    f'of {split.read} {split.name} images are left out by {reason}', '', '', split.read - split.kept
                )

    def _judge_classes(self, train: SplitReport, counts: Counter) -> None:
        what = f'in the {train.looked_at} label maps looked at' if train.looked_at else 'in the training data'
        none = [name for label, name in enumerate(self.classes) if not counts[label]]
        if none:
            self.findings.warn(f'of {len(self.classes)} classes do not occur {what}', short(none, 3), '', len(none))
        some = {label: count for label, count in counts.items() if count and label < len(self.classes)}
        if some and not train.looked_at:
            most, least = max(some, key=some.get), min(some, key=some.get)
            if some[most] >= 50 * some[least]:
                names = f'{self.classes[most]}: {some[most]}, {self.classes[least]}: {some[least]}'
                self.findings.warn('the classes are far from balanced', names, '', 0)

    def warning_lines(self) -> list[str]:
        """All warnings, one line each."""
        new = self.findings.warning_lines()
        known = {line.partition(' (')[0].partition(' ')[2] for line in self.earlier}
        new = [line for line in new if line.removeprefix('warning: ').partition(' (')[0].partition(' ')[2] not in known]
        return [f'warning: {line}' for line in self.earlier] + new

    def table(self, most: int | None = None) -> list[str]:
        """Images and objects by class and split, at most ``most`` classes, the most frequent first."""
        splits = list(self.splits.values())
        if not splits:
            return []
        maps = any(split.looked_at for split in splits)
        objects = any(split.has_objects for split in splits)
        head = 'class: label maps with it' if maps else 'class: objects (images)' if objects else 'class: images'
        rows = [[head, *(split.name for split in splits)]]
        rows.append(['images', *(f'{split.kept}' for split in splits)])
        if any(split.empty for split in splits):
            rows.append(['images without object', *(f'{split.empty}' for split in splits)])
        labels = range(len(self.classes or ()))
        if most is not None and len(labels) > most:
            total = Counter()
            for split in splits:
                total.update(split.present if maps else split.objects)
            labels = sorted(labels, key=lambda label: -total[label])[: most - 1]
        rows += [[str(self.classes[label])[:30], *(split.count(label) for split in splits)] for label in labels]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            '  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        left = len(self.classes or ()) - len(labels)
        return lines + ([f'... and {left} more classes'] if left else [])

    def lines(self, file: str | None = None) -> list[str]:
        """The report in at most 15 lines; ``file`` is where all of it is."""
        warnings, notes = self.warning_lines(), list(self.notes)
        room = _MOST_LINES - 4 - min(len(warnings), 5) - min(len(notes), 3)
        lines = self.table(max(3, room)) + notes[:3] + warnings[:5]
        left = len(warnings[5:]) + len(notes[3:])
        if file:
            lines.append(f'Data report{f" with {left} more lines" if left else ""}: {file}')
        return lines

    def text(self) -> str:
        """All of the report."""
        return '\n'.join([*self.table(), *self.notes, *self.warning_lines()]) + '\n'

    def write(self, folder: str) -> str:
        """Write ``data_report.txt`` and ``labels.png`` into a folder; return the path of the text."""
        file = osp.join(folder, 'data_report.txt')
        AtomicLocalBackend().put_text(self.text(), file)
        self.plot(osp.join(folder, 'labels.png'))
        return file

    def plot(self, file: str) -> None:
        """Draw the frequency of the classes, the sizes of images, and the sizes of objects in them."""
        splits = list(self.splits.values())
        names = [chart_text(str(name), 20) for name in self.classes or ()][:60]
        has_boxes, has_sizes = any(s.boxes for s in splits), any(s.sizes for s in splits)
        panels = 1 + has_boxes + has_sizes
        figure = Figure(figsize=(5.5 * panels, max(3.5, 0.2 * len(names) + 1.2)), layout='constrained')
        axes = list(np.atleast_1d(figure.subplots(1, panels)))
        axis, places = axes.pop(0), np.arange(len(names))
        for i, split in enumerate(splits):
            counts = split.present if split.looked_at else split.objects
            height = 0.8 / len(splits)
            axis.barh(places + i * height, [counts[k] for k in range(len(names))], height, label=split.name)
        axis.set_yticks(places + 0.4 - 0.4 / max(1, len(splits)), names)
        axis.invert_yaxis()
        axis.set_title('label maps with the class' if any(s.looked_at for s in splits) else 'samples of each class')
        axis.legend()
        for show, attribute, title in ((has_sizes, 'sizes', 'images'), (has_boxes, 'boxes', 'boxes of objects')):
            if show:
                axis = axes.pop(0)
                for split in splits:
                    points = np.array(getattr(split, attribute) or np.zeros((0, 2)), float)
                    axis.scatter(points[:, 0], points[:, 1], s=6, alpha=0.4, label=split.name)
                axis.set(title=f'size of {title}', xlabel='width in pixels', ylabel='height in pixels')
        save_png(figure, file, dpi=100)
