"""Charts of a comparison: score against cost, learning curves, learning rates and classes."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mona_mm.catalogue.methods import method_colour
from mona_mm.report.html import chart_text
from mona_mm.reproduce.comparison import Cell, Comparison
from mona_mm.reproduce.records import Record, Row, rows_of

_COSTS: tuple[tuple[str, Callable[[Row], float | None], bool], ...] = (
    ('parameters that train in the backbone', lambda row: row.in_backbone, True),
    ('processor time of a run, seconds', lambda row: row.seconds, False),
    ('largest memory, GiB', lambda row: row.memory and row.memory / 2**30, False),
)
"""The label, the value and whether the axis is logarithmic, of each cost."""


def cost_chart(table: Comparison, task: str, records: dict[Cell, Record]) -> Figure | None:
    """Draw the score of every method on a task against each of its costs.

    The bars are sample standard deviations over the seeds. The grey line joins the methods that no other method beats
    in both score and cost. A backbone in which nothing trains stands at the left edge. None if nothing was measured.
    """
    rows = [row for row in rows_of(table, task, records) if row.scores]
    if not rows:
        return None
    figure = Figure(figsize=(12.5, 4.2), layout='constrained')
    colours = _colours(table)
    for axes, (label, cost, is_log) in zip(figure.subplots(1, len(_COSTS), sharey=True), _COSTS, strict=True):
        smallest = min((value for row in rows if (value := cost(row))), default=1)
        points = []
        for row in rows:
            x, y = cost(row), statistics.fmean(row.scores)
            if x is None:
                continue
            x = max(x, smallest / 3) if is_log else x
            points.append((x, y))
            deviation = statistics.stdev(row.scores) if len(row.scores) > 1 else None
            axes.errorbar(x, y, deviation, fmt='o', color=colours[row.method], markersize=6, linewidth=1, zorder=3)
            axes.annotate(row.method, (x, y), xytext=(5, 3), textcoords='offset points', fontsize=7, zorder=4)
        front = pareto_front(points)
        axes.step(*zip(*front, strict=True), where='post', color='#bbbbbb', linewidth=1.5, zorder=1)
        if is_log:
            axes.set_xscale('log')
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.18)
    figure.axes[0].set_ylabel(f'{table.task(task).label}, {"test" if any(row.test for row in rows) else "validation"}')
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points ``(cost, score)`` that no other point beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def training_chart(table: Comparison, task: str, records: dict[Cell, Record]) -> Figure | None:
    """Draw the training loss of every method at its best learning rate, and the scores of all learning rates.

    The loss is the mean over the seeds of means over ten iterations; the scores are those of the first seed on the
    validation images. None if nothing was measured.
    """
    rows = [row for row in rows_of(table, task, records) if row.scores]
    if not rows:
        return None
    figure = Figure(figsize=(12.5, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    colours = _colours(table)
    for row in rows:
        cells = [Cell(task, row.method, row.lr, seed) for seed in table.seeds]
        curves = [records[cell]['losses'] for cell in cells if records.get(cell, {}).get('losses')]
        if curves:
            left.plot(*zip(*_mean_curve(curves), strict=True), color=colours[row.method])
        rates = sorted(table.rates(task, row.method))
        first = [records.get(Cell(task, row.method, lr, table.seeds[0])) for lr in rates]
        found = [(r['lr'], r['score']) for r in first if r is not None and r['score'] is not None]
        right.plot(*zip(*found, strict=True), 'o-', color=colours[row.method], markersize=4)
    left.set(xlabel='iteration', ylabel='training loss', yscale='log')
    right.set(xlabel='learning rate', ylabel=f'{table.task(task).label}, validation, first seed', xscale='log')
    for axes in (left, right):
        axes.grid(alpha=0.3, which='both')
    lines = [Line2D([], [], color=colours[row.method], label=row.method) for row in rows]
    figure.legend(handles=lines, loc='outside right center', fontsize='small')
    return figure


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean loss by iteration. A run that was stopped and resumed can lack an iteration that others have."""
    losses: dict[int, list[float]] = {}
    for curve in curves:
        for iteration, loss in curve:
            losses.setdefault(iteration, []).append(loss)
    return [(iteration, statistics.fmean(found)) for iteration, found in sorted(losses.items())]


def class_chart(table: Comparison, task: str, records: dict[Cell, Record]) -> Figure | None:
    """Draw the test score of every class by method, the mean over the seeds, as a coloured table.

    None if no test was run.
    """
    by_method: dict[str, dict[str, float]] = {}
    for row in rows_of(table, task, records):
        cells = [Cell(task, row.method, row.lr, seed, 'test') for seed in table.seeds] if row.lr is not None else []
        found = [records[cell]['classes'] for cell in cells if records.get(cell, {}).get('classes')]
        if found:
            by_method[row.method] = {
                cls: statistics.fmean(scores[cls] for scores in found if cls in scores) for cls in found[0]
            }
    if not by_method:
        return None
    classes = list(next(iter(by_method.values())))
    values = np.array([[scores.get(cls, np.nan) for cls in classes] for scores in by_method.values()])
    figure = Figure(figsize=(2.6 + 0.75 * len(classes), 1.6 + 0.3 * len(by_method)), layout='constrained')
    axes = figure.add_subplot()
    # Every class has its own scale of colours, since some classes are much harder than others.
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    axes.imshow((values - low) / np.maximum(high - low, 1e-9), cmap='YlGn', aspect='auto', vmin=0, vmax=1.4)
    _write_values(axes, values)
    axes.set_xticks(range(len(classes)), map(chart_text, classes), rotation=45, ha='right', fontsize=8)
    axes.set_yticks(range(len(by_method)), by_method, fontsize=8)
    axes.set_title(f'{table.task(task).label} of each class, test', fontsize=10)
    return figure


def _write_values(axes: Axes, values: np.ndarray) -> None:
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(x, y, f'{value:.1f}', ha='center', va='center', fontsize=7)


def _colours(table: Comparison) -> dict[str, str]:
    return {method: method_colour(method, number) for number, method in enumerate(table.methods)}
