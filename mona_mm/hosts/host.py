"""Descriptions of stock backbone classes, from which methods know where to attach in their blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.hosts.formats import CheckpointFormat, OwnNames
from mona_mm.hosts.sites import LINEAR_SITES, STREAM_SITES
from mona_mm.nn.mixin import Mixin, qualified_name, stock_class

Grid = tuple[int, int]
"""Height and width of the grid that the tokens of a block form."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, or one slice of a fused one.

    Args:
        weight: the name in the block of its weight ``(out, in)``, or ``(out, in, 1, 1)``.
        bias: the name in the block of its bias, if it can have one.
        slice_index: the index of its slice among ``num_slices`` equal slices of the weight's rows; None for all rows.
        num_slices: the number of linear layers in a fused weight.
        is_called: whether the host calls the layer as a module; otherwise the host reads the weight directly.
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
        """The rows of ``weight`` that belong to this linear layer."""
        return self.channels(len(weight))

    def channels(self, length: int) -> slice:
        """The channels that belong to this linear layer in an output of ``length`` channels."""
        length = length if self.slice_index is None else length // self.num_slices
        start = length * (self.slice_index or 0)
        return slice(start, start + length)


def fused_qkv(module: str, is_called: bool = True) -> dict[str, Linear]:
    """The sites ``q``, ``k`` and ``v`` of a linear layer whose output holds all three, one after another."""
    weight, bias = f'{module}.weight', f'{module}.bias'
    return {site: Linear(weight, bias, index, is_called=is_called) for index, site in enumerate('qkv')}


def separate_linears(**paths: str) -> dict[str, Linear]:
    """Sites whose linear layers are modules of their own, given by the path of each module."""
    return {site: Linear(f'{path}.weight', f'{path}.bias') for site, path in paths.items()}


@dataclass(frozen=True)
class Branch:
    """The modules at the end of a residual branch of a block.

    One module may end several branches of a block; its calls are then told apart by counting them.

    Args:
        drop_path: the path of the module whose input the ``*_branch`` site maps; empty where nothing follows ``end``,
            whose output that site then maps.
        end: the path of the module whose output the ``*_out`` site maps; by default ``drop_path``.
        call: the index, from 0, of the branch's call of these modules; None where a block calls them once.
    """

    drop_path: str
    end: str = ''
    call: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'end', self.end or self.drop_path)


SHARED_DROP_PATH = dict(attn=Branch('drop_path', call=0), ffn=Branch('drop_path', call=1))
"""The branches of a block that has one DropPath, ``drop_path``, for both."""

MMCV_BRANCHES = dict(attn=Branch('attn.dropout_layer'), ffn=Branch('ffn.dropout_layer'))
"""The branches of a block whose attention and FFN are mmcv's, which end with their own DropPath."""

TORCH_ATTENTION = dict(
    **{
        site: Linear('attn.attn.in_proj_weight', 'attn.attn.in_proj_bias', index, is_called=False)
        for index, site in enumerate('qkv')
    },
    proj=Linear('attn.attn.out_proj.weight', 'attn.attn.out_proj.bias', is_called=False),
)
"""The linear layers of torch's ``MultiheadAttention`` in mmcv's. It reads their weights and calls none of them."""

TORCH_UNCALLED = ('attn.attn.out_proj',)
"""The module of :data:`TORCH_ATTENTION` that is never called."""


@dataclass(frozen=True)
class GridArgument:
    """The grid of a backbone whose blocks get it as one argument ``(H, W)``, or as two, ``H`` and ``W``.

    Args:
        names: the name of the argument, or the names of both.
        position: the position of the first of them.
    """

    names: tuple[str, ...]
    position: int = 1

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """The grid from the arguments of a block's call; None if they do not hold it."""
        given = dict(zip(self.names, args[self.position :], strict=False)) | dict(kwargs)
        if any(name not in given for name in self.names):
            return None
        return given[self.names[0]] if len(self.names) == 1 else tuple(given[name] for name in self.names)


@dataclass(frozen=True)
class GridAttribute:
    """The grid of a backbone whose blocks are built for one grid and have it as an attribute."""

    name: str

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """The grid that the block was made for.

        Raises:
            ConfigError: if the block has no such attribute.
        """
        if not hasattr(block, self.name):
            raise _wrong(block, f'grid=GridAttribute({self.name!r}), and the block has no attribute of this name')
        return tuple(getattr(block, self.name))


