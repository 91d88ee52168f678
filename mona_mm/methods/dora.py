"""DoRA: the direction of a weight trains by a low-rank addition, its magnitude by a vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import StockLinear
from mona_mm.methods.lora import InitOrPart, LoRA
from mona_mm.nn.autocast import no_autocast
from mona_mm.options import Probability, Width, checked
from mona_mm.registry import METHODS


@METHODS.register_module()
class DoRA(LoRA):
    r"""A low-rank addition to the direction of a linear layer's weight, and a magnitude for each of its outputs.

    .. math::
        W' = m \odot \frac{W + s\, W_\mathrm{up} W_\mathrm{down}}{\lVert W + s\, W_\mathrm{up} W_\mathrm{down} \rVert},
        \qquad s = \tfrac{\alpha}{r}

    The norm is that of each row, :math:`m` begins as the norm of the base's rows, and the bias stays as it is. A module
    has :math:`r (m_\mathrm{in} + m_\mathrm{out}) + m_\mathrm{out}` parameters. In the gradient the norm is a constant,
    as in section 4.3 of the paper, unless ``detach_norm=False``. The norm is computed anew in every call, in float32
    under autocast too, which takes a product of the size of the weight; merging saves it. Training keeps the output of
    the layer, which LoRA does not need, for the gradient of the magnitude. Weight decay pulls the magnitude to zero,
    and with it the whole weight; the configs here exempt it.

    Dropout acts on the input of the whole change: in training the layer then computes
    :math:`W x + b + (W' - W)\,\mathrm{Dropout}(x)`. A row of the base that is zero has no direction: until the addition
    gives it one, the row is the addition itself, as in LoRA. Beside a convolution a row is the filter of an output
    channel.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, sections 4.1 and 4.3. The paper's norm
    is that of the columns of a weight whose columns are the outputs, which are the rows here, as in Hugging Face's
    PEFT. Rank, alpha and sites of the default are ours.

    Args:
        in_channels: width of the linear's input.
        out_channels: width of its output, or of the slice.
        rank: rank :math:`r` of the addition.
        alpha: factor :math:`\alpha`, which is divided by the rank.
        dropout: drop probability of the input of the change.
        drop_path: probability of dropping the whole change, drawn for each element of the first dimension: for an
            image, or for a window in the attention of a Swin.
        init: how both projections begin, see :class:`LoRA`.
        use_rslora: divide ``alpha`` by the square root of the rank in place of the rank.
        detach_norm: treat the norm as a constant in the gradient, as the paper proposes. Without it, training keeps a
            matrix of the size of the weight for the backward pass.

    Raises:
        ConfigError: if ``detach_norm`` is not True or False, or :class:`LoRA` does not accept a value.
    """

    sites = ('q', 'k', 'v')

    @checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: Width = 16,
        alpha: float = 16.0,
        dropout: Probability = 0.0,
        drop_path: Probability = 0.0,
        init: InitOrPart = 'zero',
        use_rslora: bool = False,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, rank, alpha, dropout, drop_path, init, use_rslora)
        self.detach_norm = detach_norm
        self.magnitude = nn.Parameter(torch.ones(out_channels))

    def start_from(self, weight: Tensor) -> None:
        """Set the magnitude to the norms of the rows of the base's weight, and initialise both projections with a part
        of the weight, if ``init`` says so."""
        super().start_from(weight)
        with torch.no_grad():
            self.magnitude.copy_(_row_norms(weight))

    def growth(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Compute the magnitudes divided by the norms of the rows of the weight with the low-rank addition.

        Args:
            weight: the weight of the base, ``(out_channels, in_channels)``.
            down: the first of the :meth:`factors`, ``(k, in_channels)``.
            up: the second one, ``(out_channels, k)``.

        Returns:
            The ratios ``(out_channels,)``, in float32 if the weight is in half precision.
        """
        if self.detach_norm:
            weight, down, up = weight.detach(), down.detach(), up.detach()
        dtype = _wide(weight)
        with no_autocast(weight.device.type):
            norms = _row_norms(torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=self.scale))
        is_zero = norms == 0
        return torch.where(is_zero, 1.0, self.magnitude.to(dtype) / torch.where(is_zero, 1.0, norms))

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(..., out_channels)`` to the linear's output for ``x (..., in_channels)``."""
        weight, bias, (down, up) = linear.weight, linear.bias, self.factors()
        growth = self.growth(weight, down, up)
        if self._drops_input():
            x = self.dropout(x)
            out, bias = F.linear(x, weight), None
        branch = F.linear(self.scale * F.linear(x, down), _scaled(up, growth), _taken_out(bias, growth, up))
        return self.drop_path(torch.addcmul(branch.to(out.dtype), out, (growth - 1).to(out.dtype)))

    def convolve(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition ``(B, out_channels, H', W')`` to a convolution's output for ``x (B, C, H, W)``."""
        weight, bias, (down, up) = linear.weight, linear.bias, self.factors()
        growth = self.growth(weight, down, up)
        if self._drops_input():
            x = self.dropout(x)
            out, bias = linear.convolve(x, weight), None
        narrow = self.scale * linear.convolve(x, down)
        branch = F.conv2d(narrow, _scaled(up, growth)[:, :, None, None], _taken_out(bias, growth, up))
        return self.drop_path(torch.addcmul(branch.to(out.dtype), out, (growth - 1).to(out.dtype)[:, None, None]))

    def _drops_input(self) -> bool:
        return self.training and self.dropout.p > 0

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Compute the addition :math:`W' - W`, ``(out_channels, in_channels)``, to the linear's weight."""
        down, up = self.factors()
        growth = self.growth(weight, down, up)
        with no_autocast(weight.device.type):
            product = up.to(growth.dtype) @ down.to(growth.dtype)
        delta = (growth - 1)[:, None] * weight + (self.scale * growth)[:, None] * product
        return delta.to(torch.promote_types(weight.dtype, self.magnitude.dtype))


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor, or float32 if it is in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.to(_wide(weight)), dim=1)


def _scaled(up: Tensor, growth: Tensor) -> Tensor:
    """The rows of the outer factor times their ratios: a product that is small, unlike that of the output."""
    return (growth[:, None] * up).to(up.dtype)


def _taken_out(bias: Tensor | None, growth: Tensor, up: Tensor) -> Tensor | None:
    """The share of the bias in the change of an output that holds the bias, with the opposite sign."""
    return None if bias is None else ((1 - growth) * bias).to(up.dtype)
