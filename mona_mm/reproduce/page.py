"""A comparison as one HTML page that needs no other file."""

import base64
import html
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.reproduce.charts import class_chart, cost_chart, save_png, svg_of, training_chart
from mona_mm.reproduce.comparison import Cell, ComparedTask, Comparison
from mona_mm.reproduce.pictures import Picture, read_pictures
from mona_mm.reproduce.records import Record, Row, or_dash, rows_of, spread

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eee; vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
.scroll { overflow-x: auto; }
figure { margin: 1.2rem 0; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 13px; }
summary { cursor: pointer; color: #06c; }
"""

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
    table: Comparison, records: dict[str, dict[Cell, Record]], folder: Path, protocol: str = 'protocol.md'
) -> Path:
    """Write ``TABLE.html``, and the chart of each task as ``TABLE-TASK.png``, into a folder.

    The page has the charts and the pictures of the folder's ``pictures/`` in it.

    Args:
        table: the comparison.
        records: the results by type of device.
        folder: the folder to write into.
        protocol: the address of the protocol, relative to the folder.

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
    title = html.escape(f'{table.name}: {table.title}')
    count = sum(map(len, records.values()))
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>Every method adapts the same pretrained backbone, with the same three learning rates, schedule and seeds; the
<a href="{html.escape(protocol)}">protocol</a> was written before the first run. This page is written by
<code>tools/reproduce.py page {html.escape(table.name)}</code> from the {count} results in <code>runs/</code>.</p>
{''.join(parts) or '<p>There are no results yet.</p>'}
</body></html>
"""
    file = folder / f'{table.name}.html'
    AtomicLocalBackend().put_text(text, file)
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
    parts.append(_table(_COLUMNS, (_cells(row) for row in rows)))
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
    parts += [
        f'<figure>{svg_of(chart)}<figcaption>{caption}</figcaption></figure>'
        for chart, caption in charts
        if chart is not None
    ]
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


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table whose last column is text; a column is its head and what it means."""

    def line(tag: str, cells: Iterable[str]) -> str:
        *numbers, text = cells
        return (
            '<tr>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in numbers) + f'<{tag} class="text">{text}</{tag}></tr>'
        )

    heads = (f'<span title="{html.escape(meaning)}">{html.escape(head)}</span>' for head, meaning in columns)
    lines = [line('th', heads), *(line('td', map(html.escape, row)) for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


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
    return f'<details><summary>All {len(rows)} runs and their costs</summary>{_table(columns, rows)}</details>'


def _picture_part(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(picture.caption)}">'
        f'<figcaption>{html.escape(picture.caption)} Image: {html.escape(picture.credit)}.</figcaption></figure>'
    )
