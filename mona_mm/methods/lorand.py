"""LoRand: an adapter with low-rank synthesised projections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.options import Width, checked
from mona_mm.registry import METHODS


class LoRandLinear(nn.Module):
    r"""Linear layer whose weight is a sum of low-rank products.

    .. math:: W = \Big(\sum_{i} A_i G_i B_i\Big)^\top

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        inner: rank of one product.
        branches: number of products.
    """

    def __init__(self, in_channels: int, out_channels: int, inner: int, branches: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(branches, in_channels, inner))
        self.g = nn.Parameter(torch.empty(branches, inner, inner))
        self.b = nn.Parameter(torch.empty(branches, inner, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every factor Kaiming-uniform with a = sqrt(5), and the bias uniform in +-1/sqrt(in_channels)."""
        for stack in (self.a, self.g, self.b):
            for factor in stack:
                nn.init.kaiming_uniform_(factor, a=5**0.5)
        bound = self.a.shape[1] ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_channels)`` to ``(..., out_channels)``."""
        return F.linear(x, (self.a @ self.g @ self.b).sum(0).T, self.bias)


@METHODS.register_module()
class LoRand(StreamModule):
    r"""Adapter of :class:`LoRandLinear` projections, on the output of the attention and of the FFN after DropPath.

    .. math:: y = x + \mathrm{up}(\mathrm{GELU}(\mathrm{down}(x)))

    The hidden width is half the stream's.

    Source: Yin et al., "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions", CVPR 2023, section
    3.2, in the authors' later release.

    Args:
        channels: width ``C`` of the token stream.
        inner: rank of one product; 16 is the variant of the Mona paper's tables, 8 the smaller one.
        branches: number of products that are summed to one weight.
        zero_init: begin as the identity, with zeros in the last factor and the bias of the up projection, in place of
            the published start, which is random and perturbs the features of a plain ViT (see docs/which_method.md).

    Raises:
        ConfigError: if ``inner`` or ``branches`` is not a whole number of at least 1.
    """

    sites = ('attn_out', 'ffn_out')
    needs_grid = False

    @checked
    def __init__(self, channels: int, inner: Width = 16, branches: Width = 4, zero_init: bool = False) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.down = LoRandLinear(channels, channels // 2, inner, branches)
        self.act = nn.GELU()
        self.up = LoRandLinear(channels // 2, channels, inner, branches)
        if zero_init:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both projections, see :meth:`LoRandLinear.reset_parameters`."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.up.b)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``."""
        return self.residual(x, lambda x: self.up(self.act(self.down(x))))
