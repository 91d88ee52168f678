"""The deployed form of Mona: the same outputs with fewer operations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.methods.fast_mona import merged_filters
from mona_mm.nn.products import linear
from mona_mm.nn.tracing import is_hooked, is_traced


class FoldedMona(StreamModule):
    r"""A trained :class:`~mona_mm.methods.Mona` with its parameters folded together, for inference.

    The depthwise convolutions, their average and the identity beside them are one depthwise convolution of the largest
    size; the identity beside the 1x1 convolution is in its weight; :math:`\gamma` is in the LayerNorm's scale and
    shift:

    .. math:: y = x + W_\mathrm{up}\,\mathrm{GELU}(P\,\mathrm{DWConv}(W_\mathrm{down}(\mathrm{LN}(x) + \gamma_x x)))

    The outputs equal those of the original in evaluation, within rounding. It is not a method of its own: Mona is
    trained, and :func:`mona_mm.methods.deploy` replaces it by this form.

    Args:
        channels: width ``C`` of the token stream.
        bottleneck: hidden width.
        kernel_size: the largest of the original's kernel sizes.
        scaled_norm: the same as in the original. With one before the 1x1 convolution, the identity beside that
            convolution is not folded into its weight.
    """

    def __init__(self, channels: int, bottleneck: int, kernel_size: int, scaled_norm: Sequence[str]) -> None:
        super().__init__()
        self.entrance = _FoldedNorm(channels) if 'down' in scaled_norm else nn.Identity()
        self.down = nn.Linear(channels, bottleneck)
        self.depthwise = nn.Conv2d(bottleneck, bottleneck, kernel_size, padding=kernel_size // 2, groups=bottleneck)
        self.middle = _FoldedNorm(bottleneck) if 'pointwise' in scaled_norm else None
        self.pointwise = nn.Linear(bottleneck, bottleneck)
        self.up = nn.Linear(bottleneck, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the module the identity. It is not trained itself, but gets the weights of a trained Mona."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``. Class and register tokens, which come first, skip the
        convolutions."""
        p = _project(self.down, self.entrance(x))
        extra = x.shape[1] - hw[0] * hw[1]
        grid = p[:, extra:].unflatten(1, hw).permute(0, 3, 1, 2)  # (B, n, H, W), channels-last
        q = self.depthwise(grid).permute(0, 2, 3, 1).flatten(1, 2)
        r = _project(self.pointwise, q) if self.middle is None else _project(self.pointwise, self.middle(q)) + q
        p = torch.cat((p[:, :extra], r), dim=1) if extra else r
        return x + _project(self.up, F.gelu(p))

    @classmethod
    @torch.no_grad()
    def of(cls, mona: StreamModule) -> 'FoldedMona':
        """Make the folded form of a :class:`~mona_mm.methods.Mona`."""
        norms = [name for name, norm in (('down', mona.entrance), ('pointwise', mona.middle)) if _is_scaled(norm)]
        size = max(conv.kernel_size[0] for conv in mona.depthwise)
        folded = cls(mona.down.in_features, mona.down.out_features, size, norms).to(mona.down.weight)
        for part, norm in ((folded.entrance, mona.entrance), (folded.middle, mona.middle)):
            if _is_scaled(norm):
                part.norm.weight.copy_(norm.norm.weight * norm.gamma)
                part.norm.bias.copy_(norm.norm.bias * norm.gamma)
                part.gammax.copy_(norm.gammax)
                part.norm.eps = norm.norm.eps
        folded.down.load_state_dict(mona.down.state_dict())
        folded.up.load_state_dict(mona.up.state_dict())
        folded.pointwise.weight.copy_(mona.pointwise.weight.flatten(1))
        folded.pointwise.bias.copy_(mona.pointwise.bias)
        if folded.middle is None:
            folded.pointwise.weight.diagonal().add_(1)
        kernel, bias = merged_filters([(conv.weight, conv.bias) for conv in mona.depthwise], mona.filter_scale)
        folded.depthwise.weight.copy_(kernel)
        folded.depthwise.weight[:, :, size // 2, size // 2] += 1
        folded.depthwise.bias.copy_(bias)
        folded.train(mona.training)
        return folded


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    # The faster product has no gradient, cannot be exported, and needs inputs of one dtype.
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or is_traced() or is_hooked(layer):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


class _FoldedNorm(nn.Module):
    r"""Scaled norm :math:`\mathrm{LN}(x) + \gamma_x \odot x`, whose :math:`\gamma` is in the LayerNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gammax = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.norm(x), x, self.gammax)


def _is_scaled(norm: nn.Module | None) -> bool:
    return not isinstance(norm, nn.Identity | None)
