"""Learning-rate schedules that mmengine lacks."""

import math
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.optim.scheduler.param_scheduler import INF

from mona_mm.options import Ratio, checked
from mona_mm.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    r"""A cosine from the first step to the last, whose first steps are replaced by a linear warm-up.

    .. math::
        \eta_t = \eta \cdot \begin{cases}
            s + (1 - s)\, t / w & t < w \\
            e + (1 - e)\,(1 + \cos(\pi t / T)) / 2 & \text{else}
        \end{cases}

    with :math:`t` steps of :math:`T` done. mmengine's schedulers compute a rate from the one before, so its cosine can
    be multiplied by a warm-up or begin after it, which here is up to 2% and 17% off.

    Source: timm's ``CosineLRScheduler``, which SPT's published code runs by epoch (and there one epoch later: each of
    the first two epochs has the first rate).

    Args:
        optimizer: a torch optimizer or mmengine's wrapper of one.
        warmup: :math:`w`, in epochs (iterations with ``by_epoch=False``).
        start_ratio: :math:`s`, the first rate's part of the peak.
        end_ratio: :math:`e`, the part that the cosine falls to.
        begin: as ``end``, ``last_step``, ``by_epoch`` and ``verbose`` of mmengine's schedulers.
        end: by default that of the training.
        last_step: of a run that is resumed.
        by_epoch: whether a step is an epoch.
        verbose: whether every rate is printed.

    Raises:
        ConfigError: if ``warmup`` or a ratio is not a number of at least 0, or another option is of a wrong type.
        UnknownOptionError: if there is no such option.
    """

    @checked
    def __init__(
        self,
        optimizer: Any,
        warmup: Ratio,
        start_ratio: Ratio,
        end_ratio: Ratio,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        self.warmup = warmup
        self.start_ratio = start_ratio
        self.end_ratio = end_ratio
        super().__init__(optimizer, 'lr', begin, end, last_step, by_epoch, verbose)

    def _get_value(self) -> list[float]:
        """The rates of the optimizer's groups after ``last_step`` steps."""
        t = self.last_step
        if t < self.warmup:
            factor = self.start_ratio + (1 - self.start_ratio) * t / self.warmup
        else:
            cosine = (1 + math.cos(math.pi * t / (self.end - self.begin))) / 2
            factor = self.end_ratio + (1 - self.end_ratio) * cosine
        return [base * factor for base in self.base_values]
