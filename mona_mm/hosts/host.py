"""What has to be known about a stock backbone class so that a method can attach to its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.hosts.formats import CheckpointFormat, OwnNames
from mona_mm.hosts.sites import STREAM_SITES
from mona_mm.nn.mixin import Mixin, qualified_name, stock_class

Grid = tuple[int, int]
"""Height and width of the grid that the tokens of a block are cut from."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, or one slice of a fused one.

    Args:
        weight: name in the block of its weight ``(out, in)``, or ``(out, in, 1, 1)``.
        bias: name in the block of its bias, if it can have one.
        slice_index: which of ``num_slices`` equal slices of the weight's rows it is; None for all of them.
        num_slices: how many linear layers a fused weight holds.
        is_called: whether the host calls the layer as a module; else the host reads the weight directly.
    """

    weight: str
    bias: str | None
    slice_index: int | None = None
    num_slices: int = 3
    is_called: bool = True

    @property
    def module(self) -> str:
        """The path in the block of the module that holds the weight."""
        return self.weight.rpartition('.')[0]

    def rows(self, weight: Tensor) -> slice:
        """The rows of ``weight`` that are this linear's."""
        return self.channels(len(weight))

    def channels(self, length: int) -> slice:
        """The channels that are this linear's, of an output with ``length`` of them."""
        length = length if self.slice_index is None else length // self.num_slices
        start = length * (self.slice_index or 0)
        return slice(start, start + length)


def fused_qkv(module: str, is_called: bool = True) -> dict[str, Linear]:
    """The sites ``q``, ``k`` and ``v`` of a linear layer that computes all three, one after another."""
    weight, bias = f'{module}.weight', f'{module}.bias'
    return {site: Linear(weight, bias, index, is_called=is_called) for index, site in enumerate('qkv')}


def separate_linears(**paths: str) -> dict[str, Linear]:
    """Linear layers of their own, by site the path of the module."""
    return {site: Linear(f'{path}.weight', f'{path}.bias') for site, path in paths.items()}


@dataclass(frozen=True)
class Branch:
    """The modules that end a residual branch of a block.

    One module may end several branches of a block; its calls are counted then.

    Args:
        drop_path: path of the module whose input the ``*_branch`` site maps; empty where nothing follows ``end``, whose
            output that site then maps.
        end: path of the module whose output the ``*_out`` site maps; by default ``drop_path``.
        call: which call of these modules in a block it is, from 0; None where a block calls them once.
    """

    drop_path: str
    end: str = ''
    call: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'end', self.end or self.drop_path)


@dataclass(frozen=True)
class GridArgument:
    """The blocks of a backbone are told the grid by an argument ``(H, W)``, or by two, ``H`` and ``W``.

    Args:
        names: of the argument, or of both.
        position: of the first of them.
    """

    names: tuple[str, ...]
    position: int = 1

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """The grid among the arguments of a block's call; None if it is not there."""
        given = dict(zip(self.names, args[self.position :], strict=False)) | dict(kwargs)
        if any(name not in given for name in self.names):
            return None
        return given[self.names[0]] if len(self.names) == 1 else tuple(given[name] for name in self.names)


@dataclass(frozen=True)
class GridAttribute:
    """The blocks of a backbone are made for one grid, which is an attribute of theirs."""

    name: str

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """The grid that the block was made for."""
        return tuple(getattr(block, self.name))


def grid_in_output(child: nn.Module, args: tuple, output: tuple[Tensor, Grid]) -> Grid:
    """The grid in the output ``(tokens, (H, W))`` of a module; by its name, since blocks are pickled with it."""
    return tuple(output[1])


@dataclass(frozen=True)
class GridSource:
    """The blocks of a backbone are not told the grid; it is seen in a call of a child of the backbone, or of the block.

    Args:
        path: of the child.
        find: what makes the grid of the child, its arguments and its output; by default that is
            ``(tokens, (H, W))``.
        is_in_block: whether the child is one of the block, which is called before the sites that need the grid.
    """

    path: str
    find: Callable[[nn.Module, tuple, Any], Grid] = grid_in_output
    is_in_block: bool = False

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """None: no argument of a block's call says it."""
        return None


