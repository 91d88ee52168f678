"""Strategies of mmengine's FlexibleRunner, which say how processes share the work and the weights of one model."""

from mona_mm.strategies.deepspeed import DeepSpeedStrategy
from mona_mm.strategies.replicated import DDPStrategy
from mona_mm.strategies.sharded import FSDP2Strategy, FSDPStrategy

__all__ = ['DDPStrategy', 'DeepSpeedStrategy', 'FSDP2Strategy', 'FSDPStrategy']
