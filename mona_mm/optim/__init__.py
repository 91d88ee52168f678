"""An optimizer constructor and a schedule that mmengine lacks."""

from mona_mm.optim.constructor import PeftOptimWrapperConstructor
from mona_mm.optim.schedule import WarmupCosineLR

__all__ = ['PeftOptimWrapperConstructor', 'WarmupCosineLR']
