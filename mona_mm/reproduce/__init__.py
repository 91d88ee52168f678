"""Published tables with the runs that reproduce them, and tables whose every cell is run here."""

from mona_mm.reproduce.comparison import (
    DEVICES,
    MINI,
    Cell,
    ComparedTask,
    Comparison,
    Composer,
    check_material,
)
from mona_mm.reproduce.full_size import TABLES, find_comparison
from mona_mm.reproduce.own_table import OWN, SCORES, OwnTable, extend_own_table, quick_config, read_own_table
from mona_mm.reproduce.page import write_page
from mona_mm.reproduce.pictures import draw_pictures
from mona_mm.reproduce.published import published_results
from mona_mm.reproduce.queue import Queue
from mona_mm.reproduce.records import RUNS, read_records, render_comparison
from mona_mm.reproduce.runs import Run, collect, is_results, load_results, save_results
from mona_mm.reproduce.tables import FORMATS, build_tables, plan, render, table_names, write_text
from mona_mm.reproduce.tasks import Heading, Metric, Task, on_type, register_task

__all__ = [
    'DEVICES',
    'FORMATS',
    'MINI',
    'OWN',
    'RUNS',
    'SCORES',
    'TABLES',
    'Cell',
    'ComparedTask',
    'Comparison',
    'Composer',
    'Heading',
    'Metric',
    'OwnTable',
    'Queue',
    'Run',
    'Task',
    'build_tables',
    'check_material',
    'collect',
    'draw_pictures',
    'extend_own_table',
    'find_comparison',
    'is_results',
    'load_results',
    'on_type',
    'plan',
    'published_results',
    'quick_config',
    'read_own_table',
    'read_records',
    'register_task',
    'render',
    'render_comparison',
    'save_results',
    'table_names',
    'write_page',
    'write_text',
]
