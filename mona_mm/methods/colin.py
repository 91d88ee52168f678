"""CoLin: an adapter of low-rank projections that are kept close to orthogonal, with a gated depthwise convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.options import Ratio, Width, checked
from mona_mm.registry import METHODS


class CoLinLinear(nn.Module):
    r"""Linear layer of low rank, whose scales :math:`g` are given in every call.

    .. math:: W = (A\,\mathrm{diag}(g)\,B)^\top

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        rank: length of ``g``.
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(in_channels, rank))
        self.b = nn.Parameter(torch.empty(rank, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))

    @torch.no_grad()
    def reset_parameters(self, draws: int) -> Tensor:
        """Initialise A and B with the averages of the leading singular vectors of random matrices.

        The matrices are Kaiming-uniform with a = sqrt(5), and the bias is uniform in +-1/sqrt(in_channels).

        Args:
            draws: the number of matrices.

        Returns:
            Their leading singular values, ``(draws, rank)``.
        """
        in_channels, out_channels = self.a.shape[0], self.b.shape[1]
        bound = in_channels**-0.5
        matrices = torch.empty(draws, in_channels, out_channels, device=self.a.device).uniform_(-bound, bound)
        left, values, right = leading_singular_vectors(matrices, self.a.shape[1])
        self.a.copy_(left.mean(0))
        self.b.copy_(right.mean(0))
        nn.init.uniform_(self.bias, -bound, bound)
        return values

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """Map ``(..., in_channels)`` to ``(..., out_channels)``, with the scales ``g (rank,)``."""
        return F.linear(F.linear(x, (self.a * g).T), self.b.T, self.bias)  # cheaper than one product with the weight


class GatedDepthwise(nn.Module):
    r"""Depthwise 3x3 convolution, mixed with the identity by a learned gate :math:`a` for every channel.

    .. math:: \sigma(a) \odot \mathrm{DWConv}_3(p) + (1 - \sigma(a)) \odot p

    It is computed as one convolution, which has the gate and the identity in its kernel.

    Args:
        channels: the number of channels ``n``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))
        self.gate = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        """Initialise the convolution as torch does, and the gate with zeros, half open."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.uniform_(self.bias, -1 / 3, 1 / 3)
        nn.init.zeros_(self.gate)

    def forward(self, grid: Tensor) -> Tensor:
        """Map ``(B, n, H, W)`` to ``(B, n, H, W)``."""
        share = self.gate.sigmoid()
        identity = F.pad((1 - share)[:, None, None, None], (1, 1, 1, 1))
        kernel = share[:, None, None, None] * self.weight + identity
        return F.conv2d(grid, kernel, share * self.bias, padding=1, groups=self.channels)


