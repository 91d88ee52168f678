"""The page of a run, ``report.html``, and the table of its evaluations, ``results.csv``."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.report.charts import confusion_chart, line_chart, short
from mona_mm.report.evaluator import Chart, Confusion, Curve, Evaluation
from mona_mm.report.html import html_figure, html_page, html_picture, html_table, jpeg_of, svg_of

_LINES = 8  # in a chart
_ROWS = 60  # evaluations in the table on the page, the latest
_CONFUSED = 10  # pairs of classes in the list of those that are confused most

_MAIN = ('segm_mAP', 'bbox_mAP', 'mAP', 'mIoU', 'top1', 'f1-score', 'AP50')
"""The ends of the names of the metrics by which runs are usually compared, the first of which is present."""

STEP_COLUMNS = ('iteration', 'epoch', 'time', 'seconds')
"""The first columns of ``results.csv``: the step, when it was evaluated, and the seconds of training up to then."""

Row = dict[str, str | float | int]
"""One evaluation: the columns of ``results.csv`` by name."""


@dataclass
class RunState:
    """What a page shows of a run.

    Args:
        title: the heading.
        status: how far the run is, in a sentence.
        command: the command line.
        facts: what else is to be known in a line each, by name.
        evaluations: the evaluations so far.
        losses: the losses by iteration.
        rates: the learning rates by iteration.
        evaluation: what the last evaluation has seen.
        trains: the table of the parameters that train, as text.
    """

    title: str
    status: str
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    evaluations: list[Row] = field(default_factory=list)
    losses: dict[str, Curve] = field(default_factory=dict)
    rates: dict[str, Curve] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    trains: str = ''


def write_run(state: RunState, folder: Path, prefix: str = '') -> Path:
    """Write ``report.html`` and ``results.csv`` into a folder, each completely or not at all.

    Args:
        state: the run.
        folder: the work dir.
        prefix: what both names begin with.

    Returns:
        The path of the page.

    Raises:
        OSError: if the folder cannot be written to.
    """
    backend = AtomicLocalBackend()
    backend.put_text(csv_of(state.evaluations), folder / f'{prefix}results.csv')
    page = folder / f'{prefix}report.html'
    backend.put_text(html_page(state.title, _body(state)), page)
    return page


def csv_of(rows: Sequence[Row]) -> str:
    """Evaluations as a table of comma-separated values, with every column that any of them has."""
    names = dict.fromkeys([name for name in STEP_COLUMNS if any(name in row for row in rows)])
    names |= dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(names), restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_results(file: Path, until: int) -> list[Row]:
    """The evaluations that a ``results.csv`` holds up to an iteration; none if there is no such table."""
    if not file.is_file():
        return []
    with file.open(encoding='utf-8', newline='') as lines:
        rows = [
            {name: _number(value) for name, value in row.items() if name and value} for row in csv.DictReader(lines)
        ]
    return [row for row in rows if isinstance(row.get('iteration'), int | float) and row['iteration'] <= until]


def main_metric(names: Iterable[str]) -> str | None:
    """The metric by which runs are usually compared: the first of the usual ones, or else simply the first."""
    names = [name for name in names if name not in STEP_COLUMNS and '/class/' not in f'/{name}']
    for end in _MAIN:
        for name in names:
            if name.rpartition('/')[2] == end:
                return name
    return names[0] if names else None


def _number(text: str) -> str | float | int:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _body(state: RunState) -> str:
    parts = [f'<p>{html.escape(state.status)}</p>']
    if state.command:
        parts.append(f'<pre>{html.escape(state.command)}</pre>')
    if state.facts:
        parts.append(html_table((('', ''), ('', '')), state.facts.items()))
    metrics = _metric_charts(state.evaluations)
    curves = [
        (Chart('training losses', 'iteration', _few(state.losses)), True),
        *((chart, False) for chart in metrics),
        (Chart('learning rate', 'iteration', state.rates), False),
    ]
    curves = [(chart, log) for chart, log in curves if chart.lines]
    if curves:
        parts += ['<h2>Curves</h2>', _charts(curves)]
    if state.evaluations:
        parts += ['<h2>Evaluations</h2>', _evaluations(state.evaluations)]
    if state.evaluation is not None:
        parts += _evaluation_parts(state.evaluation)
    if state.trains:
        parts += ['<h2>What trains</h2>', f'<pre>{html.escape(state.trains)}</pre>']
    return '\n'.join(parts)


def _charts(charts: Sequence[tuple[Chart, bool]]) -> str:
    figures = [html_figure(svg_of(line_chart(chart, log)), chart.caption) for chart, log in charts]
    return f'<div class="charts">{"".join(figures)}</div>'


def _few(lines: Mapping[str, Curve]) -> dict[str, Curve]:
    """The first lines, positive ones, for an axis that is logarithmic."""
    return {name: line for name, line in list(lines.items())[:_LINES] if len(line[1]) and (line[1] > 0).all()}


def _metric_charts(rows: Sequence[Row]) -> list[Chart]:
    """The metrics by iteration: those up to 1 in one chart, larger ones (in percent) in another."""
    lines: dict[str, Curve] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in STEP_COLUMNS or name.startswith('class/'):
            continue
        points = [(row['iteration'], row[name]) for row in rows if _is_score(row.get(name)) and 'iteration' in row]
        if points:
            x, y = map(np.array, zip(*points, strict=True))
            lines[name] = x, y
    small = {name: line for name, line in lines.items() if abs(line[1]).max() <= 1}
    large = {name: line for name, line in lines.items() if name not in small}
    charts = [
        Chart('metrics' if not large or not small else title, 'iteration', dict(list(group.items())[:_LINES]))
        for title, group in (('metrics, as fractions', small), ('metrics, in percent', large))
        if group
    ]
    return charts if any(len(line[0]) for line in lines.values()) else []


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and value == value and value != -1  # -1 means that there was no object


def _evaluations(rows: Sequence[Row]) -> str:
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row)
        if name not in STEP_COLUMNS and not name.startswith('class/')
    ]  # fmt: skip
    main = main_metric(names)
    best = max((row[main] for row in rows if _is_score(row.get(main))), default=None)
    steps = [name for name in ('iteration', 'epoch') if any(name in row for row in rows)]
    lines = []
    for row in rows[-_ROWS:]:
        cells = [f'{row[name]:,}' if name in row else '-' for name in steps]
        cells += [_cell(row.get(name)) + (' *' if name == main and row.get(name) == best else '') for name in names]
        lines.append(cells)
    note = f'<p class="note">* the best {html.escape(main)}. All of it is in results.csv.</p>' if main else ''
    return html_table([(name, '') for name in (*steps, *names)], lines, text_last=False) + note


def _cell(value: object) -> str:
    return f'{value:.4g}' if isinstance(value, int | float) else '-' if value is None else str(value)


def _evaluation_parts(evaluation: Evaluation) -> list[str]:
    parts = [f'<h2>Classes <small>({evaluation.images:,} images)</small></h2>']
    if evaluation.rows:
        parts.append(html_table(evaluation.columns, evaluation.rows, text_last=False))
    parts += [f'<p class="note">{html.escape(remark)}</p>' for remark in evaluation.remarks]
    if evaluation.charts:
        parts.append(_charts([(chart, False) for chart in evaluation.charts]))
    if evaluation.confusion is not None:
        parts += ['<h2>Confusion</h2>', _confusion(evaluation.confusion)]
    headings = dict(best='Best images', worst='Worst images', random='Random images')
    for kind, heading in headings.items():
        pictures = [picture for picture in evaluation.pictures if picture.kind == kind]
        if pictures:
            parts.append(f'<h2>{heading}</h2>')
            parts.append('<div class="charts">' if pictures[0].image.shape[1] < 400 else '<div>')
            parts += [
                html_figure(html_picture(jpeg_of(picture.image), picture.caption), picture.caption)
                for picture in pictures
            ]
            parts.append('</div>')
    return parts


def _confusion(confusion: Confusion) -> str:
    chart = confusion_chart(confusion)
    text = html_figure(svg_of(chart), confusion.caption) if chart is not None else ''
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSED]
    rows = [
        (confusion.truths[i], confusion.predictions[j], short(int(wrong[i, j])), f'{wrong[i, j] / row:.1%}')
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j] and (row := confusion.counts[i].sum())
    ]
    if rows:
        columns = (('true', ''), ('predicted', ''), ('count', ''), ('of the true', ''))
        text += (
            f'<details><summary>What is confused most</summary>{html_table(columns, rows, text_last=False)}</details>'
        )
    return text