@dataclass(frozen=True)
class BlockSpec:
    """What has to be known about a class of blocks.

    Args:
        cls: qualified name of the class; a block of any other class, a subclass included, is not touched.
        has: path of a module that tells blocks of one class apart: only those that have it are meant.
        linears: the linear layers of a block, by site.
        branches: what ends the branches ``'attn'`` and ``'ffn'``, as far as the block has them.
        mixin: the forward of such a block, with sites: a :class:`mona_mm.hosts.block.PeftBlock`; None for the stock
            forward with hooks, :class:`mona_mm.hosts.block.HookedBlock`.
        mid_norm: path in a block of the module that the FFN begins with, whose input is the residual, where the forward
            is the stock one; None for a block of one branch.
        layout: of the stream: ``'BNC'``, ``'BHWC'`` or ``'BCHW'``.
        mid_layout: of the input of ``mid_norm``, if it is another.
        branch_layout: of what ends the branches, if it is another.
        width: name of a parameter whose first length is the stream's width; by default ``fc2`` 's weight.
        without: stream sites that the block does not have.
        grid: how the grid is known; None where the layout says it.
        uncalled: modules of a block that are never called, only their parameters read.
    """

    cls: str
    linears: Mapping[str, Linear]
    branches: Mapping[str, Branch]
    mixin: type[Mixin] | None = None
    mid_norm: str | None = None
    layout: Literal['BNC', 'BHWC', 'BCHW'] = 'BNC'
    mid_layout: Literal['BNC', 'BHWC', 'BCHW', None] = None
    branch_layout: Literal['BNC', 'BHWC', 'BCHW', None] = None
    grid: GridArgument | GridAttribute | GridSource | None = None
    has: str = ''
    width: str = ''
    without: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        has_middle = 'attn' in self.branches if self.mixin else self.mid_norm is not None
        possible = {'post_ffn', 'parallel_ffn', *(['post_attn'] if has_middle else [])}
        possible |= {f'{branch}_{place}' for branch in self.branches for place in ('branch', 'out')}
        stream = [site for site in STREAM_SITES if site in possible and site not in self.without]
        object.__setattr__(self, 'sites', (*stream, *self.linears))

    def widths(self, block: nn.Module, site: str) -> tuple[int, ...]:
        """``(channels,)`` of a stream site of a block, ``(in_channels, out_channels)`` of a linear site."""
        linear = self.linears.get(site)
        if linear is None:
            return (len(block.get_parameter(self.width or self.linears['fc2'].weight)),)
        weight = block.get_parameter(linear.weight)
        rows = linear.rows(weight)
        return weight.shape[1], rows.stop - rows.start