@dataclass(frozen=True)
class SquareGrid:
    """The grid of a backbone whose blocks are built for as many rows as columns; it has as many tokens as the input."""

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """The grid from the number of tokens, ``(B, N, C)``, in a block's call."""
        side = math.isqrt(input_of(args, kwargs).shape[1])
        return side, side


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The stream in a block's call, its first argument, which some backbones give by its name."""
    return args[0] if args else next(iter(kwargs.values()))


def grid_in_output(child: nn.Module, args: tuple, output: tuple[Tensor, Grid]) -> Grid:
    """The grid in the output ``(tokens, (H, W))`` of a module; by its name, since blocks are pickled with it.

    Raises:
        ConfigError: if the module returns something else.
    """
    if not isinstance(output, list | tuple) or len(output) < 2 or not hasattr(output[1], '__len__'):
        raise ConfigError(
            f'GridSource: the {type(child).__name__} that is to show the grid of the tokens returns no pair '
            '(tokens, (H, W)). Give the GridSource a function `find` that gets the grid from its call: '
            'mona_mm.hosts.grid_of_map where it returns a map (B, C, H, W).'
        )
    return tuple(output[1])


def grid_of_map(child: nn.Module, args: tuple, output: Tensor) -> Grid:
    """The grid of a module's output ``(B, C, H, W)``, for :class:`GridSource`.

    Raises:
        ConfigError: if the module returns something else.
    """
    if not isinstance(output, Tensor) or output.dim() != 4:
        raise ConfigError(
            f'GridSource: the {type(child).__name__} that is to show the grid of the tokens returns no map '
            '(B, C, H, W). Leave out find=grid_of_map where it returns (tokens, (H, W)), or give another function.'
        )
    return tuple(output.shape[-2:])


