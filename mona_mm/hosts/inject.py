"""Attach modules at the sites of a backbone's blocks, and detach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.hosts.block import HookedBlock, PassedGrid, PeftBlock, hook_sites, unhook_sites
from mona_mm.hosts.host import BlockSpec, Grid, GridSource, Host, find_host
from mona_mm.hosts.sites import PeftModules, method_modules
from mona_mm.nn.mixin import mix_in, mix_out
from mona_mm.nn.substitute import call_substituted, substitute


class Site(NamedTuple):
    """A site of one block.

    Args:
        widths: ``(channels,)`` of a stream site, ``(in_channels, out_channels)`` of a linear site.
        is_called: whether the host calls the linear layer of the site as a module; otherwise it reads the weight.
        block_size: the number of parameters of the block.
    """

    widths: tuple[int, ...]
    is_called: bool = True
    block_size: int = 0


Sites = Mapping[str, Mapping[str, Site]]
"""The sites of each block, by the path of the block."""


def sites_of(backbone: nn.Module) -> Sites:
    """Describe the sites of the blocks of a backbone.

    Raises:
        UnsupportedHostError: see :func:`mona_mm.hosts.find_host`.
    """
    host, found = find_host(backbone), {}
    for path, block in host.blocks(backbone).items():
        spec, size = host.spec(block), sum(p.numel() for p in block.parameters())
        found[path] = {
            site: Site(spec.widths(block, site), site not in spec.linears or spec.linears[site].is_called, size)
            for site in spec.sites
        }
    return found


def inject(backbone: nn.Module, modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Attach the modules of a method to the blocks of ``backbone``, in place.

    A :class:`PeftBlock` is put in front of the class of every block, the modules become children of the block's new
    child ``peft``, and the ends of branches and the linear layers at the sites in use get hooks. Nothing else changes:
    the base's parameters keep their names, the backbone keeps its class, and with modules that do nothing a block
    computes the same as the stock one, bit for bit. :func:`remove` undoes it.

    Args:
        backbone: a supported backbone.
        modules: the modules by path of a block and name of a site.

    Raises:
        UnsupportedHostError: see :func:`mona_mm.hosts.find_host`.
        ConfigError: if the backbone already carries a method, a module is at a site whose weight the host reads
            directly and does not add to that weight, a convolution at a linear site is no linear layer of its weight,
            or a module reads the grid of tokens that are in another order.
    """
    host = find_host(backbone)
    if method_modules(backbone):
        raise ConfigError(
            f'{type(backbone).__name__} already carries a method. Build a new backbone for another method.'
        )
    blocks = host.blocks(backbone)
    for path, attached in modules.items():
        for site, module in attached.items():
            _check_reach(backbone, host.spec(blocks[path]), site, module)
            _check_linear(backbone, path, host.spec(blocks[path]), site)
            _check_order(backbone, host.spec(blocks[path]), site, module)
    _checkpoint_blocks(backbone, blocks)
    sources = _grid_sources(backbone, host, blocks)
    if sources:
        # A bound method would be pickled by its name, and would become the host's own forward when it is loaded.
        backbone.forward = partial(forward_on_grid, backbone, sources)
    for path, block in blocks.items():
        spec = host.spec(block)
        mix_in(block, spec.mixin or HookedBlock)
        block.spec = spec
        block.peft = PeftModules(modules.get(path, {}))
        on_stream = [site for site in block.peft if site not in spec.linears]
        if on_stream:
            block.stream_width = spec.widths(block, on_stream[0])[0]
        hook_sites(block)


def remove(backbone: nn.Module) -> None:
    """Undo :func:`inject`, in place, so that the blocks are stock ones without the method's modules.

    Activation checkpoints that the backbone had around its blocks are not put back.
    """
    forward = vars(backbone).get('forward')
    if isinstance(forward, partial) and forward.func is forward_on_grid:
        del backbone.forward
    for block in [m for m in backbone.modules() if isinstance(m, PeftBlock)]:
        unhook_sites(block)
        del block.peft, block.spec, block.hooked
        vars(block).pop('stream_width', None)
        mix_out(block)


