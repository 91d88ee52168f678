"""Read and write the results file of a cell, JSON of a few KB, and render the files of a folder as a table."""

import json
import math
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError
from mona_mm.reproduce.comparison import Cell, Comparison
from mona_mm.version import __version__

RUNS = Path('docs/comparison/runs')
"""The folder of the results in the repository."""

Record = dict[str, Any]


def file_name(cell: Cell, device: str) -> str:
    """The basename of a cell's file. It differs between CPU and GPU, so one folder can hold the results of both."""
    return cell.name + ('' if device == 'cpu' else f'-{device}') + '.json'


def read_records(folder: Path, device: str) -> dict[Cell, Record]:
    """Read the results in a folder that were made on one type of device, by cell; empty if the folder does not exist.

    Raises:
        ConfigError: if a JSON file in the folder is not a result.
    """
    records = {}
    for file in sorted(folder.glob('*.json')):
        try:
            record = json.loads(file.read_text(encoding='utf-8'))
            cell = Cell(*(record[key] for key in ('task', 'method', 'lr', 'seed', 'split')))
            record_device = record['device']
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f'{file} is not a result of tools/reproduce.py run. Keep others out of {folder}.'
            ) from None
        if record_device == device:
            records[cell] = record
    return records


def write_record(record: Record, cell: Cell, folder: Path) -> None:
    """Write the results file of a cell, completely or not at all."""
    text = json.dumps(record, indent=2, sort_keys=True) + '\n'
    AtomicLocalBackend().put_text(text, folder / file_name(cell, record['device']))


def code_version() -> dict[str, Any]:
    """The version of this package, and its commit if it is a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(['git', '-C', root, *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git('rev-parse', 'HEAD') if (root / '.git').exists() else None
    changed = bool(git('status', '--porcelain', '--untracked-files=no')) if commit else None
    return dict(version=__version__, commit=commit, changed=changed)


def best_learning_rate(table: Comparison, task: str, method: str, records: dict[Cell, Record]) -> float | None:
    """The learning rate with the best validation score for the first seed; the lowest of equals.

    It is None until all learning rates are done, and if all have failed.
    """
    found = {lr: records.get(Cell(task, method, lr, table.seeds[0])) for lr in table.rates(task, method)}
    if None in found.values():
        return None
    scores = {lr: record['score'] for lr, record in found.items() if record['score'] is not None}
    return max(sorted(scores), key=scores.get) if scores else None


# Showing --------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A table's row for a method on a task; values that were not measured are None."""

    method: str
    lr: float | None
    validation: list[float]
    test: list[float]
    trained: int | None
    in_backbone: int | None
    seconds: float | None
    memory: int | None
    delta: int | None
    missing: str

    @property
    def scores(self) -> list[float]:
        """The test scores if there are any, else the validation scores."""
        return self.test or self.validation


def rows_of(table: Comparison, task: str, records: dict[Cell, Record]) -> list[Row]:
    """The rows of a task in a table, one for every method."""
    return [_row(table, task, method, records) for method in table.methods if table.has(task, method)]


def _row(table: Comparison, task: str, method: str, records: dict[Cell, Record]) -> Row:
    found = {cell: record for cell, record in records.items() if (cell.task, cell.method) == (task, method)}
    rates = sorted(table.rates(task, method))
    search = [found.get(Cell(task, method, lr, table.seeds[0])) for lr in rates]
    lr = best_learning_rate(table, task, method, records)
    final, missing = lr, []
    if lr is None:  # show the best learning rate so far
        done = [record for record in search if record and record['score'] is not None]
        lr = max(done, key=lambda record: record['score'])['lr'] if done else None
    absent = [f'{rate:g}' for rate, record in zip(rates, search, strict=True) if record is None]
    failed = [record for record in found.values() if record['score'] is None]
    if absent:
        missing.append(f'learning rates {", ".join(absent)}')
    trained, tested = (
        [found[cell] for seed in table.seeds if (cell := Cell(task, method, lr, seed, split)) in found]
        if lr is not None
        else []
        for split in ('val', 'test')
    )
    if len(trained) < len(table.seeds):
        missing.append(f'{len(table.seeds) - len(trained)} seeds')
    if len(tested) < len(table.seeds) and table.has_tests:
        missing.append(f'{len(table.seeds) - len(tested)} tests')
    missing += [f'lr {r["lr"]:g} seed {r["seed"]} {r["split"]} failed: {r["error"]}' for r in failed]
    if len(rates) > 1 and final in (rates[0], rates[-1]):
        missing.append('best learning rate at the edge')
    good = [record for record in trained if record['score'] is not None]
    mean = {
        name: statistics.fmean(values) if values else None
        for name, values in (
            ('seconds', [record['seconds']['processor'] for record in good]),
            ('memory', [record['peak_memory'] for record in good]),
        )
    }
    first = good[0] if good else {}
    return Row(
        method,
        lr,
        [record['score'] for record in good],
        [record['score'] for record in tested if record['score'] is not None],
        first.get('trained_parameters'),
        first.get('trained_in_backbone'),
        mean['seconds'],
        mean['memory'],
        first.get('delta_bytes'),
        '; '.join(missing),
    )


def render_comparison(table: Comparison, records: dict[Cell, Record], tasks: Iterable[str], device: str) -> str:
    """Render a comparison as text for a terminal, with a part for each task and the best methods first."""
    parts = [f'{table.title} (on {device})']
    for task in tasks:
        label = table.task(task).label
        head = ('method', f'{label} test', f'{label} val', 'lr', 'trained', 'in backbone', 'CPU s', 'MiB', 'delta MiB')
        lines = [(*head, 'missing')]
        rows = rows_of(table, task, records)
        for row in sorted(
            rows, key=lambda row: statistics.fmean(row.scores) if row.scores else -math.inf, reverse=True
        ):
            lines.append(
                (
                    row.method,
                    spread(row.test),
                    spread(row.validation),
                    or_dash(row.lr, 'g'),
                    or_dash(row.trained, ',d'),
                    or_dash(row.in_backbone, ',d'),
                    or_dash(row.seconds, '.0f'),
                    or_dash(row.memory and row.memory / 2**20, '.0f'),
                    or_dash(row.delta and row.delta / 2**20, '.1f'),
                    row.missing,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            '  '.join(
                [
                    *(
                        f'{c:<{w}}' if i < 1 else f'{c:>{w}}'
                        for i, (c, w) in enumerate(zip(line, widths, strict=False))
                    ),
                    line[-1],
                ]
            )
            for line in lines
        ]
        parts.append('\n'.join([f'\n{task}', *(line.rstrip() for line in text)]))
    return '\n'.join(parts) + '\n'


def spread(scores: list[float], digits: int = 2) -> str:
    """The mean and sample standard deviation as text, with the number of scores if it is not three."""
    if not scores:
        return '-'
    text = f'{statistics.fmean(scores):.{digits}f}'
    if len(scores) > 1:
        text += f'±{statistics.stdev(scores):.{digits}f}'
    return text if len(scores) == 3 else f'{text} ({len(scores)})'


def or_dash(value: float | None, form: str) -> str:
    """A value in a format, or a dash if it was not measured."""
    return '-' if value is None else format(value, form)
