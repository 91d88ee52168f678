"""Charts that are readable on a light and on a dark page: lines over a common axis, and confusion matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mona_mm.report.evaluator import Chart, Confusion
from mona_mm.report.html import INK, chart_text

_MANY = 30  # classes beyond which the cells of a confusion matrix cannot be told apart
_WRITTEN = 12  # classes up to which every cell has its number
_NAMED_INSIDE = 4  # lines up to which their names stand between the axes

_STYLE = {
    'text.color': INK,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'axes.facecolor': 'none',
    'axes.titlesize': 9,
    'axes.labelsize': 8,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.labelsize': 7.5,
    'ytick.labelsize': 7.5,
    'grid.color': INK,
    'grid.alpha': 0.15,
    'legend.frameon': False,
    'legend.fontsize': 7,
    'lines.linewidth': 1.3,
}


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout='constrained', facecolor='none')


def line_chart(chart: Chart, log: bool = False) -> Figure:
    """Draw lines with a legend, the vertical axis logarithmic if ``log`` is true."""
    with _figure(4.4, 3.1) as figure:
        axes = figure.add_subplot()
        for number, (name, (x, y)) in enumerate(chart.lines.items()):
            axes.plot(x, y, 'o-' if len(x) < 3 else '-', markersize=3, label=chart_text(name), color=f'C{number % 10}')
        if chart.mark is not None:
            axes.axvline(chart.mark, color=INK, linewidth=0.9, linestyle=':')
        axes.set(title=chart.title, xlabel=chart.x)
        if log:
            axes.set_yscale('log')
        axes.grid(which='major')
        if len(chart.lines) > _NAMED_INSIDE:  # beside the lines it would hide them
            figure.legend(loc='outside lower center', ncols=3)
        elif chart.lines:
            axes.legend(loc='best')
        return figure


def confusion_chart(confusion: Confusion) -> Figure | None:
    """Draw a confusion matrix, each row as shares of its sum; None if it has too many classes to be read."""
    counts = confusion.counts
    if len(counts) > _MANY:
        return None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    longest = max(map(len, [*confusion.truths, *confusion.predictions]))
    size = max(2.4, 0.34 * len(counts)) + 0.07 * min(longest, 20)
    with _figure(size + 0.5, size) as figure:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, aspect='auto')
        axes.set_xticks(range(len(counts)), map(chart_text, confusion.predictions), rotation=60, ha='right')
        axes.set_yticks(range(len(counts)), map(chart_text, confusion.truths))
        axes.set(xlabel='predicted', ylabel='true')
        if len(counts) <= _WRITTEN:
            for (y, x), value in np.ndenumerate(counts):
                text = short(int(value))
                colour = '#ffffff' if shares[y, x] > 0.55 else '#222222'
                axes.text(x, y, text, ha='center', va='center', fontsize=6.5, color=colour)
        return figure


def short(count: int) -> str:
    """A count in at most four characters or so."""
    for unit, size in (('M', 10**6), ('k', 10**3)):
        if count >= size:
            return f'{count / size:.1f}{unit}' if count < 10 * size else f'{count / size:.0f}{unit}'
    return str(count)
