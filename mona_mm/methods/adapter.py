"""Adapter: a bottleneck on the output of both branches."""

from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS


@METHODS.register_module()
class Adapter(StreamModule):
    r"""Bottleneck with a residual, on the output of the attention and of the FFN, before DropPath.

    .. math:: y = x + \mathrm{up}(\mathrm{Dropout}(\mathrm{GELU}(\mathrm{down}(x))))

    A module has :math:`2mn + m + n` parameters for :math:`m` channels and bottleneck :math:`n`. It does not start as
    the identity, unless by ``zero_init``: the published code initialises both projections with a truncated normal.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, as the baseline in the
    published code of Mona (CVPR 2025).

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width.
        dropout: drop probability after the GELU.
        zero_init: begin as the identity, with zeros in the up projection, in place of the published start.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, or ``dropout`` is not in [0, 1).
    """

    sites = ('attn_branch', 'ffn_branch')
    needs_grid = False

    @checked
    def __init__(
        self, channels: int, bottleneck: Width = 64, dropout: Probability = 0.1, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.down = nn.Linear(channels, bottleneck)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both projections with a truncated normal of std 0.02, and their biases with zeros."""
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``."""
        return self.residual(x, lambda x: self.up(self.dropout(self.act(self.down(x)))))
