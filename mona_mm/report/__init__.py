"""Pages that need no other file: their style, tables and charts, and what the page of a run shows."""

from mona_mm.report.evaluation import Evaluation, Evaluator, evaluator_for
from mona_mm.report.run import RunState, write_run

__all__ = ['Evaluation', 'Evaluator', 'RunState', 'evaluator_for', 'write_run']
