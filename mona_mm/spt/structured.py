"""The structured modules of SPT, which tune the matrices that are too sensitive for single weights.

A module sits at one linear layer, or at the q, k or v slice of a fused one. It takes the input of the layer and its
output (or the slice of it), and returns what is added to that output.

Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and the published
code; where the two differ, this module follows the code.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mona_mm.hosts import LINEAR_SITES, StockLinear
from mona_mm.methods.adapter_plus import AdapterPlus
from mona_mm.methods.base import NOT_OPTIONS, LinearModule, StreamModule
from mona_mm.methods.dora import DoRA
from mona_mm.methods.lora import Init, InitOrPart, LoRA, reset_projections
from mona_mm.methods.mona import Mona
from mona_mm.options import Probability, Width, check_options, checked


class StructuredLoRA(LoRA):
    r"""A LoRA of scale 1, or with ``use_rslora`` of scale :math:`\sqrt{r}`, in parallel to a linear layer.

    .. math:: y + \mathrm{DropPath}(W_\mathrm{up} W_\mathrm{down}\,\mathrm{Dropout}(x))

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out})` parameters. Its ``delta_weight`` merges it into the layer.

    Args:
        in_channels: the width of the layer's input.
        out_channels: the width of its output, or of the slice.
        site: the site of the layer, one of :data:`mona_mm.hosts.LINEAR_SITES`; at ``proj`` there is no dropout.
        rank: :math:`r`, the rank.
        dropout: the dropout probability of the branch's input.
        drop_path: the probability of dropping the branch for an element of the first dimension, which is an image, or
            a window in the attention of a Swin.
        init: ``'zero'``, ``'principal'`` or ``'minor'``, with which the layer starts unchanged, or ``'trunc_normal'``
            of std 0.02, as published; see :class:`mona_mm.methods.LoRA`.
        use_rslora: divide by the square root of the rank, as in rsLoRA, in place of the rank.

    Raises:
        ConfigError: if :class:`mona_mm.methods.LoRA` does not accept a value.
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
        init: InitOrPart = 'zero',
        use_rslora: bool = False,
    ) -> None:
        dropout = 0.0 if site == 'proj' else dropout
        super().__init__(in_channels, out_channels, rank, rank, dropout, drop_path, init, use_rslora)


class StructuredDoRA(DoRA):
    r"""A DoRA with the addition of :class:`StructuredLoRA` on a linear layer.

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out}) + m_\mathrm{out}` parameters. Its ``delta_weight`` merges it
    into the layer.

    Args:
        in_channels: the width of the layer's input.
        out_channels: the width of its output, or of the slice.
        site: the site of the layer, one of :data:`mona_mm.hosts.LINEAR_SITES`; at ``proj`` there is no dropout.
        rank: :math:`r`, the rank.
        dropout: the dropout probability of the input of the change.
        drop_path: the probability of dropping the change for an element of the first dimension, which is an image, or
            a window in the attention of a Swin.
        init: as in :class:`StructuredLoRA`.
        use_rslora: divide by the square root of the rank in place of the rank.
        detach_norm: treat the norm as a constant in the gradient, as :class:`mona_mm.methods.DoRA` does.

    Raises:
        ConfigError: if :class:`mona_mm.methods.DoRA` does not accept a value.
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
        init: InitOrPart = 'zero',
        use_rslora: bool = False,
        detach_norm: bool = True,
    ) -> None:
        dropout = 0.0 if site == 'proj' else dropout
        super().__init__(in_channels, out_channels, rank, rank, dropout, drop_path, init, use_rslora, detach_norm)


class StructuredAdapter(LinearModule):
    r"""An adapter on the output of a linear layer; only at ``proj`` it is in parallel to the layer, on its input.

    .. math::
        y + \mathrm{DropPath}(\mathrm{up}(\mathrm{GELU}(\mathrm{down}(\mathrm{Dropout}(z))))), \qquad
        z = x \text{ at } \mathtt{proj}, \text{ else } y

    A module has :math:`r (m + m_\mathrm{out}) + r + m_\mathrm{out}` parameters for an input of width :math:`m`. It
    cannot be merged.

    Args:
        in_channels: the width of the layer's input.
        out_channels: the width of its output, or of the slice.
        site: the site of the layer, one of :data:`mona_mm.hosts.LINEAR_SITES`; at ``proj`` there is no dropout.
        bottleneck: :math:`r`, the hidden width.
        dropout: the dropout probability of the branch's input.
        drop_path: the probability of dropping the branch for an element of the first dimension, which is an image, or
            a window in the attention of a Swin.
        init: ``'zero'``, with which the layer starts unchanged, or ``'trunc_normal'`` of std 0.02, as published.
            Biases start at zero.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, ``dropout`` or ``drop_path`` is not in
            [0, 1), or ``init`` is neither ``'zero'`` nor ``'trunc_normal'``.
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
        """Initialise the projections as ``init`` says."""
        reset_projections(self.down, self.up, self.init)

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute what is added to ``out (..., out_channels)``, given also the input ``x (..., in_channels)``."""
        z = x if self.parallel else out
        return self.drop_path(self.up(self.act(self.down(self.dropout(z)))))


STRUCTURED = {
    'LoRA': StructuredLoRA,
    'DoRA': StructuredDoRA,
    'Adapter': StructuredAdapter,
    'Mona': Mona,
    'AdapterPlus': AdapterPlus,
}
"""The classes of the structured modules, by the ``type`` in a config."""


def stream_sites(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The sites in the token stream at which a structured module can be, behind the matrices of a branch; empty for one
    beside single linear layers."""
    cls = STRUCTURED[config['type']]
    return cls.sites if issubclass(cls, StreamModule) else ()


def build_structured(
    config: Mapping[str, Any], widths: tuple[int, ...], site: str, is_called: bool = True
) -> nn.Module:
    """Build the structured module of a site.

    Args:
        config: the config of the module; its ``type`` is a key of :data:`STRUCTURED`, at a stream site ``'Mona'`` or
            ``'AdapterPlus'``.
        widths: ``(channels,)`` at a stream site, ``(in_channels, out_channels)`` at a linear site.
        site: the name of the site, as in :mod:`mona_mm.hosts`.
        is_called: whether the host calls the linear layer of the site as a module.

    Raises:
        ConfigError: if the value of an option is not accepted.
        UnknownOptionError: if the module has no such option.
    """
    options = dict(config)
    module_type = options.pop('type')
    check_options(f'structured {module_type}', STRUCTURED[module_type], options, given=NOT_OPTIONS)
    if site in LINEAR_SITES:
        options['site'] = site  # the modules have no dropout at `proj`
        if not is_called:  # a module that only adds to a weight cannot drop anything
            options |= dict(dropout=0.0, drop_path=0.0)
    return STRUCTURED[module_type](*widths, **options)
