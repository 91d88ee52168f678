"""LoRA: a low-rank addition to linear layers."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.hosts import StockLinear
from mona_mm.methods.base import LinearModule
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS

Init = Literal['zero', 'trunc_normal']
"""The initialisations of :func:`reset_projections`."""

InitOrPart = Literal['zero', 'trunc_normal', 'principal', 'minor']
"""The initialisations of :class:`LoRA`: random ones, or a part of the weight of the base."""

PARTS = ('principal', 'minor')
"""The initialisations that take a part of the weight of the base, which :func:`singular_factors` computes."""


@METHODS.register_module()
class LoRA(LinearModule):
    r"""Low-rank branch in parallel to a linear layer, or to the q, k or v slice of a fused one.

    .. math:: \Delta = s\, W_\mathrm{up} W_\mathrm{down}\,\mathrm{Dropout}(x), \qquad s = \tfrac{\alpha}{r}

    A module has :math:`r (m_\mathrm{in} + m_\mathrm{out})` parameters. By default it starts at zero. Beside a
    convolution of :math:`k \times k`, :math:`W_\mathrm{down}` is one like it with :math:`r` output channels,
    :math:`W_\mathrm{up}` a :math:`1 \times 1` convolution, and :math:`m_\mathrm{in}` is :math:`k^2` times its channels.

    With ``use_rslora`` it is rsLoRA, where :math:`s = \alpha / \sqrt{r}`. With ``init='principal'`` it is PiSSA, with
    ``init='minor'`` MiLoRA or SoMA: both matrices begin with the :math:`r` largest or smallest singular values of the
    base's weight :math:`U \Sigma V^\top`,

    .. math::
        W_\mathrm{up}^0 = U_r (\Sigma_r / s)^{1/2}, \quad W_\mathrm{down}^0 = (\Sigma_r / s)^{1/2} V_r^\top, \qquad
        \Delta = s\, (W_\mathrm{up} W_\mathrm{down} - W_\mathrm{up}^0 W_\mathrm{down}^0)\,\mathrm{Dropout}(x)

    The published forms subtract the part from the base instead. Here the base stays as it is, and the module keeps the
    matrices that it began with as buffers; checkpoints and deltas hold them, since another machine may compute other
    singular vectors, and are twice as large. As :math:`(W_\mathrm{up} - W_\mathrm{up}^0) W_\mathrm{down} +
    W_\mathrm{up}^0 (W_\mathrm{down} - W_\mathrm{down}^0)` the difference is exactly zero at the start, and autocast
    does not round small changes away. Dropout, if there is any, acts on the difference alone. Weight decay pulls the
    two matrices, and so that part of the weight, to zero.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; rank, alpha and
    slices of the default as in the published code of Mona (CVPR 2025). Kalajdzievski, "A Rank Stabilization Scaling
    Factor for Fine-Tuning with LoRA" (arXiv 2312.03732); Meng et al., "PiSSA: Principal Singular Values and Singular
    Vectors Adaptation of Large Language Models", NeurIPS 2024; Wang et al., "MiLoRA: Harnessing Minor Singular
    Components for Parameter-Efficient LLM Finetuning", NAACL 2025; Yun et al., "SoMA: Singular Value Decomposed Minor
    Components Adaptation for Domain Generalizable Representation Learning", CVPR 2025.

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        rank: rank :math:`r` of the branch.
        alpha: factor :math:`\alpha`, which is divided by the rank.
        dropout: drop probability of the branch's input.
        drop_path: probability of dropping the whole branch, drawn for each element of the first dimension: for an
            image, or for a window in the attention of a Swin.
        init: ``'zero'``; ``'trunc_normal'`` of std 0.02 for both projections, as in SPT's published code;
            ``'principal'`` (PiSSA) or ``'minor'`` (MiLoRA, SoMA) for a part of the base's weight.
        use_rslora: divide ``alpha`` by the square root of the rank in place of the rank.

    Raises:
        ConfigError: if ``rank`` is not a whole number of at least 1, ``dropout`` or ``drop_path`` is not in [0, 1),
            ``init`` is not one of the four, or with a part of the base's weight ``rank`` is above the number of its
            singular values or ``alpha`` is not above 0.
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
        init: InitOrPart = 'zero',
        use_rslora: bool = False,
    ) -> None:
        from mmcv.cnn.bricks.drop import DropPath  # imported here, since it takes a second

        super().__init__()
        self.init = init
        self.scale = float(alpha) / (rank**0.5 if use_rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.down = nn.Linear(in_channels, rank, bias=False)
        self.up = nn.Linear(rank, out_channels, bias=False)
        if init in PARTS:
            self._check_part(in_channels, out_channels)
            self.register_buffer('initial_down', torch.empty_like(self.down.weight))
            self.register_buffer('initial_up', torch.empty_like(self.up.weight))
        self.reset_parameters()

    def _check_part(self, in_channels: int, out_channels: int) -> None:
        name, rank, largest = type(self).__name__, self.down.out_features, min(in_channels, out_channels)
        if rank > largest:
            raise ConfigError(
                f'{name}: rank={rank} must be at most {largest} with init={self.init!r}, since a layer with '
                f'{in_channels} inputs and {out_channels} outputs has that many singular values.'
            )
        if self.scale <= 0:
            raise ConfigError(f'{name}: alpha must be above 0 with init={self.init!r}, which divides by it.')

    def reset_parameters(self) -> None:
        """Initialise ``down`` Kaiming-uniform with a = sqrt(5) and ``up`` with zeros, or both as ``init`` says. A part
        of the base's weight comes with :meth:`start_from`."""
        reset_projections(self.down, self.up, 'zero' if self.init in PARTS else self.init)
        self._keep_initial()

    def start_from(self, weight: Tensor) -> None:
        """Initialise both projections with a part of the base's weight, if ``init`` says so.

        Raises:
            ConfigError: if the weight holds values that are not finite.
        """
        if self.init not in PARTS or weight.is_meta:
            return
        if not weight.isfinite().all():
            raise ConfigError(
                f'{type(self).__name__}: init={self.init!r} needs the singular values of the weight, and a weight of '
                f'shape {tuple(weight.shape)} holds values that are not finite.'
            )
        with torch.no_grad():
            down, up = singular_factors(weight, self.down.out_features, self.init, self.scale)
            self.down.weight.copy_(down)
            self.up.weight.copy_(up)
        self._keep_initial()

    def _keep_initial(self) -> None:
        if self.init in PARTS:
            with torch.no_grad():
                self.initial_down.copy_(self.down.weight)
                self.initial_up.copy_(self.up.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices ``(k, in_channels)`` and ``(out_channels, k)`` whose product, times the scale, is the addition
        to the weight. ``k`` is the rank, or twice the rank with the initial matrices of a part of the base's weight."""
        down, up = _weight(self.down), _weight(self.up)
        if self.init not in PARTS:
            return down, up
        changes = down - self.initial_down, up - self.initial_up
        return torch.cat((down, changes[0])), torch.cat((changes[1], self.initial_up), dim=1)

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(..., out_channels)`` to the linear's output for ``x (..., in_channels)``."""
        x = self.dropout(x)
        if self.init not in PARTS:
            return self.drop_path(self.up(self.scale * self.down(x)))  # scaled at its narrowest
        down, up = self.factors()
        return self.drop_path(F.linear(self.scale * F.linear(x, down), up))

    def convolve(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(B, out_channels, H', W')`` to a convolution's output for ``x (B, C, H, W)``."""
        down, up = self.factors()
        narrow = self.scale * linear.convolve(self.dropout(x), down)
        return self.drop_path(F.conv2d(narrow, up[:, :, None, None]))

    @property
    def is_weight_delta(self) -> bool:
        """Whether the branch can be merged, which is the case if nothing is dropped at random."""
        return self.dropout.p == 0 and self.drop_path.drop_prob == 0

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Compute the branch as an addition ``(out_channels, in_channels)`` to the linear's weight."""
        down, up = self.factors()
        return self.scale * (up @ down)


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


def singular_factors(weight: Tensor, rank: int, part: str, scale: float) -> tuple[Tensor, Tensor]:
    """Factorise the part of a weight that belongs to its largest or smallest singular values.

    Each factor gets the square root of the singular values. Where these are zero but for rounding, as in a weight of
    lower rank, both factors would be zero and never get a gradient: there the first one gets the singular vectors as
    they are.

    Args:
        weight: the weight ``(out_channels, in_channels)``.
        rank: the number of singular values.
        part: ``'principal'`` for the largest, ``'minor'`` for the smallest ones.
        scale: the factor by which the product is multiplied, above 0.

    Returns:
        The factors ``down (rank, in_channels)`` and ``up (out_channels, rank)``; ``scale * up @ down`` is the part.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    chosen = slice(rank) if part == 'principal' else slice(len(values) - rank, None)
    roots = (values[chosen] / scale).sqrt()
    is_zero = values[chosen] <= max(weight.shape) * torch.finfo(weight.dtype).eps * values[0]
    down = torch.where(is_zero, 1.0, roots)[:, None] * right[chosen]
    return down, torch.where(is_zero, 0.0, roots) * left[:, chosen]
