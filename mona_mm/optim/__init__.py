"""What mmengine's optimizers and schedules lack."""

from mona_mm.optim.constructor import PeftOptimWrapperConstructor
from mona_mm.optim.schedule import WarmupCosineLR

__all__ = ['PeftOptimWrapperConstructor', 'WarmupCosineLR']
