"""Hooks for mmengine's Runner, one in each file."""

from mona_mm.hooks.checkpoint import SafeCheckpointHook
from mona_mm.hooks.clock import ClockHook
from mona_mm.hooks.delta_checkpoint import DeltaCheckpointHook
from mona_mm.hooks.finite_loss import FiniteLossHook
from mona_mm.hooks.iteration_seed import IterationSeedHook
from mona_mm.hooks.load_check import LoadCheckHook
from mona_mm.hooks.param_freeze import ParamFreezeHook
from mona_mm.hooks.preemption import PreemptionHook
from mona_mm.hooks.resumption import ResumptionHook
from mona_mm.hooks.run_report import RunReportHook
from mona_mm.hooks.work_dir import WorkDirHook

__all__ = [
    'ClockHook',
    'DeltaCheckpointHook',
    'FiniteLossHook',
    'IterationSeedHook',
    'LoadCheckHook',
    'ParamFreezeHook',
    'PreemptionHook',
    'ResumptionHook',
    'RunReportHook',
    'SafeCheckpointHook',
    'WorkDirHook',
]
