"""Picture of cost against image size, as a PNG file."""

import os
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mona_mm.benchmark.backbone import Row

_COLOURS = (
    '#4477aa',
    '#cc6677',
    '#44aa77',
    '#ee8866',
    '#aa4499',
    '#999933',
    '#88ccee',
    '#777777',
    '#332288',
    '#000000',
)


def plot_cost(rows: Sequence[Row], path: str) -> None:
    """Time and memory of a step (of a forward, for inference) against the side of a square of as many pixels.

    One row of panels for every backbone, one line for every way; bars are quartiles.

    Args:
        rows: of :mod:`mona_mm.benchmark.backbone` or :mod:`mona_mm.benchmark.detector`.
        path: of the PNG file; its folder is made.
    """
    panels = list(dict.fromkeys((row.suite, row.arch) for row in rows))
    ways = list(dict.fromkeys(row.way for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(panels)), layout='constrained')
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (suite, arch), (left, right) in zip(panels, axes, strict=True):
        for way in ways:
            line = sorted(
                (r for r in rows if (r.suite, r.arch, r.way) == (suite, arch, way)), key=lambda r: r.size[0] * r.size[1]
            )
            sides = [(r.size[0] * r.size[1]) ** 0.5 for r in line]
            times = [(r.forward, r.forward_spread) if r.step is None else (r.step, r.step_spread) for r in line]
            bars = [[t - s[0] for t, s in times], [s[1] - t for t, s in times]]
            turn, colour = divmod(ways.index(way), len(_COLOURS))
            style = dict(color=_COLOURS[colour], linestyle=('-', '--')[turn % 2], marker='o', markersize=4, label=way)
            left.errorbar(sides, [t for t, _ in times], yerr=bars, capsize=2, **style)
            right.plot(sides, [r.memory for r in line], **style)
        what = 'forward, inference' if line[0].step is None else 'training step'
        first = line[0]
        left.set_title(f'Swin-{arch.upper()}, {suite}: {what}, batch {first.batch}, {first.dtype}')
        right.set_title('memory')
        left.set_ylabel('ms')
        right.set_ylabel('MiB')
        for axis in (left, right):
            axis.set_xlabel('side of the image, pixels (of a square of its area)')
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        right.legend(fontsize='small', loc='center left', bbox_to_anchor=(1.02, 0.5))
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=130)
