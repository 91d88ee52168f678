"""Pictures of a sensitivity and of a plan, as PNG files."""

import os
from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mona_mm.hosts import LINEAR_SITES
from mona_mm.report.html import save_png
from mona_mm.spt.parts import Part
from mona_mm.spt.plan import STREAM_GROUPS, Plan
from mona_mm.spt.sensitivity import Sensitivity

_BARS, _LINE = '#4477aa', '#cc6677'
_MODULE, _VECTOR, _ABSENT = '#ee8866', '#44aa77', '#e8e8e8'
_BEHIND = '(last)'  # the label of the parts that follow the last block


def plot_sensitivity(sensitivity: Sensitivity, folder: str | os.PathLike) -> tuple[str, str]:
    """Draw the sensitivity by depth and by operation.

    The bars are shares of the sum over all weights. The points, on a logarithmic axis, are the means over the weights
    of a block or of an operation.

    Returns:
        The paths of ``sensitivity_by_depth.png`` and ``sensitivity_by_operation.png`` in ``folder``.
    """
    depth = _sums(sensitivity, lambda part: part.block or _BEHIND)
    operation = _sums(sensitivity, lambda part: _operation(part) if part.block else f'{_operation(part)} {_BEHIND}')
    return (
        _draw_bars(depth, 'block', os.path.join(folder, 'sensitivity_by_depth.png')),
        _draw_bars(operation, 'operation', os.path.join(folder, 'sensitivity_by_operation.png')),
    )


def _operation(part: Part) -> str:
    if part.op in LINEAR_SITES:
        return part.op if part.kind == 'matrix' else f'{part.op} bias'
    name = part.name.removeprefix(f'{part.block}.') if part.block else part.name
    return name.replace('.', ' ')


def _sums(sensitivity: Sensitivity, key: Callable[[Part], str]) -> dict[str, tuple[float, int]]:
    sums: dict[str, tuple[float, int]] = {}
    for part in sensitivity.architecture.parts:
        total, count = sums.get(key(part), (0.0, 0))
        squares = part.of(sensitivity.squares[part.name])
        sums[key(part)] = total + float(squares.double().sum()), count + part.numel
    return sums


def _draw_bars(sums: dict[str, tuple[float, int]], what: str, path: str) -> str:
    labels = list(sums)
    totals = np.array([total for total, _ in sums.values()])
    means = totals / [count for _, count in sums.values()]
    figure = Figure(figsize=(max(6.0, 0.36 * len(labels) + 2), 4.2), layout='constrained')
    axes = figure.add_subplot()
    axes.bar(range(len(labels)), 100 * totals / (totals.sum() or 1), color=_BARS)
    axes.set_ylabel('share of the sum, %', color=_BARS)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_xlabel(what)
    axes.margins(x=0.01)
    twin = axes.twinx()
    twin.plot(range(len(labels)), means, 'o', color=_LINE, markersize=4)
    if (means > 0).any():
        twin.set_yscale('log')
    twin.set_ylabel('mean squared gradient of a weight', color=_LINE)
    axes.set_title(f'Sensitivity by {what}')
    return _save(figure, path)


def plot_plan(plan: Plan, folder: str | os.PathLike) -> str:
    """Draw a plan as a grid of blocks (rows) and operations (columns), coloured by what trains in each cell.

    Returns:
        The path of ``plan.png`` in ``folder``.
    """
    cells = {(part.block or _BEHIND, _operation(part)): part for part in plan.architecture.parts}
    rows = list(dict.fromkeys(block for block, _ in cells))
    streams = [s for s in STREAM_GROUPS if any(s in sites for sites in plan.structured.values())]
    columns = [*streams, *_columns(cells.values())]
    vectors = set(plan.vectors)
    shares = {key: _share(plan, part) for key, part in cells.items()}
    positive = [share for share in shares.values() if share > 0]
    norm = LogNorm(min(positive, default=1e-4) * 0.9, 1)
    colours = ScalarMappable(norm, 'Blues')

    # The size grows with the number of blocks and operations, and a fixed part of it in inches is for the labels, so
    # that a picture of few blocks is not flat and one of many blocks is not squeezed.
    figure = Figure(figsize=(0.42 * len(columns) + 3.4, 0.3 * len(rows) + 2.8), layout='constrained')
    axes = figure.add_subplot()
    for y, block in enumerate(rows):
        for x, column in enumerate(columns):
            part, sites = cells.get((block, column)), plan.structured.get(block, ())
            label = ''
            if column in sites:
                colour, label = _MODULE, plan.structured_config['type'][0]
            elif part is None:
                colour = 'white' if column in streams and block != _BEHIND else _ABSENT
            elif (part.name, part.rows) in vectors:
                colour = _VECTOR
            elif shares[block, column] > 0:
                colour = colours.to_rgba(shares[block, column])
            else:
                colour = 'white'
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor='#bbbbbb', linewidth=0.5))
            axes.text(x + 0.5, y + 0.5, label, ha='center', va='center', fontsize=8)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90, fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.tick_params(length=0)
    figure.colorbar(colours, ax=axes, label='share of single weights that train', fraction=0.05, pad=0.02)
    counts = plan.counts
    legend = [
        Patch(color=_VECTOR, label=f'whole vector ({counts.vectors:,} in all)'),
        Patch(facecolor='white', edgecolor='#bbbbbb', label='frozen'),
    ]
    if len(cells) < len(rows) * (len(columns) - len(streams)):
        legend.append(Patch(color=_ABSENT, label='not there'))
    if plan.structured_config:
        module_type = plan.structured_config['type']
        label = f'{module_type[0]}: {module_type} ({counts.structured:,} in all)'
        legend.insert(0, Patch(color=_MODULE, label=label))
    figure.legend(handles=legend, loc='outside lower center', ncols=2, fontsize=8)
    figure.suptitle(
        f'{plan.architecture.backbone}: {counts.total:,} parameters train, {counts.weights:,} as single weights',
        fontsize=10,
    )
    return _save(figure, os.path.join(folder, 'plan.png'))


def _columns(parts: Iterable[Part]) -> list[str]:
    """The operations of the parts, the matrices first."""
    found = dict.fromkeys(_operation(part) for part in sorted(parts, key=lambda part: part.kind != 'matrix'))
    return sorted(found, key=lambda name: LINEAR_SITES.index(name) if name in LINEAR_SITES else len(LINEAR_SITES))


def _share(plan: Plan, part: Part) -> float:
    indices = plan.weights.get(part.name)
    if indices is None:
        return 0.0
    inside = (indices >= part.offset) & (indices < part.offset + part.numel)
    return int(inside.sum()) / part.numel


def _save(figure: Figure, path: str) -> str:
    save_png(figure, path, dpi=130)
    return path
