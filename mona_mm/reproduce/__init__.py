"""The published tables, and runs beside them: find runs, recognise their cells, compare, print."""

from mona_mm.reproduce.published import published_results
from mona_mm.reproduce.runs import Run, collect, is_results, load_results, save_results
from mona_mm.reproduce.tables import FORMATS, TABLES, build_tables, plan, render, write_text

__all__ = [
    'FORMATS',
    'TABLES',
    'Run',
    'build_tables',
    'collect',
    'is_results',
    'load_results',
    'plan',
    'published_results',
    'render',
    'save_results',
    'write_text',
]
