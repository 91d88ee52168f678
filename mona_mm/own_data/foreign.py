"""Formats of annotations that are not read, told apart so that an error can name them and say what to export."""

from pathlib import Path

from mona_mm.errors import ConfigError
from mona_mm.own_data.images import OTHER_SUFFIXES
from mona_mm.own_data.layout import Folder
from mona_mm.own_data.text import read_json, says

ARCHIVES = frozenset(('.zip', '.tar', '.gz', '.tgz', '.7z', '.rar', '.bz2', '.xz'))
"""The suffixes of archives, in lower case."""

_EXPORT = 'export COCO, Pascal VOC or YOLO instead'
_ENDS = {
    **dict.fromkeys(ARCHIVES, 'is an archive: unpack it'),
    **dict.fromkeys(OTHER_SUFFIXES, 'is an image of a kind that OpenCV does not read: convert it to JPEG or PNG'),
    '.createml.json': f'is in the format of CreateML: {_EXPORT}',
    '_annotations.txt': f'has the boxes of all images in one file: {_EXPORT}',
    **dict.fromkeys(('.csv', '.tsv', '.xlsx'), f'is a table: {_EXPORT}, or a folder per class'),
    **dict.fromkeys(
        ('.tfrecord', '.record', '.parquet', '.jsonl', '.ndjson', '.h5', '.mat', '.pkl'), f'is not read: {_EXPORT}'
    ),
    **dict.fromkeys(('.npy', '.npz'), 'is an array of NumPy: save label maps as PNG'),
}
"""What is said of files by the ends of their names."""

_WORDS = [
    ('.xml', ('<annotations',), f"is CVAT's own xml: {_EXPORT}"),
    ('.json', ('"_via_',), f"is the VGG annotator's json: {_EXPORT}"),
    ('.json', ('"filename"', '"regions"'), f"is the VGG annotator's json: {_EXPORT}"),
    ('.json', ('"annotations"', '"data"'), f"is Label Studio's own json: {_EXPORT}"),
    ('.json', ('"annotations"', '"categories"'), 'looks like COCO, but has no list "images"'),
    ('.json', ('"image_id"', '"category_id"'), 'looks like a part of COCO, but has no lists "images" and "categories"'),
]
"""What is said of files by their suffix and the words in them."""


def other_format(folder: Folder) -> str:
    """A sentence about the first file of a format that is known but not read, with a space before it; else empty."""
    for path in folder.files:
        said = _said(path)
        if said:
            return f' {folder.show(path)} {said}.'
    return ''


def _said(path: Path) -> str:
    name = path.name.lower()
    for end, text in _ENDS.items():
        if name.endswith(end):
            return text
    for suffix, words, text in _WORDS:
        if name.endswith(suffix) and path.is_file() and says(path.read_bytes(), *words):
            return text
    if name.endswith('.json') and path.is_file():
        try:
            read_json(path)
        except ConfigError:
            return 'does not parse as JSON: it may be empty, cut short or of another kind'
    return ''
