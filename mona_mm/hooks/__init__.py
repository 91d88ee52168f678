"""Hooks for mmengine's Runner, one in each file."""

from mona_mm.hooks.checkpoint import SafeCheckpointHook
from mona_mm.hooks.delta_checkpoint import DeltaCheckpointHook
from mona_mm.hooks.iteration_seed import IterationSeedHook
from mona_mm.hooks.load_check import LoadCheckHook
from mona_mm.hooks.param_freeze import ParamFreezeHook
from mona_mm.hooks.run_report import RunReportHook

__all__ = [
    'DeltaCheckpointHook',
    'IterationSeedHook',
    'LoadCheckHook',
    'ParamFreezeHook',
    'RunReportHook',
    'SafeCheckpointHook',
]
