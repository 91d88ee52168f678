"""SPT's structured modules: what tunes a matrix that is too sensitive for single weights.

A module is at one linear layer, or at the q, k or v slice of a fused one. It is given the input of the linear and its
(slice of the) output, and returns what is to be added to that output.

Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and the published
code; where the two differ the code is followed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mona_mm.hosts import LINEAR_SITES, StockLinear
from mona_mm.methods.base import NOT_OPTIONS, LinearModule
from mona_mm.methods.lora import Init, LoRA, reset_projections
from mona_mm.methods.mona import Mona
from mona_mm.options import Probability, Width, check_options, checked


class StructuredLoRA(LoRA):
    r"""LoRA of scale 1 in parallel to a linear layer.

    .. math:: y + \mathrm{DropPath}(W_\mathrm{up} W_\mathrm{down}\,\mathrm{Dropout}(x))

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out})` parameters, and merges by ``delta_weight``.

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        site: one of :data:`mona_mm.hosts.LINEAR_SITES`; at ``proj`` there is no dropout.
        rank: :math:`r`.
        dropout: drop probability of the branch's input.
        drop_path: probability of dropping the branch, for each element of the first dimension: for an image, and for a
            window in the attention of a Swin.
        init: ``'zero'``, the identity at the start, or ``'trunc_normal'`` of std 0.02, as published.

    Raises:
        ConfigError: see :class:`mona_mm.methods.LoRA`.
    """

    sites = LINEAR_SITES

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        site: str,
        rank: Width = 8,
        dropout: Probability = 0.1,
        drop_path: Probability = 0.1,
        init: Init = 'zero',
    ) -> None:
        super().__init__(in_channels, out_channels, rank, rank, 0.0 if site == 'proj' else dropout, drop_path, init)


class StructuredAdapter(LinearModule):
    r"""Adapter on the output of a linear layer; at ``proj`` alone in parallel to it, on its input.

    .. math::
        y + \mathrm{DropPath}(\mathrm{up}(\mathrm{GELU}(\mathrm{down}(\mathrm{Dropout}(z))))), \qquad
        z = x \text{ at } \mathtt{proj}, \text{ else } y

    A module has :math:`r (m + m_\mathrm{out}) + r + m_\mathrm{out}` parameters for an input of width :math:`m`. It
    cannot be merged.

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        site: one of :data:`mona_mm.hosts.LINEAR_SITES`; at ``proj`` there is no dropout.
        bottleneck: :math:`r`, the hidden width.
        dropout: drop probability of the branch's input.
        drop_path: probability of dropping the branch, for each element of the first dimension: for an image, and for a
            window in the attention of a Swin.
        init: ``'zero'``, the identity at the start, or ``'trunc_normal'`` of std 0.02, as published. Biases begin at
            zero.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, ``dropout`` or ``drop_path`` is not in
            [0, 1), or ``init`` is another.
    """

    sites = LINEAR_SITES

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        site: str,
        bottleneck: Width = 8,
        dropout: Probability = 0.1,
        drop_path: Probability = 0.1,
        init: Init = 'zero',
    ) -> None:
        from mmcv.cnn.bricks.drop import DropPath  # here, because it takes a second to import

        super().__init__()
        self.init = init
        self.parallel = site == 'proj'
        self.dropout = nn.Dropout(0.0 if self.parallel else dropout)
        self.down = nn.Linear(in_channels if self.parallel else out_channels, bottleneck)
        self.act = nn.GELU()
        self.up = nn.Linear(bottleneck, out_channels)
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See ``init``."""
        reset_projections(self.down, self.up, self.init)

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """``x (..., in_channels)`` and ``out (..., out_channels)`` to what is added to ``out``."""
        z = x if self.parallel else out
        return self.drop_path(self.up(self.act(self.down(self.dropout(z)))))


STRUCTURED = {'LoRA': StructuredLoRA, 'Adapter': StructuredAdapter, 'Mona': Mona}
"""The classes of structured modules by the ``type`` in a config."""


def build_structured(
    config: Mapping[str, Any], widths: tuple[int, ...], site: str, is_called: bool = True
) -> nn.Module:
    """A structured module as it is at a site.

    Args:
        config: of the module, with its ``type``: ``'LoRA'``, ``'Adapter'``, or ``'Mona'`` at a stream site.
        widths: ``(channels,)`` at a stream site, ``(in_channels, out_channels)`` at a linear site.
        site: see :mod:`mona_mm.hosts`.
        is_called: whether the host calls the linear layer of the site as a module.

    Raises:
        ConfigError: if an option's value cannot be.
        UnknownOptionError: if it has no such option.
    """
    options = dict(config)
    kind = options.pop('type')
    check_options(f'structured {kind}', STRUCTURED[kind], options, given=NOT_OPTIONS)
    if site in LINEAR_SITES:
        options['site'] = site  # since `proj` has no dropout
        if not is_called:  # what only adds to a weight can drop nothing
            options |= dict(dropout=0.0, drop_path=0.0)
    return STRUCTURED[kind](*widths, **options)
