"""A training step by the faster forms (``fast=True``) beside one by the plain forms (``fast=False``), for each method.

``fast=True`` may take a plain form itself, where that is faster, and should never be slower than ``fast=False`` by
more than the share :data:`TOLERATED`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mona_mm.benchmark.backbone import ARCHS, DEPLOYED, LABELS, VARIANTS, Case, base_config, build_backbone
from mona_mm.benchmark.timing import cells, heading, return_freed_memory, take_turns, times, with_spread

TOLERATED = 0.03

_FIXED_FORMS = {'stock', 'published_mona', *DEPLOYED, 'mona_folded'}
"""Variants that have no plain form beside their own."""


@dataclass(frozen=True)
class Row:
    """The figures of one method.

    Times of a step are in milliseconds, memory that the forward keeps in MiB; a spread is the first and the third
    quartile. The ratio is that of the faster forms to the plain ones in the same round.
    """

    arch: str
    size: tuple[int, int]
    batch: int
    dtype: str
    variant: str
    plain: float
    plain_spread: tuple[float, float]
    step: float
    step_spread: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    plain_kept: float
    kept: float


def run(
    device: str = 'cpu',
    repeats: int = 9,
    archs: Sequence[str] = ('t', 'dinov2_s'),
    sizes: Sequence[tuple[int, int]] = ((224, 224),),
    methods: Sequence[str] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
    bases: dict[str, dict[str, Any]] = ARCHS,
) -> Iterator[Row]:
    """Measure every method on every backbone at every size, and yield a row as soon as it is measured.

    The arguments are those of :func:`mona_mm.benchmark.backbone.run`.
    """
    variants = [variant for variant in methods or VARIANTS if variant not in _FIXED_FORMS]
    for arch in archs:
        base = base_config(bases[arch])
        for variant in variants:
            cases = {}
            for fast in (False, True):
                torch.manual_seed(0)
                cases[fast] = Case(build_backbone(variant, base, fast), None, device, dtype)
            for size in sizes:
                images = torch.randn(batch, 3, *size, device=device)
                for case in cases.values():
                    case.outputs = lambda model, images=images: model(images)
                return_freed_memory()
                taken = take_turns({fast: partial(case.seconds, False, clock) for fast, case in cases.items()}, repeats)
                plain, fast = ([sum(parts) for parts in taken[fast]] for fast in (False, True))
                step = times(fast, plain)
                yield Row(
                    *(arch, tuple(size), batch, str(dtype).removeprefix('torch.'), variant),
                    *times(plain, plain)[:2],
                    *step,
                    plain_kept=cases[False].kept() / 2**20,
                    kept=cases[True].kept() / 2**20,
                )
            del cases, case


def header(row: Row) -> str:
    """The head of the table in Markdown."""
    columns = ('backbone', 'image', 'batch', 'variant', 'plain, ms', 'fast, ms', 'ratio', 'kept, MiB: plain', 'fast')
    return heading(columns)


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    name = LABELS.get(row.arch, row.arch)
    image = f'{row.size[0]}x{row.size[1]}'
    step = with_spread(row.step, row.step_spread), with_spread(row.ratio, row.ratio_spread)
    plain = with_spread(row.plain, row.plain_spread)
    return cells((name, image, str(row.batch), row.variant, plain, *step, f'{row.plain_kept:.0f}', f'{row.kept:.0f}'))


def targets(rows: Sequence[Row]) -> list[str]:
    """The cases in which the faster forms are slower than the plain ones by more than the tolerated share."""
    slower = [row for row in rows if row.ratio > 1 + TOLERATED]
    return [
        f'fast / plain: {len(rows)} cases, {len(slower)} above {1 + TOLERATED:.2f}'
        + ''.join(f'\n  {row.arch} {row.size} batch {row.batch} {row.variant}: {row.ratio:.2f}' for row in slower)
    ]