@dataclass(frozen=True)
class GridSource:
    """The grid of a backbone whose blocks do not get it; it is read from a call of another module.

    Args:
        path: the path of that module in the nearest module around the block that has it: in the backbone, in a model
            within it, or in the block's stage.
        find: a function of the child, its arguments and its output that returns the grid. By default the output is
            ``(tokens, (H, W))``.
        is_in_block: whether it is in the block itself, and called before the sites that need the grid.
    """

    path: str
    find: Callable[[nn.Module, tuple, Any], Grid] = grid_in_output
    is_in_block: bool = False

    def of_call(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Grid | None:
        """None, since the arguments of a block's call do not hold the grid."""
        return None


@dataclass(frozen=True)
class BlockSpec:
    """The description of a class of blocks.

    Args:
        cls: the class, or its qualified name. Blocks of other classes, subclasses included, are left alone.
        has: the path of a module or parameter, or several, that tell blocks of one class apart: only those that have
            all of them, and the linear layers, are meant. Where several descriptions fit a block, the first one counts.
        linears: the linear layers of a block, by site.
        branches: the ends of the branches ``'attn'`` and ``'ffn'``, as far as the block has them.
        mixin: the :class:`mona_mm.hosts.block.PeftBlock` that has the block's forward with sites; None for the stock
            forward with hooks, :class:`mona_mm.hosts.block.HookedBlock`.
        mid_norm: for the stock forward, the path in a block of the first module of the FFN, whose input is the
            residual; None for a block of one branch.
        mid_residual: the path of a module through which the residual passes on its way past the FFN, called before
            ``mid_norm``; empty where the residual is added as it is.
        layout: the layout of the stream, ``'BNC'``, ``'BHWC'`` or ``'BCHW'``.
        mid_layout: the layout of the input of ``mid_norm``, if it differs.
        branch_layout: the layout at the ends of the branches, if it differs.
        width: the name of a parameter whose first dimension is the stream's width; by default the weight of ``fc2``.
        without: the stream sites that the block does not have.
        grid: where the grid is found; None where the layout of the stream shows it.
        uncalled: the modules of a block that are never called; the host only reads their parameters.
        changed_in_place: whether the backbone changes what a block returns in place, so that it must be no view.
        row_major: whether tokens ``(B, N, C)`` are in the order of the grid's rows. Where they are not (Hiera keeps
            those of a window together), methods that read the grid are refused.
        family: the name under which the list of hosts has the block, where one backbone class serves many models.
    """

    cls: str | type
    linears: Mapping[str, Linear]
    branches: Mapping[str, Branch]
    mixin: type[Mixin] | None = None
    mid_norm: str | None = None
    mid_residual: str = ''
    layout: Literal['BNC', 'BHWC', 'BCHW'] = 'BNC'
    mid_layout: Literal['BNC', 'BHWC', 'BCHW', None] = None
    branch_layout: Literal['BNC', 'BHWC', 'BCHW', None] = None
    grid: GridArgument | GridAttribute | GridSource | SquareGrid | None = None
    has: str | tuple[str, ...] = ()
    width: str = ''
    without: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    row_major: bool = True
    changed_in_place: bool = False
    family: str = ''
    sites: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'cls', _name_of(self.cls, 'BlockSpec: cls'))
        has_middle = 'attn' in self.branches if self.mixin else self.mid_norm is not None
        possible = {'post_ffn', 'parallel_ffn', *(['post_attn'] if has_middle else [])}
        possible |= {f'{branch}_{place}' for branch in self.branches for place in ('branch', 'out')}
        stream = [site for site in STREAM_SITES if site in possible and site not in self.without]
        object.__setattr__(self, 'sites', (*stream, *self.linears))

    def check(self) -> None:
        """Refuse what would have no effect, or fail later, whatever the blocks are like.

        Raises:
            ConfigError: if it names sites, branches or layouts that there are not, or does not say how wide the stream
                is.
        """
        layouts = ('BNC', 'BHWC', 'BCHW')
        for option, given, possible in (
            ('linears', self.linears, LINEAR_SITES),
            ('branches', self.branches, ('attn', 'ffn')),
            ('without', self.without, STREAM_SITES),
            ('layout', (self.layout,), layouts),
            ('mid_layout', (self.mid_layout,), (*layouts, None)),
            ('branch_layout', (self.branch_layout,), (*layouts, None)),
        ):
            wrong = [name for name in given if name not in possible]
            if wrong:
                raise ConfigError(
                    f'BlockSpec of {self.cls}: {option} has {wrong[0]!r}, and may have '
                    f'{", ".join(name for name in possible if name)}.'
                )
        for option, cls in (('linears', Linear), ('branches', Branch)):
            if not all(isinstance(each, cls) for each in getattr(self, option).values()):
                raise ConfigError(
                    f'BlockSpec of {self.cls}: {option} must map each name to a {cls.__name__}, such as '
                    f'{"separate_linears(fc1=...)" if cls is Linear else "Branch(...)"}, and not to a path alone.'
                )
        is_on_stream = any(site in STREAM_SITES for site in self.sites)
        if is_on_stream and not self.width and 'fc2' not in self.linears:
            raise ConfigError(
                f'BlockSpec of {self.cls}: without a linear layer at fc2, `width` must name a parameter whose first '
                "dimension is the width of the stream, such as width='norm1.weight'."
            )

    def fits(self, module: nn.Module) -> bool:
        """Whether a module of the class has all that tells the meant blocks apart, and the linear layers."""
        return not self.absent(module)

    def absent(self, module: nn.Module) -> list[str]:
        """The paths of what tells the meant blocks apart, and of the linear layers, that a module has not."""
        told_by = (self.has,) if isinstance(self.has, str) else self.has
        paths = (*told_by, *(linear.weight for linear in self.linears.values()))
        return [path for path in paths if not _has(module, path)]

    def widths(self, block: nn.Module, site: str) -> tuple[int, ...]:
        """The widths of a block's site: ``(channels,)`` of a stream site, ``(in_channels, out_channels)`` of a linear
        one."""
        linear = self.linears.get(site)
        if linear is None:
            path = self.width or self.linears['fc2'].weight
            if not _has(block, path):
                raise _wrong(block, f'width={path!r}, and the block has no such parameter')
            return (len(block.get_parameter(path)),)
        weight = block.get_parameter(linear.weight)
        rows = linear.rows(weight)
        if weight.dim() < 2 or (linear.slice_index is not None and len(weight) % linear.num_slices):
            one_of = '' if linear.slice_index is None else f' of {linear.num_slices} linear layers in one'
            raise _wrong(
                block, f'{linear.weight} at {site!r}, and the shape {tuple(weight.shape)} is no weight{one_of}'
            )
        return weight.shape[1], rows.stop - rows.start

    def module_in(self, block: nn.Module, option: str, path: str) -> nn.Module:
        """The module at a path that an option of this description names.

        Raises:
            ConfigError: if the block has none.
        """
        if not _has(block, path):
            names = ', '.join(name for name in block._modules if name != 'peft')
            raise _wrong(block, f'{option} {path!r}, and the block has no such module. It has {names}')
        return block.get_submodule(path)


