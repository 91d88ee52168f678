"""Mona: the multi-cognitive visual adapter."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.methods.fast_mona import Kernels, ScaledNorm, kernels_fit, mona
from mona_mm.methods.folded_mona import FoldedMona
from mona_mm.nn.choice import Ways, bucket, measures
from mona_mm.nn.tracing import is_hooked, is_traced
from mona_mm.options import Probability, Rule, Width, checked
from mona_mm.registry import METHODS

_SMALL = 2**19
"""The elements of the tokens and of the hidden state, of a batch, up to which intermediate results may be kept for the
backward pass: in 32 bits 2 MiB a module. Above it a method would lose what it saves in memory."""

Place = Literal['down', 'pointwise']
"""The layers before which a scaled LayerNorm can be."""

LARGEST_KERNEL = 255
"""The largest kernel size: wider than most grids, with few enough parameters to be built."""

KernelSize = Annotated[
    int,
    Rule(
        f'an odd whole number (an even kernel has no centre) of at most {LARGEST_KERNEL}',
        lambda size: 0 < size <= LARGEST_KERNEL and size % 2,
    ),
]
KernelSizes = Annotated[
    Sequence[KernelSize],
    Rule(
        f'a list of different odd whole numbers (an even kernel has no centre) of at most {LARGEST_KERNEL}, such as '
        '(3, 5, 7)',
        lambda sizes: sizes and len(set(sizes)) == len(sizes),
    ),
]


class ScaledLayerNorm(nn.Module):
    r"""Scaled norm :math:`\gamma \odot \mathrm{LN}(x) + \gamma_x \odot x`, with vectors of length ``channels``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.empty(channels))
        self.gammax = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the module close to the identity, with 1e-6 times the norm added."""
        self.norm.reset_parameters()
        nn.init.constant_(self.gamma, 1e-6)
        nn.init.ones_(self.gammax)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        return self.norm(x) * self.gamma + x * self.gammax


@METHODS.register_module()
class Mona(StreamModule):
    r"""Multi-kernel convolutional adapter, one after the attention residual and one after the FFN residual.

    .. math::
        s &= \gamma \odot \mathrm{LN}(x) + \gamma_x \odot x \\
        p &= W_\mathrm{down} s + b_\mathrm{down} \\
        q &= \tfrac13 \textstyle\sum_{k \in \{3,5,7\}} \mathrm{DWConv}_k(p) + p \\
        r &= \mathrm{Conv}_{1\times1}(q) + q \\
        y &= x + W_\mathrm{up}\,\mathrm{Dropout}(\mathrm{GELU}(r)) + b_\mathrm{up}

    By default a module has :math:`(2n + 5)m + n^2 + 88n` parameters for :math:`m` channels and bottleneck :math:`n`;
    the paper's :math:`(2n + 3)m + n^2 + 84n + 2` counts scalar scales and convolutions without bias, which its code
    does not use. The scaled LayerNorm has :math:`4m` of them, and the filters have :math:`n\sum_k (k^2 + 1)`.

    The paper's four design versions (its section 3.4) are

    1. ``scaled_norm=(), average=False``: only the filters, summed;
    2. ``scaled_norm=('down', 'pointwise'), average=False``: version 1 with scaled LayerNorms before the down projection
       and before the 1x1 convolution;
    3. ``scaled_norm=(), average=True``: only the filters, averaged;
    4. ``scaled_norm=('down',), average=True``: version 3 with a scaled LayerNorm before the down projection; the
       default.

    Source: Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
    CVPR 2025, section 3.3, and ``mona.py`` of its published code, which counts where the two differ.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width of the adapter.
        kernel_sizes: kernel sizes of the depthwise convolutions, all odd.
        scaled_norm: the layers that have a scaled LayerNorm before them: the ``'down'`` projection, and the
            ``'pointwise'`` convolution (whose norm has width ``bottleneck``).
        average: whether the depthwise convolutions are averaged; otherwise they are summed.
        dropout: drop probability after the GELU.
        zero_init: begin as the identity, with zeros in the up projection, in place of the published start.

    Raises:
        ConfigError: if ``bottleneck`` is not a whole number of at least 1, ``kernel_sizes`` are not different odd
            whole numbers, ``scaled_norm`` names another place, or ``dropout`` is not in [0, 1).
    """

    sites = ('post_attn', 'post_ffn')

    @checked
    def __init__(
        self,
        channels: int,
        bottleneck: Width = 64,
        kernel_sizes: KernelSizes = (3, 5, 7),
        scaled_norm: Sequence[Place] = ('down',),
        average: bool = True,
        dropout: Probability = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.filter_scale = 1 / len(kernel_sizes) if average else 1.0
        self.entrance = ScaledLayerNorm(channels) if 'down' in scaled_norm else nn.Identity()
        self.down = nn.Linear(channels, bottleneck)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(bottleneck, bottleneck, k, padding=k // 2, groups=bottleneck) for k in kernel_sizes
        )
        self.middle = ScaledLayerNorm(bottleneck) if 'pointwise' in scaled_norm else nn.Identity()
        self.pointwise = nn.Conv2d(bottleneck, bottleneck, 1)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the published code, whose initialisation of the Swin leaves the linears at std 0.02, not at
        zero."""
        for norm in (self.entrance, self.middle):
            if isinstance(norm, ScaledLayerNorm):
                norm.reset_parameters()
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for conv in (*self.depthwise, self.pointwise):
            conv.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``. Class and register tokens, which come first, skip the
        convolutions."""
        if self.fast and not is_traced() and self._fits_fast(x):
            return self._choose(x, hw)(self, x, hw)
        return self._plain(x, hw)

    def _choose(self, x: Tensor, hw: Grid) -> Callable[['Mona', Tensor, Grid], Tensor]:
        """The faster form for the shape of ``x``."""
        sizes = (conv.kernel_size[0] for conv in self.depthwise)
        key = self.dropout.training, self.down.weight.requires_grad, *self.down.weight.shape, *sizes
        is_small = x.shape[0] * x.shape[1] * sum(self.down.weight.shape) <= _SMALL
        forms = _FORMS_ON_SMALL_GRIDS if is_small else _FORMS
        if x.device.type == 'cuda':
            forms = _FORMS_ON_CUDA
        return forms.choose_form(self, x, hw, key=(*key, bucket(x.shape[0]), bucket(hw[0] * hw[1])))

    def _plain(self, x: Tensor, hw: Grid) -> Tensor:
        p = self.down(self.entrance(x))
        extra = x.shape[1] - hw[0] * hw[1]
        if extra:
            p = torch.cat((p[:, :extra], self._mix(p[:, extra:], hw)), dim=1)
        else:
            p = self._mix(p, hw)
        return x + self.up(self.dropout(self.act(p)))

    def _fits_fast(self, x: Tensor) -> bool:
        """Whether :func:`mona_mm.methods.fast_mona.mona` computes the same for ``x``.

        It calls no submodule, so none may have a hook or have been replaced. Its parameters must have the dtype of the
        input, or float32 under autocast. It supports CPUs and CUDA.
        """
        if isinstance(self.middle, ScaledLayerNorm):
            return False
        if x.device.type not in ('cpu', 'cuda') or not x.numel():
            return False
        if torch.is_autocast_enabled(x.device.type):
            dtype = None if x.dtype == torch.float64 else torch.float32
        else:
            dtype = x.dtype
        return all(
            type(m) in _PARTS
            and not is_hooked(m)
            and all(p is not None and p.dtype == dtype for p in m._parameters.values())
            for child in self.children()
            for m in child.modules()
        )

    def _fast(self, x: Tensor, hw: Grid, keeps: bool = False, kernels: Kernels = 'none') -> Tensor:
        norm = None
        if isinstance(self.entrance, ScaledLayerNorm):
            inner = self.entrance.norm
            norm = ScaledNorm(inner.weight, inner.bias, self.entrance.gamma, self.entrance.gammax, inner.eps)
        return mona(
            x,
            hw,
            norm,
            (self.down.weight, self.down.bias),
            [(conv.weight, conv.bias) for conv in self.depthwise],
            (self.pointwise.weight, self.pointwise.bias),
            (self.up.weight, self.up.bias),
            self.filter_scale,
            self.dropout.p if self.dropout.training else 0.0,
            self.fast == 'exact' or not measures(),
            keeps,
            kernels,
        )

    def _kept(self, x: Tensor, hw: Grid) -> Tensor:
        return self._fast(x, hw, keeps=True)

    def _by_kernels(self, x: Tensor, hw: Grid, kernels: Kernels = 'all') -> Tensor:
        """:meth:`_fast` with Triton kernels, or as it is where they do not fit."""
        size = max(conv.kernel_size[0] for conv in self.depthwise)
        return self._fast(x, hw, kernels=kernels if kernels_fit(x, self.down.out_features, size) else 'none')

    def _by_convolution_kernels(self, x: Tensor, hw: Grid) -> Tensor:
        return self._by_kernels(x, hw, 'convolutions')

    def to_deploy(self) -> FoldedMona:
        """Make the form of this module for inference, in which its parameters are folded together."""
        return FoldedMona.of(self)

    def _mix(self, p: Tensor, hw: Grid) -> Tensor:
        """Apply the convolutions to ``(B, H*W, n)``."""
        # (B, n, H, W) in channels-last; transpose and unflatten would give channels-first strides at batch 1
        grid = p.unflatten(1, hw).permute(0, 3, 1, 2)
        grid = sum(conv(grid) for conv in self.depthwise) * self.filter_scale + grid
        grid = self.pointwise(self.middle(grid.movedim(1, -1)).movedim(-1, 1)) + grid
        return grid.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


_FORMS_ON_CUDA = Ways(
    'mona_cuda',
    recomputed=Mona._fast,
    kept=Mona._kept,
    plain=Mona._plain,
    kernels=Mona._by_kernels,
    convolution_kernels=Mona._by_convolution_kernels,
)
_FORMS = Ways('mona', recomputed=Mona._fast, plain=Mona._plain)
_FORMS_ON_SMALL_GRIDS = Ways('mona_small', recomputed=Mona._fast, kept=Mona._kept, plain=Mona._plain)

# The classes of the modules of a Mona.
_PARTS = {ScaledLayerNorm, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Conv2d, nn.Identity, nn.GELU, nn.Dropout}
