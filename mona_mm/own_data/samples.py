"""What every layout of a folder is read into."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mona_mm.own_data.findings import Findings

SPLITS = ('train', 'val', 'test')


@dataclass
class Instance:
    """One object of an image.

    Args:
        label: the number of its class.
        box: x, y, width and height, in pixels.
        mask: polygons, or a run-length code of COCO's; None if only the box is known.
        area: the number of its pixels; None if it is to be computed.
        ignored: whether it is neither right nor wrong to find it (COCO's crowds, VOC's difficult objects).
    """

    label: int
    box: tuple[float, float, float, float]
    mask: Any = None
    area: float | None = None
    ignored: bool = False


@dataclass
class Sample:
    """One image and what is known about it.

    Args:
        image: the file.
        width, height: its size in pixels, in which the annotations are.
        instances: its objects, for detectors.
        label_map: the file of its label map, for segmentors.
        present: the classes that occur in its label map.
        label: the number of its class, for classifiers.
    """

    image: Path
    width: int = 0
    height: int = 0
    instances: list[Instance] = field(default_factory=list)
    label_map: Path | None = None
    present: tuple[int, ...] = ()
    label: int | None = None


@dataclass
class OwnData:
    """A folder, read.

    Args:
        layout: the layout in words.
        classes: the names of the classes, by number.
        splits: the samples of ``train``, ``val``, ``test``, or all under ``''`` where the folder has no splits.
        findings: what was found on the way.
        notes: what the report says about the reading, one line each.
        keep_orientation: whether annotations are in the frame of the stored pixels, so that the rotation of the EXIF
            data must not be applied.
        values: for label maps, the class of every value (of every colour, as 0xRRGGBB); None if the maps hold classes.
        coloured: whether the values of label maps are colours.
        palette: for label maps, the colour of every class; None if unknown.
        threshold: for soft binary masks, from which value on a pixel is an object.
    """

    layout: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    findings: Findings = field(default_factory=Findings)
    notes: list[str] = field(default_factory=list)
    keep_orientation: bool = False
    values: dict[int, int] | None = None
    coloured: bool = False
    palette: list[tuple[int, int, int]] | None = None
    threshold: int | None = None

    @property
    def has_masks(self) -> bool:
        """Whether there are objects and most of them have a mask."""
        instances = [i for samples in self.splits.values() for sample in samples for i in sample.instances]
        return bool(instances) and sum(i.mask is not None for i in instances) > 0.5 * len(instances)
