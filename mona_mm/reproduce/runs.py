"""Find runs in folders and files, and read each one into a :class:`Run`."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mona_mm.checkpoint.config_text import parse_config
from mona_mm.config.build import build_on_meta
from mona_mm.errors import ConfigError, MissingFileError, UserError
from mona_mm.frozen.count import count_trainable
from mona_mm.reproduce.cells import (
    METHODS,
    differences,
    is_mmengine,
    knows_batch_size,
    method_of,
    model_config,
    parse_cell,
    shipped_config,
    size_of,
    task_of,
)
from mona_mm.reproduce.logs import Log, planned, read_log
from mona_mm.reproduce.published import published_trainable
from mona_mm.reproduce.tasks import TASKS

_FORMAT = 'mona_mm results'
_VERSION = 1
_TIMESTAMP = re.compile(r'\d{8}_\d{6}')
_LOG_FILES = ('.log', '.txt', '.log.json')


@dataclass
class Run:
    """A training run. Scores are in percent; a step is an epoch if ``unit`` is ``'epochs'``, else an iteration."""

    path: str
    config: str
    """The basename of the shipped config of the run's cell."""
    method: str
    task: str
    unit: str
    planned: int | None = None
    trained: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    tested: dict[str, float] = field(default_factory=dict)
    trainable: int | None = None
    changed: list[str] = field(default_factory=list)
    """The differences between the run and the published setting."""
    notes: list[str] = field(default_factory=list)
    """Remarks on values that the log does not hold, and how they were obtained instead."""

    @property
    def last(self) -> tuple[int | None, dict[str, float]]:
        """The step and scores of the last evaluation; for a run that was only tested, None and the test scores."""
        if not self.evaluations:
            return None, self.tested
        step = max(self.evaluations)
        return step, self.evaluations[step]

    @property
    def best(self) -> tuple[int | None, dict[str, float]]:
        """The step and scores of the best checkpoint by the task's first metric, the first of equals."""
        metric = next(iter(TASKS[self.task].metrics))
        steps = [step for step in sorted(self.evaluations) if metric in self.evaluations[step]]
        if not steps:
            return None, {}
        step = max(steps, key=lambda step: (self.evaluations[step][metric], -step))
        return step, self.evaluations[step]

    @property
    def status(self) -> str:
        """The state of the run: ``'done'``, ``'tested'``, or the number of trained steps with their unit."""
        if self.tested and not self.evaluations and not self.trained:
            return 'tested'
        if self.planned is None:
            return f'{self.trained} {self.unit}, of how many the log does not say'
        if self.trained >= self.planned and self.last[0] is not None and self.last[0] >= self.planned:
            return 'done'
        return f'{self.trained}/{self.planned} {self.unit}'


def collect(
    paths: Iterable[str | Path], cell: str | None = None, count: bool = True
) -> tuple[list[Run], list[UserError]]:
    """Read every run under ``paths``.

    Args:
        paths: work dirs, folders of work dirs, and log files, of mmengine (``scalars.json``, text) or of mmcv 1.x
            (text, ``.log.json``). The timestamped parts of a resumed run count as one run.
        cell: the cell, as ``METHOD/TASK``, of the runs whose logs do not show it.
        count: whether to count the parameters that train by building the model without weights, if the log does not
            hold their number.

    Returns:
        The runs, and one error for each log whose cell is not clear, which the caller may show or raise.

    Raises:
        MissingFileError: if a path does not exist.
        ConfigError: if a path holds no run at all, or ``cell`` does not exist or contradicts a log.
    """
    asked = parse_cell(cell) if cell else None
    runs: list[Run] = []
    unclear: list[UserError] = []
    seen: set[Path] = set()
    for given in paths:
        given = Path(given)
        if not given.exists():
            raise MissingFileError(f'There is no {given}.')
        found = 0
        for path, parts in _find(given):
            log = _read(parts)
            if log.is_empty:
                continue
            found += 1
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(_recognise(path, log, asked, count))
            except _Unclear as error:
                unclear.append(error)
        if not found:
            raise ConfigError(
                f'{given} holds no training log: no mmengine work dir (<timestamp>/vis_data/scalars.json, '
                '<timestamp>/<timestamp>.log) and no text or .log.json log of mmdet, mmseg or mmcls with losses or '
                'scores in it.'
            )
    return runs, unclear


class _Unclear(ConfigError):
    """The error for a log that does not show which cell it belongs to."""


def _recognise(path: Path, log: Log, asked: tuple[str, str] | None, count: bool) -> Run:
    config = log.config or {}
    task = task_of(config)
    size = size_of(config)
    method = None
    if task is not None:
        known = {name: published_trainable(name, task, size) for name in METHODS} if size else {}
        method = method_of(config, log, {name: number for name, number in known.items() if number is not None})
    if method is None or task is None:
        if asked is None or (task is not None and task != asked[1]):
            raise _Unclear(_what_is_missing(path, log, method, task, asked))
        method, task = asked
        notes = [f'--as {method}/{task}: its log does not tell']
    elif asked is not None and (method, task) != asked:
        raise ConfigError(f'--as {"/".join(asked)}: {path} is {method}/{task}, as its config says.')
    else:
        notes = []
    name, shipped = shipped_config(config, log, method, task)
    changed = []
    if not config:
        notes.append('no config in the log: its settings were not compared')
    elif shipped is None:
        notes.append(f'no shipped config of {method} on {task} to compare with')
    else:
        changed = differences(config, shipped, log.gpus)
        if not knows_batch_size(config, log.gpus):
            notes.append('the number of GPUs is not in the log: the batch size was not compared')
        number = published_trainable(method, task, size)
        if not is_mmengine(config) and size and log.trainable not in (None, number) and number is not None:
            changed.append(f'trained parameters: {log.trainable} (published: {number})')
    trainable = log.trainable
    if trainable is None and count and is_mmengine(config):
        trainable = _count(config)
    length, by_epoch = planned(config) if config else (None, None)
    by_epoch = by_epoch if by_epoch is not None else log.by_epoch
    return Run(
        path=str(path),
        config=name,
        method=method,
        task=task,
        unit='epochs' if by_epoch else 'iterations',
        planned=length,
        trained=log.trained,
        evaluations=dict(sorted(log.evaluations.items())),
        tested=log.tested,
        trainable=trainable,
        changed=changed,
        notes=notes,
    )