@METHODS.register_module()
class CoLin(StreamModule):
    r"""Adapter of low-rank projections with common scales, one after the attention residual and one after the FFN
    residual, and a term in the loss that keeps the factors of the projections close to orthogonal.

    .. math::
        g &= \textstyle\sum_{i=1}^{k} g_i \\
        p &= (A_\mathrm{d}\,\mathrm{diag}(g)\,B_\mathrm{d})^\top x + b_\mathrm{d} \\
        q &= \sigma(a) \odot \mathrm{DWConv}_3(p) + (1 - \sigma(a)) \odot p \\
        y &= x + (A_\mathrm{u}\,\mathrm{diag}(g)\,B_\mathrm{u})^\top\,\mathrm{GELU}(q) + b_\mathrm{u}

    A module has :math:`(2r + 1)m + (2r + 12)n + kr` parameters for :math:`m` channels, bottleneck :math:`n`, rank
    :math:`r` and :math:`k` vectors of scales, by default :math:`57m + 6912`. To the loss of the model it adds, as
    ``loss_orthogonal`` in the log,

    .. math::
        \lambda k \sum_{l \in \{\mathrm{d}, \mathrm{u}\}}
        \Big(\lVert A_l^\top A_l - I \rVert_F^2 + \lVert B_l B_l^\top - I \rVert_F^2\Big)

    It is a part of the loss like any other, so it is scaled, accumulated, clipped and averaged with it. At the start it
    is about 127 in a module, thousands in a whole backbone, since averages of bases are shorter than bases; AdamW
    brings it below one within 700 steps at a learning rate of 1e-4, and within 150 at 5e-4. Loops that do not call
    mmengine's ``parse_losses`` add :func:`mona_mm.auxiliary_loss` themselves. Class and register tokens skip the
    convolution.

    Source: Yin et al., "1% > 100%: High-Efficiency Visual Adapter with Complex Linear Projection Optimization",
    arXiv 2602.10513, and its published code, which counts where the two differ: its factors are common to the branches,
    and its scales to both projections, with the values that the second begins with. That code calls ``backward`` on the
    term in every forward pass, beside the loss: without the scale of mixed precision, and again when activations are
    recomputed. Here the term is a part of the loss.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width.
        rank: rank of both projections.
        branches: number :math:`k` of vectors of scales, which are used as their sum.
        orthogonality: factor :math:`\lambda` of the term in the loss; 0 leaves it out.
        zero_init: begin as the identity, with zeros in the factor B and the bias of the up projection, in place of the
            published start, which is random and perturbs the features of a plain ViT (see docs/which_method.md).

    Raises:
        ConfigError: if ``bottleneck``, ``rank`` or ``branches`` is not a whole number of at least 1, ``rank`` exceeds
            the bottleneck or the width, or ``orthogonality`` is negative.
    """

    sites = ('post_attn', 'post_ffn')

    @checked
    def __init__(
        self,
        channels: int,
        bottleneck: Width = 100,
        rank: Width = 28,
        branches: Width = 4,
        orthogonality: Ratio = 0.5,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if rank > min(channels, bottleneck):
            raise ConfigError(
                f'CoLin: rank={rank} must be at most {min(channels, bottleneck)}, the smaller of the width {channels} '
                f'and bottleneck={bottleneck}: a projection between the two has no higher rank.'
            )
        self.orthogonality = float(orthogonality)
        self.zero_init = zero_init
        self.down = CoLinLinear(channels, bottleneck, rank)
        self.depthwise = GatedDepthwise(bottleneck)
        self.up = CoLinLinear(bottleneck, channels, rank)
        self.g = nn.Parameter(torch.empty(branches, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the factors with averages of singular vectors, and the scales with the singular values that belong
        to those of ``up``."""
        self.down.reset_parameters(len(self.g))
        self.g.copy_(self.up.reset_parameters(len(self.g)))
        self.depthwise.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.up.b)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``. Class and register tokens, which come first, skip the
        convolution."""
        g = self.g.sum(0)

        def branch(rows: Tensor) -> Tensor:
            p = self.down(rows, g)
            mixed = self._mix(p.reshape(*x.shape[:2], p.shape[-1]), hw).reshape(p.shape)
            return self.up(F.gelu(mixed), g)

        return self.residual(x, branch)

    def _mix(self, p: Tensor, hw: Grid) -> Tensor:
        """Apply the convolution to the grid within ``(B, N, n)``."""
        extra = p.shape[1] - hw[0] * hw[1]
        # (B, n, H, W) in channels-last; transpose and unflatten would give channels-first strides at batch 1
        grid = self.depthwise(p[:, extra:].unflatten(1, hw).permute(0, 3, 1, 2))
        mixed = grid.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((p[:, :extra], mixed), dim=1) if extra else mixed

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Compute the orthogonality term, as ``loss_orthogonal``.

        Raises:
            ConfigError: if the factors are not whole in this process, as under FSDP.
        """
        if not self.orthogonality:
            return {}
        down, up = self.down, self.up
        if any(factor.dim() != 2 or not factor.numel() for factor in (down.a, down.b, up.a, up.b)):
            raise ConfigError(
                'CoLin: loss_orthogonal needs whole factors, and this process has only shards of them (FSDP). Train '
                'with MMDistributedDataParallel, or with orthogonality=0.'
            )
        wide = _departure(torch.stack((down.a, up.b.T)))
        narrow = _departure(torch.stack((down.b.T, up.a)))
        return {'loss_orthogonal': self.orthogonality * len(self.g) * (wide + narrow)}


def _departure(matrices: Tensor) -> Tensor:
    """The sum over matrices ``Q (..., m, r)`` of the squared distances of ``Q'Q`` from the identity."""
    matrices = matrices.float() if matrices.dtype.itemsize < 4 else matrices
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return (matrices.mT @ matrices - identity).square().sum()


def leading_singular_vectors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading part of the singular value decomposition of real matrices ``(..., m, n)`` of full rank.

    It is computed in float64 from the eigenvectors of the smaller Gram matrix, in a tenth of the time of
    ``torch.linalg.svd`` on a CPU.

    Returns:
        The left vectors ``(..., m, rank)``, the singular values ``(..., rank)`` in descending order, and the right
        vectors ``(..., rank, n)``.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        left, values, right = leading_singular_vectors(matrices.mT, rank)
        return right.mT, values, left.mT
    matrices = matrices.double()
    squares, vectors = torch.linalg.eigh(matrices.mT @ matrices)
    values, vectors = squares[..., -rank:].flip(-1).sqrt(), vectors[..., -rank:].flip(-1)
    return matrices @ vectors / values[..., None, :], values, vectors.mT
