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

    after :math:`t` of :math:`T` steps. mmengine's schedulers compute each rate from the previous one, so its cosine can
    only be multiplied by a warm-up or begin after it, which differs from this by up to 2% and 17%.

    Source: timm's ``CosineLRScheduler``, which SPT's published code steps once an epoch (and one epoch later: both of
    the first two epochs have the first rate).

    Args:
        optimizer: a torch optimizer or mmengine's wrapper of one.
        warmup: the length :math:`w` of the warm-up in epochs (or iterations, with ``by_epoch=False``).
        start_ratio: the first rate :math:`s`, as a share of the peak.
        end_ratio: the rate :math:`e` at the end of the cosine, as a share of the peak.
        begin: the step at which the schedule begins.
        end: the step at which it ends; by default the end of training.
        last_step: the last step of the run that is resumed.
        by_epoch: whether a step is an epoch.
        verbose: whether every rate is printed.

    Raises:
        ConfigError: if ``warmup`` or a ratio is not a number of at least 0, or another option is of a wrong type.
        UnknownOptionError: if an option does not exist.
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