def modules_beside_linears(backbone: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield the modules of a method at linear sites, each with the stock weight ``(out, in)`` of its site."""
    for block in [m for m in backbone.modules() if isinstance(m, PeftBlock)]:
        for site, module in block.peft.items():
            linear = block.spec.linears.get(site)
            if linear is not None:
                weight = block.get_parameter(linear.weight)
                yield module, weight[linear.rows(weight)].flatten(1)


def _check_reach(backbone: nn.Module, spec: BlockSpec, site: str, module: nn.Module) -> None:
    if site in spec.linears and not spec.linears[site].is_called and not getattr(module, 'is_weight_delta', False):
        raise ConfigError(
            f'{type(backbone).__name__} reads the weight of {site!r} directly, so only a module that adds to the '
            f'weight can attach there (LoRA with dropout=0 does), and this {type(module).__name__} does not. Other '
            f'sites of this backbone: {", ".join(s for s, linear in spec.linears.items() if linear.is_called)}.'
        )


_STANDARDISED = ('ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'StdConv2dSame', 'ScaledStdConv2d', 'ScaledStdConv2dSame')
"""The convolutions of mmcv and timm that standardise their weight before they use it."""


def _check_linear(backbone: nn.Module, path: str, spec: BlockSpec, site: str) -> None:
    linear = spec.linears.get(site)
    module = backbone.get_submodule(f'{path}.{linear.module}') if linear is not None else None
    if not isinstance(module, nn.Conv2d):
        return
    wrong = ''
    if any(cls.__name__ in _STANDARDISED for cls in type(module).__mro__):
        wrong = 'standardises its weight, so that an addition to its output is no addition to the weight'
    elif module.groups != 1 or tuple(module.kernel_size) != (1, 1) or module.padding not in ((0, 0), 'same', 'valid'):
        wrong = f'has groups={module.groups}, kernel_size={module.kernel_size} and padding={module.padding}'
    if wrong:
        raise ConfigError(
            f'{type(backbone).__name__}: {path}.{linear.module}, the convolution at {site!r}, is a '
            f'{type(module).__name__}, which {wrong}. A linear layer is a plain 1x1 convolution in one group without '
            f'padding. Leave {site!r} out of sites=[...], or use a method that maps the stream, such as Mona.'
        )


def _checkpoint_blocks(backbone: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Let blocks have their own activation checkpoints where the modules around them would checkpoint them, in place.

    That is the re-entrant form, in which a method gets no gradient if the input of a block requires none, as that of
    the first one does under a frozen base.
    """
    around = []
    for path, block in blocks.items():
        parts = path.split('.')
        parents = [backbone.get_submodule('.'.join(parts[:depth])) for depth in range(len(parts))]
        flags = [
            (p, flag) for p in parents for flag in ('with_cp', 'use_checkpoint') if getattr(p, flag, False) is True
        ]
        if flags and not hasattr(block, 'with_cp'):
            block.with_cp = True
            around += flags
    for parent, flag in around:
        setattr(parent, flag, False)


def _check_order(backbone: nn.Module, spec: BlockSpec, site: str, module: nn.Module) -> None:
    if site not in spec.linears and not spec.row_major and getattr(module, 'needs_grid', True):
        raise ConfigError(
            f'{type(module).__name__} reads the grid of the tokens, and {spec.cls.rpartition(".")[2]} of '
            f"{type(backbone).__name__} has them in another order than that of the grid's rows. Use a method that maps "
            'every token alone (needs_grid = False in its class, as in Adapter, AdaptFormer and LoRand), or one at '
            'linear layers, such as LoRA.'
        )


def _grid_sources(
    backbone: nn.Module, host: Host, blocks: Mapping[str, nn.Module]
) -> tuple[tuple[str, Callable, tuple[str, ...]], ...]:
    """The modules that show the grid: the path of each, its function and the paths of the blocks on that grid."""
    found: dict[tuple[str, Callable], list[str]] = {}
    modules = dict(backbone.named_modules())
    for path, block in blocks.items():
        source = host.spec(block).grid
        if not isinstance(source, GridSource) or source.is_in_block:
            continue
        around = path
        while around:  # from the nearest module around the block to the backbone itself
            around = around.rpartition('.')[0]
            shown_by = f'{around}.{source.path}' if around else source.path
            if shown_by in modules:
                found.setdefault((shown_by, source.find), []).append(path)
                break
        else:
            raise ConfigError(
                f'{type(backbone).__name__}: nothing around {path} has a {source.path}, which is to show the grid of '
                'its tokens.'
            )
    return tuple((path, find, tuple(of_blocks)) for (path, find), of_blocks in found.items())


def forward_on_grid(
    backbone: nn.Module, sources: tuple[tuple[str, Callable, tuple[str, ...]], ...], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The forward of a backbone that does not pass the grid to its blocks; this one passes it as an extra argument.

    Args:
        backbone: the backbone, whose class's forward runs.
        sources: for each module whose call shows a grid its path, the function that finds the grid in the call (see
            :class:`GridSource`), and the paths of the blocks on that grid.
        args: the positional arguments of the forward.
        kwargs: the keyword arguments of the forward.
    """
    parts: dict[str, Any] = {}
    for path, find, blocks in sources:
        grid: list[Grid] = []
        parts[path] = _watched(backbone.get_submodule(path), find, grid)
        parts |= {block: _OnGrid(backbone.get_submodule(block), grid) for block in blocks}
    return call_substituted(backbone, parts, lambda stand_in: type(backbone).forward(stand_in, *args, **kwargs))


def _watched(child: nn.Module, find: Callable, grid: list[Grid]) -> nn.Module:
    """Make a stand-in for a module, with all its attributes, whose call puts the grid that it shows into a list."""
    stand_in = substitute(child, {})
    vars(stand_in)['forward'] = partial(_remember_grid, child, find, grid)
    return stand_in


def _remember_grid(child: nn.Module, find: Callable, grid: list[Grid], *args: Any, **kwargs: Any) -> Any:
    output = child.forward(*args, **kwargs)
    grid[:] = [find(child, args, output)]
    return output


class _OnGrid(nn.Module):
    """A stand-in for a block that gives it the grid in a list. It is a module, since a ``ModuleList`` can be sliced,
    and ``torch.compile`` reads a module, only if all children are modules."""

    def __init__(self, block: nn.Module, grid: list[Grid]) -> None:
        super().__init__()
        self.block = block
        self.grid = grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, with the grid as its last positional argument if it is known by now."""
        return self.block(*args, *map(PassedGrid, self.grid), **kwargs)
