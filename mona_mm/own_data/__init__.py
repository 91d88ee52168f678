"""Data in a folder of one's own: its layout recognised, read, checked, split, and written as the libraries read it."""

from mona_mm.own_data.findings import Finding, Findings, short
from mona_mm.own_data.read import LAYOUTS, TASKS, read_folder, task_of_folder
from mona_mm.own_data.samples import Instance, OwnData, Sample
from mona_mm.own_data.splits import complete_splits, note_duplicates
from mona_mm.own_data.write import as_maps, palette, write_data

__all__ = [
    'LAYOUTS',
    'TASKS',
    'Finding',
    'Findings',
    'Instance',
    'OwnData',
    'Sample',
    'as_maps',
    'complete_splits',
    'note_duplicates',
    'palette',
    'read_folder',
    'short',
    'task_of_folder',
    'write_data',
]
