"""A picture of cost against image size, as a PNG file."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mona_mm.benchmark.backbone import LABELS, VARIANTS, Row, reference
from mona_mm.catalogue.methods import method_colour
from mona_mm.report.html import save_png

_COLOURS_OF_VARIANTS = dict(
    stock='#999999',
    published_mona='#ee8866',
    mona_folded='#ff99aa',
    lora_merged='#99cc77',
    spt_merged='#cccc88',
)
_ARCHS = dict(t=('o', ':'), b=('s', '--'), l=('^', '-'), vit_b=('D', '--'), dinov2_s=('v', ':'), dinov2_b=('P', '-.'))
"""The marker and the line style of each backbone."""


def plot_cost(rows: Sequence[Row], path: str) -> None:
    """Draw the time and memory of a training step, or of a forward for inference, against the size of the image.

    The size of an image is shown as the side of a square with as many pixels. Every suite, batch and type gets four
    panels: time, memory, and the ratios of both to the reference. The colours tell the variants, the markers and line
    styles the backbones; the bars are quartiles.

    Args:
        rows: the rows of :mod:`mona_mm.benchmark.backbone` or :mod:`mona_mm.benchmark.detector`.
        path: the path of the PNG file, whose folder is created if it does not exist.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.step is None, row.batch, row.dtype), []).append(row)
    figure = Figure(figsize=(13, 8.5 * len(groups)), layout='constrained')
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for ((suite, inference, batch, dtype), group), part in zip(groups.items(), parts, strict=True):
        what = 'inference (a forward)' if inference else 'training step (forward, backward, AdamW)'
        part.suptitle(f'{suite}, {what}: batch {batch}, {dtype}')
        _panels(group, part.subplots(2, 2), inference)
        part.legend(handles=_legend(group), loc='outside right center', fontsize='small')
    save_png(figure, path, dpi=130)


def _panels(rows: list[Row], axes: Sequence[Sequence[Axes]], inference: bool) -> None:
    (time, memory), (time_ratio, memory_ratio) = axes
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=_side):
        lines.setdefault((row.arch, row.variant), []).append(row)
    for (arch, variant), line in lines.items():
        sides = [_side(row) for row in line]
        marker, linestyle = _ARCHS[arch]
        style = dict(color=_colour(variant), marker=marker, linestyle=linestyle, markersize=4, linewidth=1.3)
        for axis, times, scale in ((time, _times(line), 1e-3), (time_ratio, _ratios(line), 1.0)):
            middle = [scale * t for t, _ in times]
            # Because of rounding, a quartile can lie slightly on the wrong side of the median.
            low, high = ([max(0.0, sign * scale * (s[i] - t)) for t, s in times] for i, sign in ((0, -1), (1, 1)))
            axis.errorbar(sides, middle, yerr=(low, high), capsize=2, elinewidth=0.8, **style)
        memory.plot(sides, [row.memory / 1024 for row in line], **style)
        memory_ratio.plot(sides, [row.memory_ratio for row in line], **style)
    other = reference(inference)
    for axis, label in (
        (time, 'time, s'),
        (memory, 'memory, GiB'),
        (time_ratio, f'time / time of {other}'),
        (memory_ratio, f'memory / memory of {other}'),
    ):
        axis.set_ylabel(label)
        axis.set_xlabel('image, pixels (its place: the side of a square of its area)')
        axis.set_xscale('log')
        _ticks(axis, rows)
        axis.grid(alpha=0.3)
    for axis in (time, memory):
        axis.set_yscale('log')
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    for axis in (time_ratio, memory_ratio):
        axis.set_ylim(bottom=0)


def _ticks(axis: Axes, rows: list[Row]) -> None:
    """Put the ticks at the sizes that were measured; where two would overlap, only the larger gets a tick."""
    names = {
        _side(row): f'{row.size[0]}' if row.size[0] == row.size[1] else 'x'.join(map(str, row.size)) for row in rows
    }
    ticks: list[float] = []
    for side in sorted(names, reverse=True):
        if not ticks or side < 0.88 * ticks[-1]:
            ticks.append(side)
    axis.set_xticks(ticks, [names[side] for side in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _legend(rows: list[Row]) -> list[Line2D]:
    variants = [variant for variant in VARIANTS if variant in {row.variant for row in rows}]
    archs = [arch for arch in _ARCHS if arch in {row.arch for row in rows}]
    found = [Line2D([], [], color=_colour(variant), linewidth=3, label=variant) for variant in variants]
    for arch in archs:
        marker, linestyle = _ARCHS[arch]
        found.append(Line2D([], [], color='#555555', marker=marker, linestyle=linestyle, label=LABELS[arch]))
    return found


def _side(row: Row) -> float:
    return (row.size[0] * row.size[1]) ** 0.5


def _times(line: list[Row]) -> list[tuple[float, tuple[float, float]]]:
    return [(r.forward, r.forward_spread) if r.step is None else (r.step, r.step_spread) for r in line]


def _ratios(line: list[Row]) -> list[tuple[float, tuple[float, float]]]:
    return [
        (r.forward_ratio, r.forward_ratio_spread) if r.step is None else (r.step_ratio, r.step_ratio_spread)
        for r in line
    ]


def _colour(variant: str) -> str:
    return _COLOURS_OF_VARIANTS.get(variant) or method_colour(variant)
