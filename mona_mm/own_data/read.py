"""Recognise the layout of a folder and read it."""

from pathlib import Path
from typing import Any

from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.own_data.coco import Coco
from mona_mm.own_data.folders import ClassFolders
from mona_mm.own_data.foreign import ARCHIVES, other_format
from mona_mm.own_data.images import OTHER_SUFFIXES, is_image, walk
from mona_mm.own_data.labelme import LabelMe
from mona_mm.own_data.layout import Folder, Layout
from mona_mm.own_data.masks import Masks
from mona_mm.own_data.samples import OwnData
from mona_mm.own_data.voc import Voc
from mona_mm.own_data.yolo import Yolo

TASKS = dict(boxes='a detector', maps='a segmentor', labels='a classifier')
"""The kinds of models, by what they need."""

_LAYOUTS: dict[str, tuple[Layout, ...]] = dict(
    boxes=(Coco(), Voc(), Yolo(), LabelMe()),
    maps=(Masks(), Coco(), Yolo(), LabelMe()),
    labels=(ClassFolders(),),
)
_ALL = {layout.name: layout for layouts in _LAYOUTS.values() for layout in layouts}
LAYOUTS = tuple(_ALL)
"""The names of all layouts."""


def read_folder(
    root: str, task: str, layout: str | None = None, skip: bool = False, extracted: Path | None = None
) -> OwnData:
    """Read the data in a folder.

    Args:
        root: the folder.
        task: what is needed, a key of :data:`TASKS`.
        layout: the layout, one of :data:`LAYOUTS`; by default it is recognised.
        skip: whether images that are missing or cannot be read are left out.
        extracted: where images that are inside annotation files are written; without it they are missing.

    Raises:
        MissingFileError: if there is no such folder.
        ConfigError: if no layout is recognised, or it has not what is needed, or the data have faults that forbid
            training; one line for each.
    """
    folder = _opened(root, skip_unreadable=skip, extracted=extracted)
    if not folder.files:
        raise MissingFileError(f'--data {root}: the folder is empty.')
    lost = [file for file in folder.files if not is_image(file.name) and not file.exists()]
    if lost:
        folder.findings.error('links lead to no file', folder.show(lost[0]), 'mend or remove them', len(lost))
        folder.findings.raise_errors()
    chosen, others = _choose(folder, root, task, layout)
    data = chosen.read(folder)
    unread = [file for file in folder.files if file.suffix.lower() in OTHER_SUFFIXES]
    if unread:
        text = 'images are of kinds that OpenCV does not read'
        folder.findings.warn(text, folder.show(unread[0]), 'not used: convert them to JPEG or PNG', len(unread))
    if others:
        names = ', '.join(other.title for other in others)
        data.notes.append(f'also there: {names}; to read it, say --data-options layout={others[0].name}')
    data.findings.raise_errors()
    _check(data, root, task)
    return data


def task_of_folder(root: str, layout: str | None = None) -> str:
    """What kind of model the data in a folder are for, a key of :data:`TASKS`, by their layout.

    Args:
        root: the folder.
        layout: the layout, one of :data:`LAYOUTS`; by default it is recognised.

    Raises:
        MissingFileError: if there is no such folder.
        ConfigError: if no layout is recognised.
    """
    folder = _opened(root)
    for task, layouts in _LAYOUTS.items():
        if any(each.name == layout if layout else each.recognise(folder) for each in layouts):
            return task
    raise ConfigError(f'--data {root}: no layout is recognised; see docs/own_data.md.{other_format(folder)}')


def _opened(root: str, **options: Any) -> Folder:
    """List the files of a folder.

    Raises:
        MissingFileError: if there is no such folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        kind = 'is a file, not a folder' if path.exists() else 'does not exist'
        unpack = 'Unpack it, and name' if path.suffix.lower() in ARCHIVES else 'Name'
        raise MissingFileError(f'--data {root}: it {kind}. {unpack} the folder that holds images and annotations.')
    return Folder(path.resolve(), list(walk(path.resolve())), **options)


def _choose(folder: Folder, root: str, task: str, layout: str | None) -> tuple[Layout, list[Layout]]:
    if layout is not None:
        if str(layout) not in _ALL:
            raise ConfigError(f'--data-options layout={layout}: the layouts are {", ".join(LAYOUTS)}.')
        found = [_ALL[layout]]
    else:
        found = [each for each in _LAYOUTS[task] if each.recognise(folder)]
    fitting = [each for each in found if task in each.tasks]
    if fitting:
        return fitting[0], fitting[1:]
    other = found or [each for each in _ALL.values() if each.recognise(folder)]
    accepted = ', '.join(each.title for each in _LAYOUTS[task])
    if other:
        raise ConfigError(
            f'--data {root} has the layout {other[0].title}, but this config is {TASKS[task]}, which needs {accepted}.'
        )
    count = len(folder.images.paths)
    raise ConfigError(
        f'--data {root}: no layout is recognised ({count} images, {len(folder.files) - count} other files). For '
        f'{TASKS[task]} it may be {accepted}; see docs/own_data.md.{other_format(folder)}'
    )


def _check(data: OwnData, root: str, task: str) -> None:
    samples = [sample for samples in data.splits.values() for sample in samples]
    alike: dict[str, str] = {}
    for name in data.classes:
        if alike.setdefault(name.lower(), name) != name:
            what = f'{alike[name.lower()]}, {name}'
            data.findings.warn('names of classes differ in upper and lower case alone', what, 'kept as two classes')
    if not data.classes and not samples:
        raise ConfigError(f'--data {root}: there is no {data.layout} in it.')
    if not data.classes:
        raise ConfigError(f'--data {root}: no class is named in its annotations.')
    if len(samples) < 2:
        raise ConfigError(f'--data {root}: {len(samples)} images can be used; training and evaluation need two.')
    training = data.splits.get('train') or samples
    if task == 'boxes' and not any(sample.instances for sample in training):
        found = '; '.join(finding.line() for finding in data.findings.warnings.values())
        raise ConfigError(f'--data {root}: the training images have no object{f" ({found})" if found else ""}.')
    if task == 'maps' and samples[0].label_map is None and not data.has_masks:
        raise ConfigError(
            f'--data {root}: its {data.layout} has boxes, but this config is a segmentor, which needs masks or '
            'polygons.'
        )
