"""LoRA: a low-rank addition to linear layers."""

from torch import Tensor, nn

from mona_mm.methods.base import PeftModule, positive, probability
from mona_mm.registry import METHODS


@METHODS.register_module()
class LoRA(PeftModule):
    r"""Low-rank branch in parallel to a linear layer, or to the q, k or v slice of a fused one.

    .. math:: \Delta = \tfrac{\alpha}{r}\, W_\mathrm{up} W_\mathrm{down}\,\mathrm{Dropout}(x)

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out})` parameters. It begins as zero.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; rank, alpha and
    slices of the default as in the published code of Mona (CVPR 2025).

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        rank: :math:`r`.
        alpha: :math:`\alpha`.
        dropout: drop probability of the branch's input.

    Raises:
        ConfigError: if ``rank`` is not a whole number of at least 1, or ``dropout`` is not in [0, 1).
    """

    sites = ('q', 'v')
    hidden = 'rank'

    def __init__(
        self, in_channels: int, out_channels: int, rank: int = 64, alpha: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        positive('LoRA', 'rank', rank)
        probability('LoRA', 'dropout', dropout)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(in_channels, rank, bias=False)
        self.up = nn.Linear(rank, out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``down`` Kaiming-uniform with a = sqrt(5), ``up`` zero."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``(..., in_channels)`` to what is added to the linear's output, ``(..., out_channels)``; that is not read."""
        return self.up(self.down(self.dropout(x))) * self.scale

    @property
    def is_weight_delta(self) -> bool:
        return self.dropout.p == 0

    def delta_weight(self) -> Tensor:
        """What the branch adds to the linear's weight when it is merged, ``(out_channels, in_channels)``."""
        return self.up.weight @ self.down.weight * self.scale
