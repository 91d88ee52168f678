"""Read a data set of a config as its library does, and say in one line what the library could not read."""

import contextlib
import io
import os.path as osp
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS

from mona_mm.config.nodes import dicts_of
from mona_mm.errors import ConfigError, MissingFileError, UserError
from mona_mm.own_data import Findings
from mona_mm.own_data.coco import check_structure
from mona_mm.own_data.text import read_json
from mona_mm.type_names import look_up, type_name

_NEEDED = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
"""The keys without which the libraries cannot read an entry of a COCO file."""


@dataclass
class Reading:
    """What a library has read.

    Args:
        config: the data set as it stands in the config.
        dataset: the library's data set, without its pipeline; None if its class is not one of the libraries'.
        kind: which of the known classes it is or derives from: ``'CocoDataset'``, ``'XMLDataset'``,
            ``'BaseSegDataset'``, ``'CustomDataset'``, ``'FGVCJson'`` or ``''``.
        samples: all entries that the library has read.
        kept: those that its filters and ``indices`` leave.
        raw: the content of a COCO file.
        names: the names of all objects in VOC's files, with their numbers.
    """

    config: dict
    dataset: Any = None
    kind: str = ''
    samples: list[dict] = field(default_factory=list)
    kept: list[dict] = field(default_factory=list)
    raw: dict | None = None
    names: Counter = field(default_factory=Counter)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, if the library knows them."""
        classes = self.dataset.metainfo.get('classes') if self.dataset is not None else None
        return tuple(classes) if isinstance(classes, list | tuple) else None

    @property
    def ann_file(self) -> str:
        """The path of the annotation file, or ``''``."""
        return getattr(self.dataset, 'ann_file', '') or ''

    @property
    def is_local(self) -> bool:
        """Whether its files are where their paths say, and not behind a backend that maps them."""
        backends = [dict.get(part, 'backend_args') for part in dicts_of(self.config)]
        roots = [getattr(self.dataset, 'data_root', '') or '', self.ann_file]
        remote = any('://' in str(root) for root in roots)
        return not remote and all((backend or {}).get('backend', 'local') == 'local' for backend in backends)

    @property
    def with_mask(self) -> bool:
        """Whether its pipeline loads the masks of objects."""
        return any(part.get('with_mask') for part in dicts_of(self.config.get('pipeline') or []))


_KINDS = ('CocoDataset', 'XMLDataset', 'BaseSegDataset', 'CustomDataset', 'FGVCJson')


def read_dataset(config: dict) -> Reading:
    """Read a data set of a config by the library's own class, in the scope that has been entered.

    Raises:
        UserError: if the library cannot read it; the message names the file, and the entry where it is known.
    """
    reading = Reading(config)
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = look_up(registry, dict.get(config, 'type'))
        if not (isinstance(cls, type) and issubclass(cls, BaseDataset)):
            return reading
        reading.kind = next((base.__name__ for base in cls.__mro__ if base.__name__ in _KINDS), '')
        try:
            reading.dataset = registry.build({**config, 'pipeline': [], 'lazy_init': True})
        except UserError:
            raise
        except Exception as error:  # whatever a library's class raises about its options
            raise ConfigError(_cannot(config, error)) from None
    last: dict[str, Any] = {}
    _listen(reading, last)
    dataset = reading.dataset
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # COCO's own tools print what they do
            reading.samples = dataset.load_data_list()
        dataset.data_list = reading.samples
        dataset.data_list = dataset.filter_data()
        if getattr(dataset, '_indices', None) is not None:
            dataset.data_list = dataset._get_unserialized_subset(dataset._indices)
        reading.kept = dataset.data_list
    except UserError:
        raise
    except Exception as error:  # a library's reading raises whatever its parts raise
        _explain(reading, last, error)
        raise ConfigError(_cannot(config, error, last)) from None
    return reading


def _cannot(config: dict, error: Exception, last: dict | None = None) -> str:
    what = osp.join(config.get('data_root') or '', config.get('ann_file') or '') or 'its data'
    entry = f', at {_entry(last)}' if last else ''
    text = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    return f'{type_name(dict.get(config, "type"))} cannot read {what}{entry}: {text}'


def _entry(last: dict) -> str:
    info = last.get('info') or {}
    info = info.get('raw_img_info', info) if isinstance(info, dict) else {}
    return str(info.get('xml_path') or info.get('file_name') or info.get('img_id') or 'an entry')


def _listen(reading: Reading, last: dict[str, Any]) -> None:
    """Keep what passes through the library's reading: the entry that is parsed, a COCO file's content, VOC's names."""
    dataset = reading.dataset

    def noting(function: Callable) -> Callable:
        def parse(info: Any, *args: Any, **options: Any) -> Any:
            last['info'] = info
            return function(info, *args, **options)

        return parse

    if hasattr(dataset, 'parse_data_info'):
        dataset.parse_data_info = noting(dataset.parse_data_info)
    if reading.kind == 'CocoDataset' and hasattr(dataset, 'COCOAPI'):
        api = dataset.COCOAPI

        def read(path: str) -> Any:
            coco = api(path)
            reading.raw = coco.dataset
            return coco

        dataset.COCOAPI = read
    if reading.kind == 'XMLDataset' and hasattr(dataset, '_parse_instance_info'):
        parse_instances = dataset._parse_instance_info

        def instances(tree: Any, *args: Any, **options: Any) -> Any:
            reading.names.update(str(thing.findtext('name')) for thing in tree.iter('object'))
            return parse_instances(tree, *args, **options)

        dataset._parse_instance_info = instances


def _explain(reading: Reading, last: dict[str, Any], error: Exception) -> None:
    """Raise a better error than the library's, where its cause is known."""
    file = reading.ann_file
    if reading.kind == 'CocoDataset' and osp.isfile(file):
        findings = Findings()
        check_structure(read_json(file), file, _NEEDED, findings)
        for finding in findings.errors.values():
            finding.fix = finding.fix or 'mend the file, or let --data FOLDER read it, which completes what it can'
        findings.raise_errors()
    if reading.kind == 'XMLDataset':
        path = (last.get('info') or {}).get('xml_path', '')
        if isinstance(error, FileNotFoundError) and path:
            raise MissingFileError(f'{file} lists {osp.splitext(osp.basename(path))[0]}, but there is no {path}.')
        if path:
            raise ConfigError(f'{path} is no xml file that can be read: {error}') from None
    if reading.kind == 'CustomDataset' and osp.isfile(file):
        _check_lines(reading, file)
    if isinstance(error, FileNotFoundError):
        raise MissingFileError(
            f'{type_name(dict.get(reading.config, "type"))}: there is no {error.filename}.'
        ) from None


def _check_lines(reading: Reading, file: str) -> None:
    for number, line in enumerate(list_from_file(file), start=1):
        path, _, label = line.strip().rpartition(' ')
        if not (path and label.isdecimal()):
            raise ConfigError(f'{file}, line {number}: {line!r} must be a path and a label, 0, 1, 2, ...')
