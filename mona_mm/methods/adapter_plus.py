"""Adapter+: a bottleneck with a learned scale of every channel, once in a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.nn.tracing import is_hooked
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS

_STD = 0.01  # of the initial weights, which lie within two standard deviations


@METHODS.register_module()
class AdapterPlus(StreamModule):
    r"""Bottleneck with a learned scale :math:`s` of every channel, once in a block, after the FFN residual.

    .. math:: y = x + s \odot \mathrm{DropPath}(\mathrm{up}(\mathrm{GELU}(\mathrm{down}(x))))

    A module has :math:`2mn + 2m + n` parameters for :math:`m` channels and bottleneck :math:`n`: the two projections,
    their biases and the scale, which begins at one. It does not start as the identity, but close to it.

    Source: Steitz and Roth, "Adapters Strike Back", CVPR 2024: its adapter behind the block ("Post-Adapter") with the
    scale of every channel and Houlsby's initial values; and its published code, which truncates them at two standard
    deviations. The scale is applied to the weights of the last projection, which computes the same.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width.
        drop_path: probability of dropping the whole branch, drawn for each image.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, or ``drop_path`` is not in [0, 1).
    """

    sites = ('post_ffn',)
    needs_grid = False

    @checked
    def __init__(self, channels: int, bottleneck: Width = 8, drop_path: Probability = 0.1) -> None:
        from mmcv.cnn.bricks.drop import DropPath  # imported here, since it takes a second

        super().__init__()
        self.down = nn.Linear(channels, bottleneck)
        self.act = nn.GELU()
        self.up = nn.Linear(bottleneck, channels)
        self.scale = nn.Parameter(torch.empty(channels))
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both projections with a truncated normal of std 0.01, their biases with zeros, the scale with
        ones."""
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``."""
        if self.drop_path.training and self.drop_path.drop_prob:
            return x + self.drop_path(self._branch(x))  # drawn for each element of the first dimension
        return self.residual(x, self._branch)

    def _branch(self, x: Tensor) -> Tensor:
        hidden, up = self.act(self.down(x)), self.up
        if not self.fast or type(up) is not nn.Linear or is_hooked(up):  # a quantized layer has no weight to scale
            return self.scale * up(hidden)
        # The gradient of the scale then needs no tensor as wide as the tokens to be kept.
        return F.linear(hidden, self.scale[:, None] * up.weight, self.scale * up.bias)
