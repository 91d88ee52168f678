"""The published tables with the runs beside them, as text for a terminal, as Markdown or as CSV."""

import csv
import io
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.reproduce.cells import METHODS, config_name, task_configs
from mona_mm.reproduce.published import published_results, published_scores, published_trainable
from mona_mm.reproduce.runs import Run
from mona_mm.reproduce.tasks import TASKS, Entry, Heading, Task

FORMATS = ('terminal', 'markdown', 'csv')

_TITLE = 'mona_mm: published results, and runs beside them'
_CSV = (
    *('table', 'method', 'setting', 'metric', 'last', 'last_step', 'best', 'best_step', 'step_unit'),
    *('published', 'grade', 'last_minus_published', 'best_minus_published', 'trained', 'trained_published'),
    *('status', 'changed', 'notes', 'run', 'config'),
)


@dataclass
class Row:
    """A row of a table: a published number, and a run of its cell if there is one."""

    method: str
    setting: str
    metric: str
    score: str
    config: str | None = None
    published: float | None = None
    grade: str | None = None
    trained_published: int | None = None
    run: Run | None = None


@dataclass
class Table:
    """Rows under a title. A table that is not ``comparable`` has only published numbers, with metrics as columns."""

    name: str
    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    comparable: bool = True


def table_names() -> list[str]:
    """The names of all tables: those of the tasks, and the others."""
    return [*(heading.name for heading in _headings()), 'ablation', 'other', 'params', 'spt']


def build_tables(runs: Iterable[Run], only: str | None = None) -> list[Table]:
    """Build the published tables, with the runs of each row's cell.

    Args:
        runs: the runs to show.
        only: the name of the only table to build, one of :func:`table_names`; None builds all that have rows.

    Raises:
        ConfigError: if there is no table named ``only``.
    """
    if only is not None and only not in table_names():
        raise ConfigError(f'--task {only}: there is no such table. The tables are {", ".join(table_names())}.')
    runs = list(runs)
    tables = [*_comparable(runs), *_published_only()]
    return [table for table in tables if (table.name == only if only else table.rows)]


def _headings() -> list[Heading]:
    return list(dict.fromkeys(task.table for task in TASKS.values() if task.table))