@dataclass(frozen=True)
class Host:
    """The description of a stock backbone class.

    Args:
        specs: the descriptions of its blocks, one for each class of blocks.
        output_norms: the prefixes of the norms of the backbone's outputs, which pretrained checkpoints do not hold.
        last_output: a function ``(backbone, x, grid)`` that computes the backbone's last output from the last block's
            ``x (B, N, C)`` and the grid ``(H, W)``.
        reads_checkpoint: whether the ``init_weights`` of the class reads the checkpoint of ``init_cfg`` by itself,
            whatever the ``type`` there, and supports no other ``init_cfg``.
        own_names: the names of its tensors, as regular expressions.
        formats: the checkpoint formats of other code that can be converted for it.
        own_format: for a wrapper of models of another library, the name of that library's format and a function
            ``(backbone, tensors)`` that converts the tensors of a checkpoint to the names of the backbone, in place of
            ``formats``.
        fit_checkpoint: a function ``(given, current)`` that resizes tensors of a checkpoint, in place, to the shapes
            of the model's.
        recomputed: the endings of the names of buffers that it derives from its configuration.
        position_tables: the endings of the names of tables that are resized for another image or window size.
        not_selected: parts of the names of parameters in a block that SPT does not select from.
        final_norms: the paths of norms after the last block that SPT selects from.
    """

    specs: tuple[BlockSpec, ...]
    output_norms: tuple[str, ...] = ()
    last_output: Callable[[nn.Module, Tensor, Grid], Tensor] | None = None
    reads_checkpoint: bool = False
    own_names: OwnNames | None = None
    formats: tuple[CheckpointFormat, ...] = ()
    own_format: tuple[str, Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]] | None = None
    fit_checkpoint: Callable[[dict[str, Tensor], Mapping[str, Tensor]], None] | None = None
    recomputed: tuple[str, ...] = ()
    position_tables: tuple[str, ...] = ()
    not_selected: tuple[str, ...] = ()
    final_norms: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that any of its blocks has."""
        return tuple(dict.fromkeys(site for spec in self.specs for site in spec.sites))

    @property
    def linears(self) -> dict[str, Linear]:
        """The linear layers of its blocks, by site. Where the classes of blocks differ, the first class counts."""
        return {site: linear for spec in reversed(self.specs) for site, linear in spec.linears.items()}

    def spec(self, module: nn.Module) -> BlockSpec | None:
        """The description of a block; None for any other module."""
        name = qualified_name(stock_class(module))
        return next((spec for spec in self.specs if spec.cls == name and spec.fits(module)), None)

    def what_is_missing(self, backbone: nn.Module) -> str:
        """Why no block of a backbone fits."""
        modules = {qualified_name(stock_class(m)): m for m in backbone.modules()}
        absent = {
            spec.cls.rpartition('.')[2]: spec.absent(modules[spec.cls])
            for spec in self.specs[::-1]
            if spec.cls in modules
        }
        if not absent:
            first, *others = dict.fromkeys(spec.cls for spec in self.specs)
            more = f' and {len(others)} others' if len(others) > 1 else ''.join(f' and {cls}' for cls in others)
            return f'it has no block of the classes that are described for it ({first}{more})'
        paths = ', '.join(dict.fromkeys(path for paths in absent.values() for path in paths))
        return (
            f'its blocks ({", ".join(sorted(absent))}) are without {paths}, to which methods attach or by which they '
            'are known, as where it was converted for inference (deploy=True)'
        )

    def within(self, backbone: nn.Module) -> Host:
        """The description of this backbone alone: without descriptions of blocks that it does not hold."""
        held = {id(spec) for spec in map(self.spec, backbone.modules()) if spec is not None}
        specs = tuple(spec for spec in self.specs if id(spec) in held)
        return self if len(specs) == len(self.specs) else replace(self, specs=specs)

    def blocks(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """The blocks of ``backbone`` by path, in order, whether or not a method has been injected.

        None is within the module that shows the grid, since only the blocks behind it are on that grid.
        """
        sources = [
            spec.grid.path for spec in self.specs if isinstance(spec.grid, GridSource) and not spec.grid.is_in_block
        ]
        before = tuple(f'{path}.' for path in sources)
        return {
            path: m for path, m in backbone.named_modules() if self.spec(m) is not None and not path.startswith(before)
        }

    def ends_with_last_block(self, backbone: nn.Module) -> bool:
        """Whether ``out_indices`` shows that one of the outputs depends on the last block."""
        stages = getattr(backbone, 'stages', None) or getattr(backbone, 'layers', None)
        return isinstance(stages, nn.ModuleList) and len(stages) - 1 in backbone.out_indices


def _has(module: nn.Module, path: str) -> bool:
    *parents, last = path.split('.')
    for name in parents:
        module = module._modules.get(name)
        if module is None:
            return False
    return module._modules.get(last) is not None or getattr(module, last, None) is not None


def _wrong(block: nn.Module, what: str) -> ConfigError:
    """The error for a description of a class of blocks that one of them does not fit."""
    return ConfigError(f'The description of the blocks {stock_class(block).__name__} (BlockSpec) has {what}.')


def _name_of(cls: str | type, what: str) -> str:
    """The qualified name of a class, which may be given itself."""
    name = qualified_name(cls) if isinstance(cls, type) else cls
    if not isinstance(name, str) or '.' not in name:
        raise ConfigError(
            f'{what}={cls!r} must be a class, or its qualified name with its module, such as '
            "'mmdet.models.backbones.swin.SwinTransformer'."
        )
    return name


OUTPUT_NORMS = ('norm0.', 'norm1.', 'norm2.', 'norm3.')
"""The prefixes of the norms of a hierarchical backbone's outputs."""

