"""Where a method may attach, per host: the only file that knows the blocks of the OpenMMLab backbones.

A *host* is a stock backbone class, a *site* a named place in each of its blocks:

=================  ==================================================================================================
``post_attn``      maps the token stream ``(B, N, C)`` after the attention residual, given the grid's ``(H, W)``
``post_ffn``       maps the token stream ``(B, N, C)`` after the FFN residual, given the grid's ``(H, W)``
=================  ==================================================================================================

:func:`inject` puts :class:`PeftBlock` in front of the class of every block and hangs the method's modules under the
block's new child ``peft``; nothing else changes. The names of the base's parameters stay, the backbone's own class
stays, and with no module at a site the block computes what the stock one does, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.methods.base import PeftModule

SITES = ('post_attn', 'post_ffn')


@dataclass(frozen=True)
class Host:
    """What has to be known about a stock backbone class.

    Args:
        block: qualified name of its block class; a block of any other class, a subclass included, is not touched.
        output_norms: prefixes of the norms of the backbone's outputs, which pretraining checkpoints do not hold.
        grid_source: the child that returns ``(tokens, (H, W))``, where blocks are not handed ``(H, W)`` themselves.
    """

    block: str
    output_norms: tuple[str, ...] = ()
    grid_source: str | None = None

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        """The blocks of ``backbone``, in order, whether or not a method has been injected."""
        return [m for m in backbone.modules() if qualified_name(stock_class(m)) == self.block]


def _swin(path: str) -> dict[str, Host]:
    output_norms = ('norm0.', 'norm1.', 'norm2.', 'norm3.')
    return {f'{path}.SwinTransformer': Host(block=f'{path}.SwinBlock', output_norms=output_norms)}


HOSTS: dict[str, Host] = {
    **_swin('mmdet.models.backbones.swin'),
    **_swin('mmseg.models.backbones.swin'),
    **_swin('mmpretrain.models.backbones.swin_transformer'),
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': Host(
        block='mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer', grid_source='patch_embed'
    ),
}
"""The supported backbones by qualified class name. Attribute names alone would also match others (BEiT's blocks have
the same ones) and change what those compute."""


def find_host(backbone: nn.Module) -> Host:
    """The :class:`Host` of a backbone object.

    Raises:
        UnsupportedHostError: if its class is not in :data:`HOSTS`, or it holds no block of the class named there.
    """
    for cls in type(backbone).__mro__:
        host = HOSTS.get(qualified_name(cls))
        if host is not None:
            if host.blocks(backbone):
                return host
            break
    raise UnsupportedHostError(
        f'{qualified_name(type(backbone))} is not a supported host. Supported backbones: {", ".join(sorted(HOSTS))}. '
        'To only choose what trains in another module, use mona_mm.FrozenModel.'
    )


def qualified_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


class PeftModules(nn.ModuleDict):
    """The modules that a method added to one block, by site."""


class TokenGrid:
    """The ``(H, W)`` of the tokens in the running forward pass, shared by a backbone's patch embedding and blocks."""

    hw: tuple[int, int] | None = None


class PeftBlock:
    """Mixin in front of a host's block class; the forward of a pre-norm transformer block, with sites."""

    peft: PeftModules
    grid: TokenGrid

    def forward(self, x: Tensor, *hw: tuple[int, int]) -> Tensor:
        """``(B, N, C) -> (B, N, C)``; ``hw`` is passed by the hosts whose attention needs it."""
        grid = hw[0] if hw else self.grid.hw

        def forward(x: Tensor) -> Tensor:
            x = self._at('post_attn', x + self.attn(self.norm1(x), *hw), grid)
            return self._at('post_ffn', self.ffn(self.norm2(x), identity=x), grid)

        if getattr(self, 'with_cp', False) and torch.is_grad_enabled():
            # The stock blocks use the re-entrant form, which needs an input that requires a gradient: under a frozen
            # base the first block's does not, though its modules do.
            return checkpoint(forward, x, use_reentrant=False)
        return forward(x)

    def _at(self, site: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.peft[site](x, grid) if site in self.peft else x

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class below is made at run time, so pickle cannot find it by name.
        return _new_peft_block, (stock_class(self),), self.__dict__


@cache
def _peft_class(block_class: type) -> type:
    return type(f'Peft{block_class.__name__}', (PeftBlock, block_class), {'__module__': __name__})


def _new_peft_block(block_class: type) -> nn.Module:
    cls = _peft_class(block_class)
    return cls.__new__(cls)


def stock_class(module: nn.Module) -> type:
    """The class that the OpenMMLab code gave a module."""
    return type(module).__mro__[2] if isinstance(module, PeftBlock) else type(module)


def inject(backbone: nn.Module, method: type[PeftModule], build: Callable[[int], PeftModule]) -> None:
    """Attach a method to every block of ``backbone``, in place.

    Args:
        backbone: an instance of one of :data:`HOSTS`.
        method: the method's class, whose ``sites`` say where.
        build: makes one module of it from a channel count.

    Raises:
        UnsupportedHostError: see :func:`find_host`.
        ConfigError: if the backbone already carries a method, or the method names an unknown site.
    """
    unknown = set(method.sites) - set(SITES)
    if unknown:
        raise ConfigError(f'{method.__name__}: unknown sites {sorted(unknown)}; sites are {", ".join(SITES)}.')
    host = find_host(backbone)
    if method_modules(backbone):
        raise ConfigError(
            f'{type(backbone).__name__} already carries a method; build a fresh backbone for another one.'
        )

    grid = TokenGrid()
    if host.grid_source is not None:
        source = backbone.get_submodule(host.grid_source)
        source.grid = grid
        source.register_forward_hook(_remember_grid)
    for block in host.blocks(backbone):
        channels = block.norm1.weight.numel()
        block.__class__ = _peft_class(type(block))
        block.grid = grid
        block.peft = PeftModules({site: build(channels) for site in method.sites})


def _remember_grid(patch_embed: nn.Module, args: tuple, output: tuple[Tensor, tuple[int, int]]) -> None:
    # A module-level function that reads its host: a closure would keep serving the source model after a deepcopy.
    patch_embed.grid.hw = tuple(output[1])


def method_modules(model: nn.Module) -> list[PeftModule]:
    """Every module that a method added to ``model``."""
    return [child for m in model.modules() if isinstance(m, PeftModules) for child in m.values()]


def method_names(model: nn.Module) -> set[str]:
    """The state-dict names of everything that a method added to ``model``."""
    return {
        f'{path}.{name}' for path, m in model.named_modules() if isinstance(m, PeftModules) for name in m.state_dict()
    }
