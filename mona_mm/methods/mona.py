"""Mona: the multi-cognitive visual adapter."""

import torch
from torch import Tensor, nn

from mona_mm.methods.base import PeftModule, positive, probability
from mona_mm.registry import METHODS


@METHODS.register_module()
class Mona(PeftModule):
    r"""Multi-kernel convolutional adapter, one after the attention residual and one after the FFN residual.

    .. math::
        s &= \gamma \odot \mathrm{LN}(x) + \gamma_x \odot x \\
        p &= W_\mathrm{down} s + b_\mathrm{down} \\
        q &= \tfrac13 \textstyle\sum_{k \in \{3,5,7\}} \mathrm{DWConv}_k(p) + p \\
        r &= \mathrm{Conv}_{1\times1}(q) + q \\
        y &= x + W_\mathrm{up}\,\mathrm{Dropout}(\mathrm{GELU}(r)) + b_\mathrm{up}

    :math:`\gamma` and :math:`\gamma_x` are vectors of length ``channels``. A module has
    :math:`(2n + 5)m + n^2 + 88n` parameters for :math:`m` channels and bottleneck :math:`n`; the paper's
    :math:`(2n + 3)m + n^2 + 84n + 2` counts scalar scales and convolutions without bias, which its code does not use.

    Source: Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
    CVPR 2025, section 3.3, and ``mona.py`` of its published code; where the two differ the code is followed.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width of the adapter.
        dropout: drop probability after the GELU.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, or ``dropout`` is not in [0, 1).
    """

    sites = ('post_attn', 'post_ffn')
    kernel_sizes = (3, 5, 7)

    def __init__(self, channels: int, bottleneck: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        positive('Mona', 'bottleneck', bottleneck)
        probability('Mona', 'dropout', dropout)
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.empty(channels))
        self.gammax = nn.Parameter(torch.empty(channels))
        self.down = nn.Linear(channels, bottleneck)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(bottleneck, bottleneck, k, padding=k // 2, groups=bottleneck) for k in self.kernel_sizes
        )
        self.pointwise = nn.Conv2d(bottleneck, bottleneck, 1)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the published code: its pass over the Swin leaves the linears at std 0.02, not at zero."""
        self.norm.reset_parameters()
        nn.init.constant_(self.gamma, 1e-6)
        nn.init.ones_(self.gammax)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for conv in (*self.depthwise, self.pointwise):
            conv.reset_parameters()

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """``(B, N, C) -> (B, N, C)``. Class and register tokens, which lie before the grid's, skip the convolutions."""
        p = self.down(self.norm(x) * self.gamma + x * self.gammax)
        extra = x.shape[1] - hw[0] * hw[1]
        if extra:
            p = torch.cat((p[:, :extra], self._mix(p[:, extra:], hw)), dim=1)
        else:
            p = self._mix(p, hw)
        return x + self.up(self.dropout(self.act(p)))

    def _mix(self, p: Tensor, hw: tuple[int, int]) -> Tensor:
        """The spatial part, ``(B, H*W, n) -> (B, H*W, n)``."""
        grid = p.transpose(1, 2).unflatten(2, hw)  # (B, n, H, W)
        grid = sum(conv(grid) for conv in self.depthwise) / len(self.depthwise) + grid
        grid = self.pointwise(grid) + grid
        return grid.flatten(2).transpose(1, 2)
