"""Runs on data of one's own beside each other, from the tables of evaluations that they have written."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.report.run import Row, main_metric, read_results

_NEVER = 1 << 62
_TRAINS = re.compile(r'trainable in the backbone: ([\d,]+) =')


@dataclass
class OwnRun:
    """A run on data for which no numbers are published.

    Args:
        folder: its work dir.
        metric: the metric by which it is compared.
        rows: its evaluations.
        trained: the number of parameters that train in the backbone, if its log says so.
        delta: the size of its last delta in bytes; None if there is none.
    """

    folder: Path
    metric: str
    rows: list[Row]
    trained: int | None
    delta: int | None

    @property
    def best(self) -> Row:
        """The evaluation with the best value of the metric, the first of equals."""
        return max(self.rows, key=lambda row: row.get(self.metric, float('-inf')))

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns with scores of classes, by which runs on the same data are known."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row if name.startswith('class/')))


def find_own_runs(paths: Iterable[Path]) -> list[OwnRun]:
    """Find the runs with a ``results.csv`` under paths, in their order."""
    runs = []
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        rows = read_results(folder / 'results.csv', _NEVER)
        metric = main_metric(name for row in rows for name in row)
        if metric is not None:
            deltas = sorted(folder.glob(f'*{SUFFIX}'), key=lambda file: file.stat().st_mtime)
            size = deltas[-1].stat().st_size if deltas else None
            runs.append(OwnRun(folder, metric, rows, _trained(folder), size))
    return runs


def _folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file.parent for file in path.rglob('results.csv'))


def _trained(folder: Path) -> int | None:
    """The number of parameters that train in the backbone, from the run's last log."""
    for log in sorted(folder.glob('*/*.log'), reverse=True):
        found = _TRAINS.search(log.read_text(encoding='utf-8', errors='replace'))
        if found:
            return int(found[1].replace(',', ''))
    return None


def render_own_runs(runs: Iterable[OwnRun]) -> str:
    """Tables of runs as text, one for each metric and set of classes, the best run first."""
    groups: dict[tuple, list[OwnRun]] = {}
    for run in runs:
        groups.setdefault((run.metric, run.classes), []).append(run)
    return '\n\n'.join(_table(metric, classes, group) for (metric, classes), group in groups.items()) + '\n'


def _table(metric: str, classes: tuple[str, ...], runs: list[OwnRun]) -> str:
    rows = [('run', f'best {metric}', 'iteration', 'last', 'trained in the backbone', 'delta MB', 'time')]
    for run in sorted(runs, key=lambda run: -run.best.get(metric, float('-inf'))):
        seconds = max((row.get('seconds') or 0 for row in run.rows), default=0)
        rows.append(
            (
                str(run.folder),
                _number(run.best.get(metric)),
                str(run.best.get('iteration', '-')),
                _number(run.rows[-1].get(metric)),
                '-' if run.trained is None else f'{run.trained:,}',
                '-' if run.delta is None else f'{run.delta / 1e6:.1f}',
                str(timedelta(seconds=round(seconds))) if seconds else '-',
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append('  '.join([first.ljust(widths[0]), *numbers]))
    names = [name.removeprefix('class/').rpartition('/')[0] for name in classes]
    some = ', '.join(names[:8]) + (', ...' if names[8:] else '')
    heading = f'Runs on {len(names)} classes ({some})' if names else 'Runs'
    return '\n'.join([heading, *lines])


def _number(value: object) -> str:
    return f'{value:.4g}' if isinstance(value, int | float) else '-'