class _Cells:
    """The rows of cells, with a record of the configs that already have rows.

    Args:
        runs: the runs to show beside the published numbers.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.covered: set[str] = set()

    def rows(
        self,
        task: Task,
        method: str,
        setting: str,
        published: dict[str, Entry],
        trained: int | None,
        config: str | None = None,
    ) -> Iterator[Row]:
        """The rows of a cell: one for each run and published metric, then one for each other metric of a run.

        Args:
            task: the task of the cell.
            method: the method of the cell.
            setting: the setting that distinguishes the cell from others in the table.
            published: the published numbers, by metric.
            trained: the published number of parameters that train.
            config: the name of the cell's config; by default that of the method's main config.
        """
        config = config or config_name(method, task.name)
        self.covered.add(config)
        cell_runs = [run for run in self.runs if run.config == config]
        for score, entry in published.items():
            value, grade = entry if entry else (None, None)
            for run in cell_runs or [None]:
                yield Row(method, setting, task.metrics[score].label, score, config, value, grade, trained, run)
        for score, metric in task.metrics.items():
            for run in cell_runs if score not in published else ():
                if score in run.last[1]:
                    yield Row(method, setting, metric.label, score, config, trained_published=trained, run=run)

    def others(self) -> Iterator[Row]:
        """The rows of the runs whose configs have no row yet."""
        for run in self.runs:
            metrics = TASKS[run.task].metrics
            for score, metric in metrics.items() if run.config not in self.covered else ():
                if score in run.last[1] or score == next(iter(metrics)):
                    yield Row(run.method, run.config, metric.label, score, run.config, run=run)


def _comparable(runs: list[Run]) -> Iterator[Table]:
    cells = _Cells(runs)
    for heading in _headings():
        tasks = [task for task in TASKS.values() if task.table == heading]
        rows = [
            row
            for task in tasks
            for method in METHODS
            if _has_rows(task, method)
            for row in cells.rows(
                task,
                method,
                task.name if len(tasks) > 1 else '',
                published_scores(task, method),
                published_trainable(method, task.name),
            )
        ]
        notes = [note.format_map(published_results()) for note in heading.notes]
        yield Table(heading.name, heading.title, rows, notes)
    yield Table('ablation', 'Ablations on VOC: RetinaNet AP50', _ablations(cells))
    yield Table('other', 'Runs of configs without a published number', list(cells.others()))


def _has_rows(task: Task, method: str) -> bool:
    """Whether a cell has rows without a run: those of its published numbers, or of its config."""
    config = task_configs(task) / method / f'{config_name(method, task.name)}.py'
    return config.is_file() or any(published_scores(task, method).values())


def _ablations(cells: _Cells) -> list[Row]:
    data, task, rows = published_results(), TASKS['voc'], []
    for width, entry in data['ablation_bottleneck_voc_swin_l'].items():
        main = width == '64'
        config = task.config if main else f'{task.config}_bottleneck{width}'
        trained = published_trainable('mona', task.name) if main else None
        rows += cells.rows(task, 'mona', f'bottleneck {width}, swin_l', {'ap50': entry}, trained, config)
    for size, methods in data['ablation_backbone_voc'].items():
        for method, entry in methods.items():
            config = config_name(method, task.name).replace('swin_l', size)
            trained = published_trainable(method, task.name, size)
            rows += cells.rows(task, method, f'backbone {size}', {'ap50': entry}, trained, config)
    return rows


def _published_only() -> Iterator[Table]:
    data = published_results()
    rows = []
    for method in METHODS:
        for size in ('swin_t', 'swin_b', 'swin_l'):
            if method not in data['trainable_params_backbone'][size]:
                continue
            source = data['trainable_params_backbone'][size][method][1]
            for task, label in (('coco', size), ('voc', f'{size} voc'), ('flowers102', f'{size} classification')):
                number = published_trainable(method, task, size)
                rows.append(Row(method, '', label, 'trained', published=number, grade=source))
    yield Table(
        'params',
        'Parameters that train in the backbone (published)',
        rows,
        [
            data['trainable_params_backbone']['note'],
            data['trainable_params_backbone_other_tasks']['note'],
        ],
        comparable=False,
    )
    note = 'SPT scores are the best epoch on the test set and the best of the swept budgets.'
    groups = [
        ('ViT-B/16 IN-21k, FGVC', data['spt_vit_b16_in21k']['fgvc']),
        ('ViT-B/16 IN-21k, VTAB-1k', data['spt_vit_b16_in21k']['vtab1k_groups']),
        ('Swin-B, VTAB-1k', data['spt_swin_b_vtab1k_groups']),
    ]
    for title, group in groups:
        rows = [
            Row(method, title, column, column, published=value, grade=group['grade'])
            for method, values in group.items()
            if method not in ('columns', 'grade')
            for column, value in zip(group['columns'], values, strict=True)
        ]
        yield Table('spt', f'SPT: {title} (published)', rows, [note], comparable=False)
    for title, key in (('MAE', 'spt_vit_b16_mae_vtab_mean'), ('MoCo v3', 'spt_vit_b16_mocov3_vtab_mean')):
        rows = [
            Row(method, f'ViT-B/16 {title}, VTAB-1k', 'mean', 'mean', published=value, grade=grade)
            for method, (value, grade) in data[key].items()
        ]
        yield Table('spt', f'SPT: ViT-B/16 {title}, VTAB-1k mean (published)', rows, [note], comparable=False)


# Printing ------------------------------------------------------------------------------------------------------------


def render(tables: list[Table], form: str) -> str:
    """Render tables as text in one of :data:`FORMATS`."""
    if form == 'csv':
        return _csv(tables)
    blocks = [f'# {_TITLE}' if form == 'markdown' else _TITLE]
    for table in tables:
        header, body, remarks = _cells(table) if table.comparable else _pivot(table)
        lines = _markdown(header, body) if form == 'markdown' else _aligned(header, body)
        title = f'## {table.title}' if form == 'markdown' else f'{table.title}\n{"=" * len(table.title)}'
        notes = [*remarks, *table.notes]
        if form == 'markdown':
            notes = [f'- {note}'.replace('*', '\\*') for note in notes]
        else:
            notes = [_wrapped(note) for note in notes]
        blocks.append('\n'.join([title, *([''] if form == 'markdown' else []), *lines]))
        if notes:
            blocks.append('\n'.join(notes))
    legend = f'"-" is not published, or not measured here. {published_results()["note"]}'
    blocks.append(legend if form == 'markdown' else _wrapped(legend))
    return '\n\n'.join(blocks) + '\n'


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)


def _cells(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """The header, rows and remarks of a table with runs; columns without any value are left out."""
    header = [
        *('method', 'setting', 'metric', 'last', 'best', 'published', 'grade', 'last - publ.', 'best - publ.'),
        *('trained', 'trained publ.', 'run'),
    ]
    remarks: dict[str, int] = {}
    body = []
    for row in table.rows:
        values = _values(row)
        run = row.run
        star = '*' if run and run.changed else ''

        def number(key: str, values: dict = values, star: str = star) -> str:
            value = values[key]
            return '-' if value is None else f'{value:{"+" if "minus" in key else ""}.2f}{star}'

        best = number('best')
        if values['best_step'] is not None:
            best += f' @{values["best_step"]}'
        status = '-'
        if run:
            status = f'{run.status}, changed' if run.changed else run.status
            remark = _remark(run)
            if remark:
                status += f' [{remarks.setdefault(remark, len(remarks) + 1)}]'
        body.append(
            [
                *(row.method, row.setting or '-', row.metric, number('last'), best),
                '-' if row.published is None else f'{row.published}',
                row.grade or '-',
                *(number('last_minus_published'), number('best_minus_published')),
                *('-' if n is None else f'{n:,}' for n in (run and run.trainable, row.trained_published)),
                status,
            ]
        )
    kept = [i for i, name in enumerate(header) if name == 'published' or any(row[i] != '-' for row in body)]
    text = [f'[{number}] {remark}' for remark, number in remarks.items()]
    if any(row.run and row.run.changed for row in table.rows):
        text.insert(0, '* the run differs from the published setting, so the numbers do not compare as equals.')
    return [header[i] for i in kept], [[row[i] for i in kept] for row in body], text


def _remark(run: Run) -> str:
    parts = [run.path]
    if run.changed:
        shown = '; '.join(run.changed[:_SHOWN])
        more = f'; and {len(run.changed) - _SHOWN} more' if len(run.changed) > _SHOWN else ''
        parts.append(f'changed: {shown}{more}')
    return '. '.join([*parts, *run.notes])


_SHOWN = 12  # the number of differences that a table lists; results.json and the CSV list all


def _values(row: Row) -> dict[str, Any]:
    """The numbers of a row, each None if it does not exist."""
    (last_step, last), (best_step, best) = (row.run.last, row.run.best) if row.run else ((None, {}), (None, {}))
    last_score, best_score = last.get(row.score), best.get(row.score)

    def minus(score: float | None) -> float | None:
        return None if score is None or row.published is None else round(score - row.published, 6)

    return {
        'last': last_score,
        'last_step': last_step,
        'best': best_score,
        'best_step': best_step,
        'last_minus_published': minus(last_score),
        'best_minus_published': minus(best_score),
    }


def _pivot(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """The header, rows and remarks of a table without runs, with methods as rows and metrics as columns."""
    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    methods = list(dict.fromkeys(row.method for row in table.rows))
    found = {(row.method, row.metric): row for row in table.rows}
    body = [
        [
            method,
            *(f'{found[method, m].published:,}' if (method, m) in found else '-' for m in metrics),
            '/'.join(dict.fromkeys(found[method, m].grade or '-' for m in metrics if (method, m) in found)),
        ]
        for method in methods
    ]
    return ['method', *metrics, 'grade'], body, []


def _csv(tables: list[Table]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, lineterminator='\n')
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            run = row.run
            values = {
                **_values(row),
                'table': table.name,
                'method': row.method,
                'setting': row.setting,
                'metric': row.metric,
                'published': row.published,
                'grade': row.grade,
                'trained_published': row.trained_published,
                'config': row.config,
            }
            if run:
                values |= {
                    'step_unit': run.unit,
                    'trained': run.trainable,
                    'status': run.status,
                    'changed': '; '.join(run.changed),
                    'notes': '; '.join(run.notes),
                    'run': run.path,
                }
            writer.writerow(values)
    return text.getvalue()


def _aligned(header: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    left = {'method', 'setting', 'metric', 'run'}

    def line(row: list[str]) -> str:
        cells = (c.ljust(w) if h in left else c.rjust(w) for h, c, w in zip(header, row, widths, strict=True))
        return '  '.join(cells).rstrip()

    return [line(header), '-' * len(line(header)), *map(line, body)]


def _markdown(header: list[str], body: list[list[str]]) -> list[str]:
    escaped = [[cell.replace('|', '\\|').replace('*', '\\*') for cell in row] for row in [header, *body]]
    rows = [f'| {" | ".join(row)} |' for row in escaped]
    return [rows[0], f'|{"|".join(["---"] * len(header))}|', *rows[1:]]


def write_text(text: str, path: Path) -> None:
    """Write a rendered table. It may replace an earlier table, but no other file.

    Raises:
        ConfigError: if ``path`` is a file that is not a table.
    """
    if path.exists():
        with open(path, encoding='utf-8', errors='replace') as file:
            first = file.readline().rstrip('\n')
        if first not in (_TITLE, f'# {_TITLE}', ','.join(_CSV)):
            raise ConfigError(f'{path} is not a table of this program, and is left alone. Name another with --out.')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def plan(runs: Iterable[Run], only: str | None = None) -> list[str]:
    """List the training command for every cell that has a config, with the state of the cell among ``runs``."""
    runs = list(runs)
    folders = dict.fromkeys(task_configs(task) for task in TASKS.values())
    files = {path.stem: path for folder in folders for path in folder.rglob('*.py')}
    lines, seen = [], set()
    for table in build_tables(runs, only):
        for row in table.rows if table.comparable else ():
            if row.config in seen or row.config not in files:
                continue
            seen.add(row.config)
            cell_runs = [run for run in runs if run.config == row.config]
            equal = [run for run in cell_runs if not run.changed]
            done = any(run.status == 'done' for run in equal)
            status = 'done' if done else 'partial' if equal else 'changed only' if cell_runs else 'missing'
            partial = next((run for run in equal if run.status != 'done' and Path(run.path).is_dir()), None)
            command = f'python tools/train.py {_relative(files[row.config])}'
            if partial and not done:
                command += f' --work-dir {partial.path} --resume'
            else:
                command += f' --work-dir work_dirs/{row.config}'
            lines.append(f'{status:12}  {command}')
    return lines


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
