"""A feature pyramid from the single map of a plain vision transformer."""

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.options import Count, Rule, checked
from mona_mm.registry import MODELS

Scales = Annotated[
    Sequence[float],
    Rule(
        'a list of different scales from 4, 2, 1, 0.5, the largest first',
        lambda scales: list(scales) == sorted(set(scales), reverse=True) and scales and set(scales) <= {4, 2, 1, 0.5},
    ),
]


class ChannelNorm(nn.Module):
    """A LayerNorm over the channels of a map ``(B, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map ``(B, C, H, W)``; the output has the same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet: maps of several strides from the last map of a plain backbone.

    A map of stride ``p`` (the patch size) becomes maps of stride ``p / 4``, ``p / 2``, ``p`` and ``2 p`` by two, one
    and no transposed convolutions and by max pooling, respectively. Each then passes through a 1x1 and a 3x3
    convolution with LayerNorm. The anchors of a detector must have these strides: for a patch size of 14 they are 3.5,
    7, 14 and 28. The backbone pads an image whose sides are not multiples of the patch size at its right and lower
    edges, so coordinates do not change.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3.

    Args:
        in_channels: the number of channels of the backbone's map, or of each of its maps.
        out_channels: the number of channels of every output.
        scales: the size of each output relative to the input map, the largest first.
        num_outs: the number of outputs; those beyond ``scales`` are made from the last one, subsampled by 2 each time.
        init_cfg: the initialisation config of mmengine's BaseModule.

    Raises:
        ConfigError: if ``scales`` holds any other value, or ``num_outs`` is less than the number of scales. ``forward``
            raises it if the number of maps is neither 1 nor the number of scales.
    """

    @checked
    def __init__(
        self,
        in_channels: Count,
        out_channels: Count = 256,
        scales: Scales = (4, 2, 1, 0.5),
        num_outs: Count | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_outs = len(scales) if num_outs is None else num_outs
        if self.num_outs < len(scales):
            raise ConfigError(
                f'SimpleFeaturePyramid: num_outs={num_outs} is below the number of scales, {len(scales)}.'
            )
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid, finest map first, from one map ``(B, C, H, W)`` for all scales or from one for each."""
        if len(maps) not in (1, len(self.levels)):
            raise ConfigError(
                f'SimpleFeaturePyramid was given {len(maps)} maps; it makes {len(self.levels)} scales of one, or of '
                'one each. Set out_indices of the backbone.'
            )
        maps = maps if len(maps) > 1 else list(maps) * len(self.levels)
        outs = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
    if scale == 4:
        half, quarter = channels // 2, channels // 4
        layers = [
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
        channels = quarter
    elif scale == 2:
        layers = [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)]
        channels //= 2
    else:
        layers = [nn.Identity() if scale == 1 else nn.MaxPool2d(2, stride=2)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, out_channels, 1, bias=False),
        ChannelNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        ChannelNorm(out_channels),
    )
