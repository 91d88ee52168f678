"""Rein: low-rank tokens at every layer, by which the features are refined, and which may be linked to a decoder."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mona_mm.hosts import Grid
from mona_mm.methods.base import StreamModule
from mona_mm.nn.tracing import is_hooked
from mona_mm.options import LARGEST, Count, Positive, Rule, Width, checked
from mona_mm.registry import METHODS

Tokens = Annotated[int, Rule('a whole number of at least 2', lambda value: 2 <= value <= LARGEST)]


class ScaledLinear(nn.Linear):
    """A linear layer with a factor before its output."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Compute ``scale * (x W + b)`` of ``(..., in)``.

        The factor is multiplied into the weight, so that no activation is kept for its gradient.
        """
        return F.linear(x, scale * self.weight, scale * self.bias)


@METHODS.register_module()
class Rein(StreamModule):
    r"""Attention from the features of every block to a few tokens of its own, after the FFN residual.

    .. math::
        T_i &= A_i B_i \\
        S_i &= \mathrm{softmax}(f_i T_i^\top / \sqrt{m}) \\
        \bar f_i &= S_i[:, 1:]\, (T_i[1:]\, W_T + b_T) \\
        y_i &= f_i + s\, ((\bar f_i + f_i)\, W_f + b_f)

    The features :math:`f_i` of the patches have :math:`m` channels, and :math:`A_i` and :math:`B_i` are :math:`t
    \times r` and :math:`r \times m` for :math:`t` tokens of rank :math:`r`. The softmax is over the tokens. The first
    token takes a share of it and adds nothing, so that features can be left as they are. Class and register tokens are
    left alone; the size of the grid tells which they are. Blocks of one width have :math:`W_T` and :math:`W_f` in
    common, and all blocks the scale :math:`s`.

    With ``link`` the tokens also make the queries of a decoder, one of each,

    .. math::
        Q_i &= T_i W_Q + b_Q \\
        Q &= [\max_i Q_i,\; \mathrm{mean}_i Q_i,\; Q_\mathrm{last}]\, W_L + b_L

    of width :math:`q`, with :math:`W_Q` in common to the blocks of one width, and one :math:`W_L`. The model is then
    built by ``mona_mm.LinkedModel``, which puts them in the place of the decoder's own queries.

    A block has :math:`r(t + m)` parameters, each width :math:`2m(m + 1)` and the scale 1; the link has :math:`q(m + 1)`
    for each width and :math:`q(3q + 1)`. That is 388,609 in DINOv2-S and 2,530,817 in DINOv2-L, and 684,033 and
    2,990,081 with a link to queries of width 256.

    Source: Wei et al., "Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized
    Semantic Segmentation", CVPR 2024, sections 3.2 and 3.3, of whose formulas this is an implementation. Not from the
    paper are the initial values, which it does not give, and one pair of projections for each width where the widths of
    blocks differ.

    Args:
        channels: width ``C`` of the token stream.
        num_tokens: number of tokens of a block.
        rank: rank of the tokens.
        scale: initial value of the factor before what is added, which trains.
        link: width of the decoder's queries that are made of the tokens, ``num_tokens`` of them; None for none.

    Raises:
        ConfigError: if ``num_tokens`` is not a whole number of at least 2, ``rank`` or ``link`` not one of at least 1,
            or ``scale`` not a number above 0.
    """

    sites = ('post_ffn',)
    possible_sites = ('post_attn', 'post_ffn')

    @checked
    def __init__(
        self,
        channels: int,
        num_tokens: Tokens = 100,
        rank: Width = 16,
        scale: Positive = 1e-3,
        link: Count | None = None,
    ) -> None:
        super().__init__()
        self.initial_scale = scale
        self.link = link
        self.a = nn.Parameter(torch.empty(num_tokens, rank))
        self.b = nn.Parameter(torch.empty(rank, channels))
        self.value = nn.Linear(channels, channels)
        self.update = ScaledLinear(channels, channels)
        self.scale = nn.Parameter(torch.empty(()))
        if link is not None:
            self.query = nn.Linear(channels, link)
            self.merge = nn.Linear(3 * link, link)
        self._owners = (self, self)  # of what belongs to blocks of this width, and to all blocks; see share
        self.reset_parameters()

    @classmethod
    def share(cls, modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
        """Leave the projections to the first module of each width, and the scale to the first of all.

        The others refer to those modules. With the same parameters under several names, neither a parametrization of
        torch nor its ``functional_call`` would compute the same.
        """
        first, of_width = None, {}
        for module in (module for of_block in modules.values() for module in of_block.values()):
            first = first or module
            alike = of_width.setdefault(module.b.shape[1], module)
            if module is not alike:
                del module.value, module.update
            if module is not first:
                del module.scale
            if module.link is not None and module is not alike:
                del module.query
            if module.link is not None and module is not first:
                del module.merge
            module._owners = alike, first

    def reset_parameters(self) -> None:
        """Initialise the tokens' factors Xavier-uniform, so that by default tokens of 1024 channels have a standard
        deviation of 0.02 and those of 384 one of 0.04, the projections as torch does, and the scale with ``scale``."""
        for factor in (self.a, self.b):
            nn.init.xavier_uniform_(factor)
        for linear in self.children():
            linear.reset_parameters()
        if self._owners[1] is self:
            nn.init.constant_(self.scale, self.initial_scale)

    @property
    def tokens(self) -> Tensor:
        """The tokens ``(num_tokens, C)``."""
        return self.a @ self.b

    @classmethod
    def queries(cls, modules: Sequence[nn.Module]) -> Tensor:
        """Compute the queries ``(num_tokens, link)`` for a decoder from the modules of one backbone."""
        of_blocks = torch.stack([module._owners[0].query(module.tokens) for module in modules])
        return modules[0].merge(torch.cat((of_blocks.amax(0), of_blocks.mean(0), of_blocks[-1]), dim=-1))

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map tokens ``(B, N, C)`` to ``(B, N, C)``. Class and register tokens, which come first, stay as they are."""
        extra = x.shape[1] - hw[0] * hw[1]
        return torch.cat((x[:, :extra], self._refine(x[:, extra:])), dim=1) if extra else self._refine(x)

    def _refine(self, features: Tensor) -> Tensor:
        """Compute the refined features of ``(B, H*W, C)``."""
        if is_hooked(self._owners[0].update):  # which may be another block's, so that `residual` does not look at it
            return features + self._change(features)
        return self.residual(features, self._change)

    def _change(self, features: Tensor) -> Tensor:
        """Compute what is added to features ``(..., C)``."""
        (of_width, first), tokens = self._owners, self.tokens
        shares = F.softmax(features @ (tokens.T * tokens.shape[1] ** -0.5), dim=-1)
        return of_width.update(shares[..., 1:] @ of_width.value(tokens[1:]) + features, first.scale)