HOSTS: dict[str, Host] = {}
"""The supported backbones by qualified class name. Attribute names alone would also match blocks that compute something
else (BEiT's have the same attributes as ViT's)."""


REFUSED: dict[str, str] = {}
"""Backbones that cannot be hosts, by qualified class name, and why."""


def register_host(backbone: str | type, host: Host) -> None:
    """Make a backbone class a host.

    Args:
        backbone: the class, or its qualified name, such as ``'mmdet.models.backbones.swin.SwinTransformer'``.
        host: its description.

    Raises:
        ConfigError: if the class is a host already, or the description has no blocks.
    """
    name = _name_of(backbone, 'register_host: backbone')
    if name in HOSTS:
        raise ConfigError(f'{name} is a host already.')
    if not isinstance(host, Host):
        raise ConfigError(f'register_host: the description of {name} must be a mona_mm.hosts.Host, not {host!r}.')
    _check_specs(name, host.specs)
    HOSTS[name] = host


def _check_specs(name: str, specs: Any) -> None:
    if not isinstance(specs, list | tuple) or not specs or not all(isinstance(spec, BlockSpec) for spec in specs):
        raise ConfigError(
            f'The host {name} needs the descriptions of its classes of blocks, each a BlockSpec: '
            'Host(specs=(BlockSpec(...),)).'
        )
    for spec in specs:
        spec.check()


def register_blocks(backbone: str | type, *specs: BlockSpec) -> None:
    """Add classes of blocks to a host, such as those of another of timm's models to a ``TIMMBackbone``.

    Args:
        backbone: the host's class, or its qualified name.
        specs: the descriptions of the blocks. They count before those that the host has.

    Raises:
        ConfigError: if the class is no host, or no blocks are described.
    """
    name = _name_of(backbone, 'register_blocks: backbone')
    if name not in HOSTS:
        raise ConfigError(f'{name} is no host, so that no blocks can be added. Declare it with register_host.')
    _check_specs(name, specs)
    HOSTS[name] = replace(HOSTS[name], specs=(*specs, *HOSTS[name].specs))


def find_host(backbone: nn.Module) -> Host:
    """The :class:`Host` that describes a backbone object, with descriptions of those blocks alone that it holds.

    Raises:
        UnsupportedHostError: if its class is not in :data:`HOSTS`, or it holds no block of the classes named there with
            the layers named there.
    """
    name, reason = qualified_name(type(backbone)), ''
    for cls in type(backbone).__mro__:
        reason = REFUSED.get(qualified_name(cls), '')
        host = HOSTS.get(qualified_name(cls))
        held = None if host is None else host.within(backbone)
        if held is not None and held.specs:
            return held
        if host is not None and not reason:
            reason = host.what_is_missing(backbone)
        if host is not None or reason:
            break
    raise UnsupportedHostError(
        f'{name} is not a supported host{f": {reason}" if reason else ""}. Supported backbones: {_supported()}. To '
        'declare another one, see mona_mm.hosts.register_host; to put LoRA beside its layers use mona_mm.PeftModel, '
        'and to only choose what trains in it mona_mm.FrozenModel.'
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
    """The endings of the names of all buffers that hosts derive from their configuration."""
    return tuple(dict.fromkeys(name for host in HOSTS.values() for name in host.recomputed))


def position_table_names() -> tuple[str, ...]:
    """The endings of the names of all position tables, which hosts resize for another image or window size."""
    return tuple(dict.fromkeys(name for host in HOSTS.values() for name in host.position_tables))
