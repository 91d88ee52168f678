"""ParaX: an adapter whose weights are mixed for every image, from a pool that the blocks of a stage share."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.methods.mona import LARGEST_KERNEL, KernelSize
from mona_mm.nn.depthwise import convolve
from mona_mm.nn.tracing import is_hooked, is_traced
from mona_mm.options import Ratio, Rule, Width, checked
from mona_mm.registry import METHODS

SeveralKernelSizes = Annotated[
    Sequence[KernelSize],
    Rule(
        f'a list of at least two different odd whole numbers of at most {LARGEST_KERNEL}, such as (3, 5, 7)',
        lambda sizes: len(set(sizes)) == len(sizes) > 1,
    ),
]


class ExpertPool(nn.Module):
    """The experts that the modules of a stage mix: matrices down and up, and filters of every kernel size.

    Args:
        experts: the number ``M`` of experts of each kind.
        channels: the width ``C`` of the token stream.
        rank: the inner width ``r``.
        kernel_sizes: the kernel sizes of the filters.
    """

    def __init__(self, experts: int, channels: int, rank: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, rank, channels))
        self.up = nn.Parameter(torch.empty(experts, channels, rank))
        self.filters = nn.ParameterList(torch.empty(experts, rank, k, k) for k in kernel_sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every expert with a truncated normal of std 0.02."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, gates: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mix the experts for each image.

        Args:
            gates: the shares ``(B, 2 + number of kernel sizes, M)`` of the experts in each kind.

        Returns:
            The matrices down ``(B, r, C)`` and up ``(B, C, r)``, and the filters ``(B, r, k, k)``.
        """
        kinds = zip(gates.unbind(1), (self.down, self.up, *self.filters), strict=True)
        down, up, *filters = (
            (shares @ experts.flatten(1)).unflatten(1, experts.shape[1:]) for shares, experts in kinds
        )
        return down, up, filters