@dataclass(frozen=True)
class Host:
    """What has to be known about a stock backbone class.

    Args:
        specs: of its blocks, one for each of their classes.
        disordered: why the tokens are not in row-major order, if they are not: no convolution can be over them then.
        output_norms: prefixes of the norms of the backbone's outputs, which pretrained checkpoints do not hold.
        last_output: what the backbone makes of its last block's ``(B, N, C)`` and their grid: its last output.
        reads_checkpoint: whether the ``init_weights`` of the class reads the checkpoint that ``init_cfg`` names by
            itself, whatever the type in it, and knows no other ``init_cfg``.
        own_names: the names of its tensors, as regular expressions.
        formats: the checkpoints of other code that can be converted for it.
        fit_checkpoint: resizes tensors of a checkpoint, in place, to the model's own: ``(given, current)``.
        recomputed: ends of the names of buffers that it derives from its configuration.
        position_tables: ends of the names of tables that are resized where a model has another image or window size.
        not_selected: parts of the names of parameters in a block that are outside of SPT's selection.
        final_norms: paths of norms behind the last block that belong to SPT's selection.
    """

    specs: tuple[BlockSpec, ...]
    disordered: str = ''
    output_norms: tuple[str, ...] = ()
    last_output: Callable[[nn.Module, Tensor, Grid], Tensor] | None = None
    reads_checkpoint: bool = False
    own_names: OwnNames | None = None
    formats: tuple[CheckpointFormat, ...] = ()
    fit_checkpoint: Callable[[dict[str, Tensor], Mapping[str, Tensor]], None] | None = None
    recomputed: tuple[str, ...] = ()
    position_tables: tuple[str, ...] = ()
    not_selected: tuple[str, ...] = ()
    final_norms: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that its blocks have, those of each class."""
        return tuple(dict.fromkeys(site for spec in self.specs for site in spec.sites))

    @property
    def linears(self) -> dict[str, Linear]:
        """The linear layers of its blocks by site; of a site that classes of blocks have otherwise, the first's."""
        return {site: linear for spec in reversed(self.specs) for site, linear in spec.linears.items()}

    def spec(self, module: nn.Module) -> BlockSpec | None:
        """What is known about a block, None for any other module."""
        name = qualified_name(stock_class(module))
        return next((spec for spec in self.specs if spec.cls == name and _has(module, spec.has)), None)

    def blocks(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """The blocks of ``backbone`` by path, in order, whether or not a method has been injected."""
        return {path: m for path, m in backbone.named_modules() if self.spec(m) is not None}

    def ends_with_last_block(self, backbone: nn.Module) -> bool:
        """Whether it is plain to see that one of the outputs depends on the last block."""
        stages = getattr(backbone, 'stages', None) or getattr(backbone, 'layers', None)
        return isinstance(stages, nn.ModuleList) and len(stages) - 1 in backbone.out_indices


def _has(module: nn.Module, path: str) -> bool:
    for name in filter(None, path.split('.')):
        if name not in module._modules:
            return False
        module = module._modules[name]
    return True


OUTPUT_NORMS = ('norm0.', 'norm1.', 'norm2.', 'norm3.')
"""The prefixes of the norms of a hierarchical backbone's outputs."""

HOSTS: dict[str, Host] = {}
"""The supported backbones by qualified class name. Attribute names alone would also match others (BEiT's blocks have
the same ones as ViT's) and change what those compute."""


REFUSED: dict[str, str] = {}
"""Backbones that cannot be hosts, by qualified class name, and why."""


def register_host(backbone: str, host: Host) -> None:
    """Make a backbone class a host.

    Args:
        backbone: its qualified name, such as ``'mmdet.models.backbones.swin.SwinTransformer'``.
        host: what has to be known about it.

    Raises:
        ConfigError: if the class is a host already.
    """
    if backbone in HOSTS:
        raise ConfigError(f'{backbone} is a host already.')
    HOSTS[backbone] = host


def find_host(backbone: nn.Module) -> Host:
    """The :class:`Host` of a backbone object.

    Raises:
        UnsupportedHostError: if its class is not in :data:`HOSTS`, or it holds no block of the class named there.
    """
    name, reason = qualified_name(type(backbone)), ''
    for cls in type(backbone).__mro__:
        reason = REFUSED.get(qualified_name(cls), '')
        host = HOSTS.get(qualified_name(cls))
        if host is not None and host.blocks(backbone):
            return host
        if host is not None or reason:
            break
    raise UnsupportedHostError(
        f'{name} is not a supported host{f": {reason}" if reason else ""}. Supported backbones: {_supported()}. To '
        'declare another one, see mona_mm.hosts.register_host; to only choose what trains in a module, use '
        'mona_mm.FrozenModel.'
    )


def _supported() -> str:
    """The supported backbones by library."""
    names: dict[str, list[str]] = {}
    for name in sorted(HOSTS):
        names.setdefault(name.partition('.')[0], []).append(name.rpartition('.')[2])
    return '; '.join(f'{library}: {", ".join(classes)}' for library, classes in names.items())


def is_host(module: nn.Module) -> bool:
    """Whether :func:`find_host` knows a module."""
    try:
        find_host(module)
    except UnsupportedHostError:
        return False
    return True


def recomputed_names() -> tuple[str, ...]:
    """The ends of the names of all buffers that hosts derive from their configuration."""
    return tuple(dict.fromkeys(name for host in HOSTS.values() for name in host.recomputed))


def position_table_names() -> tuple[str, ...]:
    """The ends of the names of all tables of positions, which hosts resize for another image or window size."""
    return tuple(dict.fromkeys(name for host in HOSTS.values() for name in host.position_tables))
