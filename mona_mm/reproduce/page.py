"""A comparison as one HTML page that needs no other file."""

import html
import statistics
from pathlib import Path

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.report.html import html_figure, html_page, html_picture, html_table, save_png, svg_of
from mona_mm.reproduce.charts import class_chart, cost_chart, training_chart
from mona_mm.reproduce.comparison import Cell, ComparedTask, Comparison
from mona_mm.reproduce.pictures import Picture, read_pictures
from mona_mm.reproduce.records import Record, Row, or_dash, rows_of, spread

_COLUMNS = (
    ('method', ''),
    ('test', 'mean and sample standard deviation over the seeds'),
    ('validation', 'the same on the validation images'),
    ('learning rate', 'the best of those tried with the first seed'),
    ('in the backbone', 'parameters that train in the backbone'),
    ('in all', 'parameters that train, with neck and head'),
    ('CPU s', 'processor time of a run, with evaluation'),
    ('GiB', 'largest memory of the process until training ends'),
    ('saved MiB', 'the file of what was trained'),
    ('missing', 'what has not been run, or failed'),
)
"""The heads of the columns of a task's table, and what they mean."""


def write_page(
    table: Comparison, records: dict[str, dict[Cell, Record]], folder: Path, protocol: str | None = 'protocol.md'
) -> Path:
    """Write ``TABLE.html``, and the chart of each task as ``TABLE-TASK.png``, into a folder.

    The page has the charts and the pictures of the folder's ``pictures/`` in it.

    Args:
        table: the comparison.
        records: the results by type of device.
        folder: the folder to write into.
        protocol: the address of the protocol, relative to the folder; None if none was written.

    Returns:
        The path of the page.
    """
    pictures = read_pictures(folder / 'pictures')
    parts = []
    for device, found in records.items():
        for task in table.tasks:
            if any(cell.task == task.name for cell in found):
                parts += _task_part(table, task, found, device, folder)
                parts += [_picture_part(p, folder / 'pictures') for p in pictures if p.task == task.name]
    count = sum(map(len, records.values()))
    rates = {3: 'three'}.get(len(table.learning_rates), str(len(table.learning_rates)))
    written = (
        f'; the <a href="{html.escape(protocol)}">protocol</a> was written before the first run' if protocol else ''
    )
    body = f"""<p>Every method adapts the same pretrained backbone, with the same {rates} learning rates, schedule and
seeds{written}. This page is written by
<code>tools/reproduce.py page {html.escape(table.name)}</code> from the {count} results in <code>runs/</code>.</p>
{''.join(parts) or '<p>There are no results yet.</p>'}"""
    file = folder / f'{table.name}.html'
    AtomicLocalBackend().put_text(html_page(f'{table.name}: {table.title}', body), file)
    return file


def _task_part(
    table: Comparison, task: ComparedTask, records: dict[Cell, Record], device: str, folder: Path
) -> list[str]:
    """The table and the charts of a task; the chart of score and cost is written to a PNG file as well."""
    rows = sorted(rows_of(table, task.name, records), key=_rank)
    parts = [
        f'<h2>{html.escape(task.name)} <small>({html.escape(task.label)}, {device})</small></h2>',
        _machines(task, records),
    ]
    parts.append(html_table(_COLUMNS, (_cells(row) for row in rows)))
    suffix = '' if device == 'cpu' else f'-{device}'
    costs = cost_chart(table, task.name, records)
    if costs is not None:
        save_png(costs, folder / f'{table.name}-{task.name}{suffix}.png')
    charts = (
        (costs, 'Score against cost. The grey line joins the methods that none beats in both.'),
        (
            training_chart(table, task.name, records),
            'Left: training loss at the best learning rate, mean over the seeds. Right: the search for the learning '
            'rate.',
        ),
        (
            class_chart(table, task.name, records),
            'Score of each class, mean over the seeds. Colours compare the methods within a class.',
        ),
    )
    parts += [html_figure(svg_of(chart), caption) for chart, caption in charts if chart is not None]
    parts.append(_runs(task, records))
    return parts


def _rank(row: Row) -> tuple[bool, float]:
    """The place of a row: those with test scores come first, then the best."""
    return not row.test, -statistics.fmean(row.scores) if row.scores else 0.0


def _cells(row: Row) -> list[str]:
    return [
        row.method,
        spread(row.test),
        spread(row.validation),
        or_dash(row.lr, 'g'),
        or_dash(row.in_backbone, ',d'),
        or_dash(row.trained, ',d'),
        or_dash(row.seconds, '.0f'),
        or_dash(row.memory and row.memory / 2**30, '.2f'),
        or_dash(row.delta and row.delta / 2**20, '.1f'),
        row.missing,
    ]


def _machines(task: ComparedTask, records: dict[Cell, Record]) -> str:
    """A line on the machines and the versions that made a task's results."""
    found = {
        '{} (threads: {}), torch {}'.format(
            machine.get('gpu') or machine['processor'], machine['threads'], machine['torch']
        )
        for cell, record in records.items()
        if cell.task == task.name and (machine := record.get('machine'))
    }
    return f'<p class="note">Run on: {html.escape("; ".join(sorted(found)))}.</p>'


def _runs(task: ComparedTask, records: dict[Cell, Record]) -> str:
    """Every run of a task with its score and its costs, folded."""
    columns = [(head, '') for head in ('run', task.label, 'CPU s', 'of it training', 'GiB', 'date')]
    rows = []
    for cell, record in sorted(records.items(), key=lambda item: item[0].name):
        if cell.task == task.name:
            seconds, memory = record.get('seconds', {}), record.get('peak_memory')
            rows.append(
                (
                    cell.name,
                    f'{record["score"]:.2f}' if record['score'] is not None else f'failed: {record.get("error")}',
                    f'{seconds["processor"]:.0f}' if seconds else '-',
                    f'{seconds["training"]:.0f}' if seconds else '-',
                    f'{memory / 2**30:.2f}' if memory else '-',
                    record['date'][:10],
                )
            )
    return f'<details><summary>All {len(rows)} runs and their costs</summary>{html_table(columns, rows)}</details>'


def _picture_part(picture: Picture, folder: Path) -> str:
    return html_figure(
        html_picture((folder / picture.file).read_bytes(), picture.caption),
        f'{picture.caption} Image: {picture.credit}.',
    )
