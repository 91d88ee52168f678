"""The published tables, and runs beside them: find runs, recognise their cells, compare, print."""

from mona_mm.reproduce.published import published_results
from mona_mm.reproduce.runs import Run, collect, is_results, load_results, save_results
from mona_mm.reproduce.tables import FORMATS, build_tables, plan, render, table_names, write_text
from mona_mm.reproduce.tasks import Heading, Metric, Task, on_type, register_task

__all__ = [
    'FORMATS',
    'Heading',
    'Metric',
    'Run',
    'Task',
    'build_tables',
    'collect',
    'is_results',
    'load_results',
    'on_type',
    'plan',
    'published_results',
    'register_task',
    'render',
    'save_results',
    'table_names',
    'write_text',
]
