"""Where a method may attach, per host: the only file that knows the blocks of the OpenMMLab backbones.

A *host* is a stock backbone class, a *site* a named place in each of its blocks. At a stream site a method maps tokens
``(B, N, C)``, given the grid's ``(H, W)``; at a linear site it adds to the output of a linear layer:

=================================  =================================================================================
``post_attn``, ``post_ffn``        maps the token stream after the residual add
``attn_branch``, ``ffn_branch``    maps the branch's output before DropPath and the residual add
``attn_out``, ``ffn_out``          maps the branch's output after DropPath, before the residual add
``parallel_ffn``                   adds a branch of the un-normalised residual beside the FFN, after DropPath
``q``, ``k``, ``v``, ``proj``,     adds a branch of the linear's input to its output; of the fused ``qkv`` to the
``fc1``, ``fc2``                   slice of that name
=================================  =================================================================================

:func:`inject` puts :class:`PeftBlock` in front of the class of every block, hangs the method's modules under the
block's new child ``peft``, and hooks the DropPath and linear modules of the sites in use; nothing else changes. The
names of the base's parameters stay, the backbone's own class stays, and with modules that do nothing the block computes
what the stock one does, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mona_mm.errors import ConfigError, UnsupportedHostError

STREAM_SITES = ('post_attn', 'post_ffn', 'attn_branch', 'ffn_branch', 'attn_out', 'ffn_out', 'parallel_ffn')
LINEAR_SITES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')
_QKV = ('q', 'k', 'v')


@dataclass(frozen=True)
class Host:
    """What has to be known about a stock backbone class.

    Args:
        block: qualified name of its block class; a block of any other class, a subclass included, is not touched.
        output_norms: prefixes of the norms of the backbone's outputs, which pretraining checkpoints do not hold.
        attn_end: the last module of a block's attention branch, a DropPath.
        attn: the module in a block that holds the linears ``qkv`` and ``proj``.
        grid_source: the child that returns ``(tokens, (H, W))``, where blocks are not handed ``(H, W)`` themselves.
    """

    block: str
    output_norms: tuple[str, ...] = ()
    attn_end: str = 'attn.drop'
    attn: str = 'attn.w_msa'
    grid_source: str | None = None

    def end(self, site: str) -> str:
        """The last module, a DropPath, of the branch that ``*_branch`` and ``*_out`` sites are about."""
        return self.attn_end if site.startswith('attn') else 'ffn.dropout_layer'

    def linear(self, site: str) -> str:
        """The linear layer of a block that a linear site is in."""
        paths = {'proj': f'{self.attn}.proj', 'fc1': 'ffn.layers.0.0', 'fc2': 'ffn.layers.1'}
        return paths.get(site, f'{self.attn}.qkv')

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
        block='mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer',
        attn='attn',
        attn_end='attn.out_drop',
        grid_source='patch_embed',
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

        def forward(x: Tensor) -> Tensor:
            if hw:
                self.grid.hw = hw[0]  # for the sites that are reached by a hook
            residual = self.at('post_attn', x + self.attn(self.norm1(x), *hw))
            x = self.ffn(self.norm2(residual), identity=residual)
            if 'parallel_ffn' in self.peft:
                x = x + self.at('parallel_ffn', residual)
            return self.at('post_ffn', x)

        if getattr(self, 'with_cp', False) and torch.is_grad_enabled():
            # The stock blocks use the re-entrant form, which needs an input that requires a gradient: under a frozen
            # base the first block's does not, though its modules do.
            return checkpoint(forward, x, use_reentrant=False)
        return forward(x)

    def at(self, site: str, x: Tensor) -> Tensor:
        """``x`` through the module at a stream site, if there is one."""
        return self.peft[site](x, self.grid.hw) if site in self.peft else x

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


def inject(backbone: nn.Module, sites: Sequence[str], build: Callable[..., nn.Module]) -> None:
    """Attach a method to every block of ``backbone``, in place.

    Args:
        backbone: an instance of one of :data:`HOSTS`.
        sites: where in each block.
        build: makes one module: for a stream site from ``channels``, for a linear site from ``in_channels`` and
            ``out_channels``.

    Raises:
        UnsupportedHostError: see :func:`find_host`.
        ConfigError: if the backbone already carries a method.
    """
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
        block.__class__ = _peft_class(type(block))
        block.grid = grid
        block.peft = PeftModules({site: build(*_widths(host, block, site)) for site in sites})
        for site in sites:
            if site in LINEAR_SITES:
                _bound(block, host.linear(site)).register_forward_hook(partial(_add_to_linear, site))
            elif site.endswith('_branch'):
                _bound(block, host.end(site)).register_forward_pre_hook(partial(_map_branch, site))
            elif site.endswith('_out'):
                _bound(block, host.end(site)).register_forward_hook(partial(_map_out, site))


def _widths(host: Host, block: nn.Module, site: str) -> tuple[int, ...]:
    if site not in LINEAR_SITES:
        return (block.norm1.weight.numel(),)
    linear = block.get_submodule(host.linear(site))
    return linear.in_features, linear.out_features // (3 if site in _QKV else 1)


def _bound(block: nn.Module, path: str) -> nn.Module:
    """A module of a block that knows the block, for hooks on it."""
    module = block.get_submodule(path)
    module.__dict__['peft_block'] = block  # not by setattr: as a child, the block would be its own descendant
    return module


# Hooks are module-level functions that read their host: a closure would keep serving the source model after a deepcopy.


def _map_branch(site: str, end: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return end.peft_block.at(site, args[0]), *args[1:]


def _map_out(site: str, end: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return end.peft_block.at(site, out)


def _add_to_linear(site: str, linear: nn.Linear, args: tuple[Tensor], out: Tensor) -> Tensor:
    branch = linear.peft_block.peft[site](args[0])
    if site in _QKV:
        start = _QKV.index(site) * branch.shape[-1]
        branch = F.pad(branch, (start, out.shape[-1] - start - branch.shape[-1]))
    return out + branch


def _remember_grid(patch_embed: nn.Module, args: tuple, output: tuple[Tensor, tuple[int, int]]) -> None:
    patch_embed.grid.hw = tuple(output[1])


def method_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that a method added to ``model``."""
    return [child for m in model.modules() if isinstance(m, PeftModules) for child in m.values()]


def method_names(model: nn.Module) -> set[str]:
    """The state-dict names of everything that a method added to ``model``."""
    return {
        f'{path}.{name}' for path, m in model.named_modules() if isinstance(m, PeftModules) for name in m.state_dict()
    }