@METHODS.register_module()
class ParaX(StreamModule):
    r"""Adapter with weights of its own for every image, which a router mixes from a pool that a stage's blocks share.

    For the tokens :math:`x` of the grid of one image, and the :math:`M` experts :math:`A_i`, :math:`B_i`,
    :math:`K^k_i` of its stage,

    .. math::
        s &= \gamma \odot \mathrm{LN}(x) + x, \qquad t = s + \mathrm{DWConv}_3(s) \\
        (g^A, g^B, g^3, g^5, g^7) &= \mathrm{softmax}_M\,R(\mathrm{mean}\,t) \\
        A &= \textstyle\sum_i g^A_i A_i, \quad B = \sum_i g^B_i B_i, \quad K^k = \sum_i g^k_i K^k_i \\
        z &= A t, \quad c_3 = K^3 * z, \quad c_5 = K^5 * (a_1 z + a_2 c_3), \quad c_7 = K^7 * (a_3 z + a_4 c_5) \\
        u &= z + \textstyle\sum_k \pi_k c_k, \qquad \pi = \mathrm{softmax}_k(W_\pi (c_3 + c_5 + c_7) + b_\pi) \\
        w &= B\,\mathrm{GELU}(u + W u + b), \qquad v = w + \mathrm{DWConv}'_3(w) \\
        y &= \lambda \odot v + \beta + \rho \odot x + \delta

    where :math:`*` is a depthwise convolution, :math:`\pi` has a share of every kernel size for each token, and the
    router :math:`R` has one hidden layer with a GELU. A stage is the blocks with the method that are in one sequence of
    the backbone and equally wide (in a plain ViT all of them), and :math:`M` is the number of these blocks. All modules
    of a stage mix the same pool, which is counted, trained and stored once.

    With both sites a stage of :math:`M` blocks of width :math:`C` has :math:`2M(43C + r^2 + 4r + 23 + 85M)` parameters
    in its modules and :math:`M(2rC + 83r)` in its pool, for rank :math:`r` and the other defaults: 5,239,152 in all of
    Swin-B and 7,296,624 in Swin-L.

    The published code also trains the norms at the outputs of its backbones, which begin anew. In a config that is
    ``trainable='output_norms'`` beside ``peft``; they are 3,840 parameters more in Swin-B and 5,760 in Swin-L. Its Mask
    R-CNN with Swin-B has ``layer_scale=1e-5, residual_scale=False``. Its ConvNeXt and its ViT have ``post_ffn`` alone.

    Class and register tokens pass unchanged, and the router reads the mean of the grid's tokens, as in the published
    ViT. A head that reads the class token alone sees nothing of the module behind the last block.

    Two options of the published code are left out: a trained temperature for each :math:`g`, which is a factor on the
    router's output and becomes one when a checkpoint is converted, and float16 within the module alone, in whose place
    there is the autocast of the training loop.

    Source: Lou, Yu and Yu, "Parameters as Experts: Adapting Vision Models with Dynamic Parameter Routing", ICML 2026,
    and the shapes, the order of operations and the initial values of its published code.

    Args:
        channels: width ``C`` of the token stream.
        rank: inner width ``r`` of the adapter.
        kernel_sizes: kernel sizes of the mixed depthwise convolutions, in the order in which they follow each other.
        router_width: width of the hidden layer of the router.
        layer_scale: initial value of the factors on the adapter's branch.
        residual_scale: whether the residual has a factor and a bias for each channel; otherwise it is added as it is.

    Raises:
        ConfigError: if a width is not a whole number of at least 1, ``kernel_sizes`` are not at least two different
            odd whole numbers, or ``layer_scale`` is negative.
    """

    sites = ('post_attn', 'post_ffn')

    @checked
    def __init__(
        self,
        channels: int,
        rank: Width = 128,
        kernel_sizes: SeveralKernelSizes = (3, 5, 7),
        router_width: Width = 16,
        layer_scale: Ratio = 1.0,
        residual_scale: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.rank, self.kernel_sizes = channels, rank, tuple(kernel_sizes)
        self.initial_scale = layer_scale
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(torch.empty(channels))
        self.opening = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.router = nn.Sequential(nn.Linear(channels, router_width), nn.GELU(), nn.Identity())
        self.mixing = nn.Linear(rank, len(kernel_sizes))
        self.chain = nn.Parameter(torch.empty(2 * len(kernel_sizes) - 2))
        self.project = nn.Linear(rank, rank)
        self.closing = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.scale = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.residual_scale = nn.Parameter(torch.empty(channels)) if residual_scale else None
        self.residual_bias = nn.Parameter(torch.empty(channels)) if residual_scale else None
        self._use(ExpertPool(1, channels, rank, kernel_sizes), resets_pool=True)
        self.reset_parameters()

    @classmethod
    def share(cls, modules: Mapping[str, Mapping[str, 'ParaX']]) -> None:
        """Give the modules of each stage one pool, with as many experts as there are blocks.

        Where blocks have ranks of their own (a dict of patterns), those of the same rank share a pool. What is shared
        are the parameters: each module has them in an object of its own, since torch's ``functional_call`` leaves a
        module that has several names with other tensors than it had.
        """
        stages: dict[tuple[str, int, int], list[tuple[str, ParaX]]] = {}
        for path, of_block in modules.items():
            for module in of_block.values():
                stages.setdefault((_sequence_of(path), module.channels, module.rank), []).append((path, module))
        for (_, channels, rank), members in stages.items():
            pool = ExpertPool(len({path for path, _ in members}), channels, rank, members[0][1].kernel_sizes)
            for _, module in members:
                own = copy.deepcopy(pool, {id(p): p for p in pool.parameters()})
                module._use(own, resets_pool=module is members[0][1])

    def _use(self, pool: ExpertPool, resets_pool: bool) -> None:
        """Mix the experts of ``pool``, for whose shares the router gets a new last layer."""
        self.pool, self.resets_pool = pool, resets_pool
        kinds = 2 + len(self.kernel_sizes)
        self.router[2] = nn.Linear(self.router[0].out_features, kinds * len(pool.down))
        self._reset(self.router[2])

    def reset_parameters(self) -> None:
        """Initialise as the published code. Of the modules that share a pool one initialises it."""
        self.norm.reset_parameters()
        nn.init.constant_(self.norm_scale, 1e-5)
        for layer in (self.opening, self.router[0], self.router[2], self.mixing, self.project, self.closing):
            self._reset(layer)
        nn.init.constant_(self.scale, self.initial_scale)
        nn.init.ones_(self.chain)
        nn.init.zeros_(self.bias)
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)
            nn.init.zeros_(self.residual_bias)
        if self.resets_pool:
            self.pool.reset_parameters()

    @staticmethod
    def _reset(layer: nn.Linear | nn.Conv2d) -> None:
        layer.reset_parameters()
        nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``. Class and register tokens, which come first, stay as they are."""
        extra = x.shape[1] - hw[0] * hw[1]
        adapt = self._adapt_fast if self.fast and not is_traced() and self._fits_fast() else self._adapt
        return torch.cat((x[:, :extra], adapt(x[:, extra:], hw)), dim=1) if extra else adapt(x, hw)

    def _adapt(self, x: Tensor, hw: Grid) -> Tensor:
        s = self.norm(x) * self.norm_scale + x
        t = s + _tokens(self.opening(_grid(s, hw)))
        down, up, filters = self.pool(self._gates(t))
        z = t @ down.mT
        steps = [_tokens(step) for step in self._convolved(_grid(z, hw), filters, fast=False)]
        shares = self.mixing(sum(steps)).softmax(-1).unsqueeze(-2).unbind(-1)
        u = z + sum(share * step for share, step in zip(shares, steps, strict=True))
        w = F.gelu(u + self.project(u)) @ up.mT
        v = w + _tokens(self.closing(_grid(w, hw)))
        residual = x if self.residual_scale is None else self.residual_scale * x + self.residual_bias
        return self.scale * v + self.bias + residual

    def _gates(self, t: Tensor) -> Tensor:
        """The shares ``(B, kinds, M)`` of the experts for the tokens ``(B, H*W, C)`` of each image."""
        return self.router(t.mean(1)).unflatten(-1, (-1, self.pool.down.shape[0])).softmax(-1)

    def _convolved(self, z: Tensor, filters: Sequence[Tensor], fast: bool) -> list[Tensor]:
        """Convolve ``(B, r, H, W)`` with the filters of each image, one after another; each step is kept."""
        steps: list[Tensor] = []
        for i, kernel in enumerate(filters):
            given = self.chain[2 * i - 2] * z + self.chain[2 * i - 1] * steps[-1] if steps else z
            steps.append(_convolve_each(given, kernel, fast))
        return steps

    def _fits_fast(self) -> bool:
        """Whether no part of this module has a hook or has been replaced, which :meth:`_adapt_fast` would not call."""
        return all(type(m) in _PARTS and not is_hooked(m) for child in self.children() for m in child.modules())

    def _adapt_fast(self, x: Tensor, hw: Grid) -> Tensor:
        """Compute the same as :meth:`_adapt` in fewer passes over the tokens.

        Every factor and residual of a depthwise convolution of the stream is in its kernel. The stream stays
        ``(B, N, C)`` in memory, and the inner state ``(B, r, H, W)``: each projection writes the layout that the next
        step reads, so that nothing is copied.
        """
        entrance = self.norm_scale * self.norm.weight, self.norm_scale * self.norm.bias
        s = F.layer_norm(x, x.shape[-1:], *entrance, self.norm.eps) + x
        t = _tokens(convolve(_grid(s, hw), _with_residual(self.opening.weight), self.opening.bias))
        down, up, filters = self.pool(self._gates(t))
        z = (down @ t.mT).unflatten(-1, hw)
        steps = self._convolved(z, filters, fast=True)
        shares = (self.mixing.weight @ sum(steps).flatten(2) + self.mixing.bias[:, None]).softmax(1).unflatten(-1, hw)
        u = z
        for share, step in zip(shares.split(1, 1), steps, strict=True):
            u = torch.addcmul(u, share, step)
        projected = _with_residual(self.project.weight) @ u.flatten(2) + self.project.bias[:, None]
        w = F.gelu(projected).mT @ up.mT
        kernel, bias = _with_residual(self.closing.weight), self.closing.bias
        offset = self.bias if self.residual_bias is None else self.bias + self.residual_bias
        if w.dtype.itemsize < 4:  # a small branch would be lost in the rounding of its sum with a larger bias
            y = self.scale * _tokens(convolve(_grid(w, hw), kernel, bias)) + offset
        else:
            kernel, bias = self.scale[:, None, None, None] * kernel, self.scale * bias + offset
            y = _tokens(convolve(_grid(w, hw), kernel, bias))
        return y + x if self.residual_scale is None else torch.addcmul(y, self.residual_scale, x)


def _sequence_of(path: str) -> str:
    """The path of the list that a block is in, ``'stages.2.blocks'`` of ``'stages.2.blocks.5'``."""
    names = path.split('.')
    return '.'.join(names[: max((i for i, name in enumerate(names) if name.isdigit()), default=0)])


_PARTS = {ExpertPool, nn.LayerNorm, nn.Linear, nn.Sequential, nn.ParameterList, nn.Conv2d, nn.GELU}
"""The classes of the modules of a ParaX."""


def _grid(tokens: Tensor, hw: Grid) -> Tensor:
    """View tokens ``(B, H*W, n)`` as a grid ``(B, n, H, W)``, in channels-last format and without a copy."""
    return tokens.unflatten(1, hw).permute(0, 3, 1, 2)


def _tokens(grid: Tensor) -> Tensor:
    """Bring a grid ``(B, n, H, W)`` to tokens ``(B, H*W, n)``, with a copy only if it is not channels-last."""
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def _convolve_each(grid: Tensor, kernels: Tensor, fast: bool) -> Tensor:
    """Convolve ``(B, n, H, W)`` depthwise with the kernels ``(B, n, k, k)`` of each image.

    All channels of all images are groups of one convolution: what is traced or exported is for one size of the batch.
    """
    one = grid.reshape(1, -1, *grid.shape[2:])
    return convolve(one, kernels.flatten(0, 1).unsqueeze(1), fast=fast).reshape(grid.shape)


def _with_residual(weight: Tensor) -> Tensor:
    """The weight of a linear layer, or of a depthwise 3x3 convolution, that adds its input to its output."""
    if weight.dim() == 2:
        return weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return weight + F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