def _what_is_missing(path: Path, log: Log, method: str | None, task: str | None, asked: tuple[str, str] | None) -> str:
    if log.config is None:
        reason = 'it has no config in it'
    elif task is None:
        reason = 'its config is of none of the tasks'
    else:
        backbone = model_config(log.config).get('backbone') or {}
        reason = f'its task is {task}, its backbone ({backbone.get("type")}) none of the methods known here'
    if asked is not None:
        reason += f', not {"/".join(asked)}'
    return (
        f'{path}: the log does not tell which cell of the tables it is: {reason}. Say it with --as METHOD/TASK '
        f'({", ".join(METHODS)} / {", ".join(TASKS)}).'
    )


def _count(config: dict[str, Any]) -> int | None:
    try:
        return count_trainable(build_on_meta(Config(config))).backbone_trainable
    except Exception:  # the config may be for another version, or use modules that are not installed here
        return None


# Finding -------------------------------------------------------------------------------------------------------------


def _find(given: Path) -> Iterator[tuple[Path, list[list[Path]]]]:
    """Find the runs under a path.

    Yields:
        The location of each run, and the files of its parts in order; each start of the program is a part.
    """
    if given.is_file():
        yield given, [_with_neighbour(given)]
        return
    parts: dict[Path, dict[str, list[Path]]] = {}
    for folder, _, names in os.walk(given):
        folder = Path(folder)
        for name in sorted(names):
            path = folder / name
            owner, stamp = _owner(path)
            if owner is not None:
                parts.setdefault(owner, {}).setdefault(stamp, []).append(path)
    for owner in sorted(parts):
        yield owner, [parts[owner][stamp] for stamp in sorted(parts[owner])]


def _owner(path: Path) -> tuple[Path | None, str]:
    """The run of a log file (its work dir, or the file itself) and the timestamp of its part; None for other files."""
    folder = path.parent
    if folder.name == 'vis_data' and _TIMESTAMP.fullmatch(folder.parent.name):
        return (folder.parent.parent if path.name in ('scalars.json', 'config.py') else None), folder.parent.name
    if _TIMESTAMP.fullmatch(folder.name):
        return (folder.parent if path.stem == folder.name and path.suffix in ('.log', '.json') else None), folder.name
    if not path.name.endswith(_LOG_FILES):
        return None, ''
    log = path.with_name(path.name.removesuffix('.json'))  # the text log that mmcv 1.x writes beside the .log.json
    return (folder, log.stem) if _TIMESTAMP.fullmatch(log.stem) else (log, '')


def _with_neighbour(path: Path) -> list[Path]:
    """The log file and its counterpart, text or JSON, that mmcv 1.x writes beside it; those that exist."""
    name = path.name
    other = name.removesuffix('.json') if name.endswith('.log.json') else f'{name}.json'
    return [file for file in (path.with_name(other), path) if file.is_file()]


def _read(parts: list[list[Path]]) -> Log:
    """Read the parts of a run into one log. Files that are not in the format of a log add nothing."""
    run = Log()
    for files in parts:
        part = Log()
        config = next((parse_config(_text(file)) for file in files if file.name == 'config.py'), None)
        logs = [file for file in files if file.suffix != '.py']
        # The text log comes first: it has the config, and the more exact scores in the JSON replace its scores.
        for file in sorted(logs, key=lambda file: file.suffix == '.json'):
            part.add(read_log(file, config or part.config))
        part.config = part.config or config
        if part.first is None and not part.evaluations and not run.is_empty:
            run.tested |= part.tested  # from a run of tools/test.py in the work dir
        elif not part.is_empty:
            run.resume(part)
    return run


def _text(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace')


# Results files -------------------------------------------------------------------------------------------------------


def is_results(path: Path) -> bool:
    """Whether :func:`save_results` wrote a file."""
    if path.suffix != '.json' or not path.is_file():
        return False
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError:
        return False
    return isinstance(content, dict) and content.get('format') == _FORMAT


def save_results(runs: list[Run], path: Path) -> None:
    """Write runs as JSON. The file may replace an earlier file of this function, but no other file.

    Raises:
        ConfigError: if ``path`` is a file that this function did not write.
    """
    if path.exists() and not is_results(path):
        raise ConfigError(f'{path} is not a results file of this program, and is left alone. Name another with --out.')
    content = {'format': _FORMAT, 'version': _VERSION, 'runs': [asdict(run) for run in runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def load_results(path: Path) -> list[Run]:
    """Read the runs from a file of :func:`save_results`.

    Raises:
        ConfigError: if another version of this program wrote the file.
    """
    content = json.loads(_text(path))
    if content.get('version') != _VERSION:
        raise ConfigError(f'{path} is of another version of this program: collect the results anew.')
    runs = [Run(**run) for run in content['runs']]
    for run in runs:
        run.evaluations = {int(step): scores for step, scores in run.evaluations.items()}
    return runs
