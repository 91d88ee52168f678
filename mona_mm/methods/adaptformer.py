"""AdaptFormer: a scaled bottleneck beside the FFN."""

from torch import Tensor

from mona_mm.hosts import Grid
from mona_mm.methods.adapter import Adapter
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS


@METHODS.register_module()
class AdaptFormer(Adapter):
    r"""Scaled bottleneck of the un-normalised residual, added beside the FFN after DropPath.

    .. math:: \Delta = s\,\mathrm{up}(\mathrm{Dropout}(\mathrm{GELU}(\mathrm{down}(x))))

    Initial values and parameter count are those of :class:`Adapter`.

    Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, as
    the baseline in the published code of Mona (CVPR 2025), which leaves out the paper's LayerNorm and ReLU.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width.
        dropout: drop probability after the GELU.
        scale: factor :math:`s` on the branch.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, or ``dropout`` is not in [0, 1).
    """

    sites = ('parallel_ffn',)

    @checked
    def __init__(self, channels: int, bottleneck: Width = 64, dropout: Probability = 0.1, scale: float = 0.1) -> None:
        super().__init__(channels, bottleneck, dropout)
        self.scale = float(scale)  # a Python int may be too large for torch's operations

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Compute the addition ``(B, N, C)`` for tokens ``(B, N, C)``."""
        return self.scale * self.up(self.dropout(self.act(self.down(x))))
