"""LoRA: a low-rank addition to linear layers."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import StockLinear
from mona_mm.methods.base import LinearModule
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS

Init = Literal['zero', 'trunc_normal']
"""The initialisations of :func:`reset_projections`."""


@METHODS.register_module()
class LoRA(LinearModule):
    r"""Low-rank branch in parallel to a linear layer, or to the q, k or v slice of a fused one.

    .. math:: \Delta = \tfrac{\alpha}{r}\, W_\mathrm{up} W_\mathrm{down}\,\mathrm{Dropout}(x)

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out})` parameters. By default it starts at zero. Beside a
    convolution of :math:`k \times k`, :math:`W_\mathrm{down}` is one like it with :math:`r` output channels,
    :math:`W_\mathrm{up}` a :math:`1 \times 1` convolution, and :math:`m_\mathrm{in}` is :math:`k^2` times its channels.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; rank, alpha and
    slices of the default as in the published code of Mona (CVPR 2025).

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        rank: rank :math:`r` of the branch.
        alpha: factor :math:`\alpha`, which is divided by the rank.
        dropout: drop probability of the branch's input.
        drop_path: probability of dropping the whole branch, drawn for each element of the first dimension: for an
            image, or for a window in the attention of a Swin.
        init: ``'zero'``, or ``'trunc_normal'`` of std 0.02 for both projections, as in SPT's published code.

    Raises:
        ConfigError: if ``rank`` is not a whole number of at least 1, ``dropout`` or ``drop_path`` is not in [0, 1), or
            ``init`` is not one of the two.
    """

    sites = ('q', 'v')

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: Width = 64,
        alpha: float = 1.0,
        dropout: Probability = 0.0,
        drop_path: Probability = 0.0,
        init: Init = 'zero',
    ) -> None:
        from mmcv.cnn.bricks.drop import DropPath  # imported here, since it takes a second

        super().__init__()
        self.init = init
        self.scale = float(alpha) / rank
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.down = nn.Linear(in_channels, rank, bias=False)
        self.up = nn.Linear(rank, out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise ``down`` Kaiming-uniform with a = sqrt(5) and ``up`` with zeros, or both as ``init`` says."""
        reset_projections(self.down, self.up, self.init)

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(..., out_channels)`` to the linear's output for ``x (..., in_channels)``."""
        return self.drop_path(self.up(self.scale * self.down(self.dropout(x))))  # scaled at its narrowest

    def convolve(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(B, out_channels, H', W')`` to a convolution's output for ``x (B, C, H, W)``."""
        narrow = self.scale * linear.convolve(self.dropout(x), _weight(self.down))
        return self.drop_path(F.conv2d(narrow, _weight(self.up)[:, :, None, None]))

    @property
    def is_weight_delta(self) -> bool:
        """Whether the branch can be merged, which is the case if nothing is dropped at random."""
        return self.dropout.p == 0 and self.drop_path.drop_prob == 0

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Compute the branch as an addition ``(out_channels, in_channels)`` to the linear's weight."""
        return self.scale * (_weight(self.up) @ _weight(self.down))


def _weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, which may have been quantized dynamically."""
    return linear.weight().dequantize() if callable(linear.weight) else linear.weight


def reset_projections(down: nn.Linear, up: nn.Linear, init: Init) -> None:
    """Initialise the two projections of a branch, with biases of zero.

    Args:
        down: the projection to the narrow width.
        up: the projection from the narrow width.
        init: ``'zero'`` for ``down`` Kaiming-uniform with a = sqrt(5) and ``up`` zero, so that the branch is zero;
            ``'trunc_normal'`` for a truncated normal of std 0.02 in both.
    """
    for linear in (down, up):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if init == 'zero':
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(up.weight)
    else:
        nn.init.trunc_normal_(down.weight, std=0.02)
        nn.init.trunc_normal_(up.weight, std=0.02)
