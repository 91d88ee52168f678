"""The base classes of methods: modules that are attached at named sites of a host's blocks."""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UserError
from mona_mm.hosts import (
    LINEAR_SITES,
    STREAM_SITES,
    Grid,
    Host,
    PeftModules,
    Sites,
    StockLinear,
    find_host,
    inject,
    method_paths,
    modules_beside_linears,
    sites_of,
)
from mona_mm.methods.blocks import choose_blocks, in_each_block
from mona_mm.nn.meta import meta_device
from mona_mm.nn.tracing import is_hooked
from mona_mm.options import check_options, show
from mona_mm.options import widths as width_options
from mona_mm.record import make_record
from mona_mm.registry import METHODS
from mona_mm.type_names import look_up

NOT_OPTIONS = ('channels', 'in_channels', 'out_channels', 'site')
"""Arguments of modules that are not options, since they follow from the site."""

LARGEST_SHARE = 4
"""A method may have at most this many times as many parameters as the blocks that it tunes."""


class PeftModule(nn.Module):
    """Base class of :class:`StreamModule` and :class:`LinearModule`.

    A subclass is constructed once for every (block, site) pair, with the ``options`` of the config's
    ``peft=dict(type=..., **options)``. They are checked against the annotations of the constructor, see
    :mod:`mona_mm.options`. An option that sets an inner width of the method is a :data:`~mona_mm.options.Width`.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.hosts`) at which the method attaches in every block, unless the config's ``sites``
    names others among ``possible_sites``. Sites that a host does not have are left out."""

    possible_sites: ClassVar[tuple[str, ...]]
    """The sites that the config's ``sites`` may name."""

    link: int | None = None
    """The width of the queries that :meth:`queries` computes; None for a module that takes no part in any."""

    fast: bool | str = True
    """Whether ``forward`` may use a form with fewer operations, where the method has one."""

    def reset_parameters(self) -> None:
        """Give the method's own parameters their initial values.

        This is called after the base has been initialised or loaded, since a host's own initialisation would overwrite
        them.
        """
        raise NotImplementedError

    @classmethod
    def share(cls, modules: Mapping[str, Mapping[str, nn.Module]]) -> None:
        """Give the modules of one backbone the parameters that they have in common, in place.

        This is called once, when all of them are constructed. A parameter or module that is assigned to several of
        them trains as one, is counted once, and is stored once in checkpoints and deltas, under all its names.

        Args:
            modules: the modules by path of a block and name of a site, in the order of the blocks.
        """

    def auxiliary_losses(self) -> Mapping[str, Tensor]:
        """Compute the terms that this module adds to the loss of the model, as scalars by name; by default none.

        A term depends on the module's own parameters alone, not on a forward pass, and is in the unit of the loss. Its
        name, under which it is logged, contains ``loss``; terms of one name are summed over the modules. See
        :mod:`mona_mm.methods.auxiliary`.
        """
        return {}

    @classmethod
    def queries(cls, modules: Sequence[nn.Module]) -> Tensor:
        """Compute queries ``(number, link)`` for a decoder (:mod:`mona_mm.methods.queries`) from parameters alone.

        Args:
            modules: the modules of one backbone that have a :attr:`link`, in the order of the blocks.
        """
        raise NotImplementedError

    def to_deploy(self) -> nn.Module | None:
        """Make a module for inference that computes the same in fewer operations; None if the method has none."""
        return None


class StreamModule(PeftModule):
    """A method at a stream site, constructed as ``cls(channels, **options)``."""

    possible_sites = STREAM_SITES

    needs_grid: ClassVar[bool] = True
    """Whether ``forward`` depends on the order of the tokens, as a convolution does, or on which of them are patches.
    Backbones that have their tokens in another order than that of the grid's rows then refuse the method. False for a
    map of every token alone."""

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map the tokens of a block.

        Args:
            x: the tokens ``(B, N, C)``, of which the last ``H*W`` are the row-major grid.
            hw: the grid ``(H, W)``.

        Returns:
            The tokens ``(B, N, C)`` that replace ``x``, or at ``parallel_ffn`` the addition beside the FFN.
        """
        raise NotImplementedError

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute ``x + branch(x)`` for a branch of this module's layers, the last of which is linear.

        The branch gets the tokens as ``(B*N, C)``, and the sum is written over its output. With ``(B, N, C)`` the
        output would be a view, and autograd would copy the gradient of its base once more. The plain sum is taken for
        an ``x`` that is not contiguous (a linear layer computes it by other products), and if a layer has a hook, which
        may hold the output.
        """
        if not x.is_contiguous() or is_hooked(*self.modules()):
            return x + branch(x)
        rows = x.flatten(0, -2)
        out = branch(rows)
        return (out.add_(rows) if out.dtype == x.dtype else rows + out).view(x.shape)


class LinearModule(PeftModule):
    """A method at a linear site, constructed as ``cls(in_channels, out_channels, **options)``."""

    possible_sites = LINEAR_SITES

    is_weight_delta: bool = False
    """Whether adding :meth:`delta_weight` to the linear's weight has the same effect as :meth:`forward`."""

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition to the output of a linear layer, or of the slice of a fused one.

        Args:
            x: the layer's input, ``(..., in_channels)``.
            out: its output, ``(..., out_channels)``.
            linear: the layer itself, with its weight and bias.

        Returns:
            The addition, ``(..., out_channels)``.
        """
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Compute the addition to the linear's ``weight`` for merging, both ``(out_channels, in_channels)``."""
        raise NotImplementedError

    def convolve(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """Compute the addition to the output of a convolution that is not 1x1, for which ``in_channels`` is the size of
        a patch. A class without it reaches convolutions by :meth:`delta_weight`.

        Args:
            x: the convolution's input, ``(B, C, H, W)``.
            out: its output, ``(B, out_channels, H', W')``.
            linear: the convolution itself; see :meth:`StockLinear.convolve`.

        Returns:
            The addition, ``(B, out_channels, H', W')``.
        """
        raise NotImplementedError

    @classmethod
    def has_convolve(cls) -> bool:
        """Whether the class has :meth:`convolve`. That of a class does not count for a subclass with another
        :meth:`forward`."""
        owner = next(c for c in cls.__mro__ if 'convolve' in vars(c) or 'forward' in vars(c))
        return owner is not LinearModule and 'convolve' in vars(owner)

    def start_from(self, weight: Tensor) -> None:
        """Initialise the parameters that depend on the weight of the base, ``(out_channels, in_channels)``.

        This is called after :meth:`~PeftModule.reset_parameters`, with the weights that training starts from.
        """


class Method:
    """A method with its options, ready to be attached to a backbone.

    A method that is not one class of modules at fixed sites derives from this class and is registered in ``METHODS``
    itself. It is constructed from the config's options.
    """

    @property
    def name(self) -> str:
        """The name of the method in reports and messages."""
        return type(self).__name__

    @property
    def trainable(self) -> tuple[str, ...]:
        """The rules of :mod:`mona_mm.frozen.rules` that select the parameters of the base that the method trains."""
        return ()

    @property
    def parts(self) -> 'Mapping[str, Method]':
        """The methods that this one consists of, by name: itself, unless it is a :class:`MethodGroup`."""
        return {self.name: self}

    def attach(self, backbone: nn.Module) -> None:
        """Attach the method to a supported backbone, in place.

        Raises:
            UnsupportedHostError: see :func:`mona_mm.hosts.find_host`.
            ConfigError: if the backbone already carries a method, this method cannot attach to such a host, or two
                parts of it are at one site of a block.
        """
        for method in self.parts.values():
            method.prepare(backbone)
        host, sites = find_host(backbone), sites_of(backbone)
        modules = {name: method.modules(host, sites) for name, method in self.parts.items()}
        inject(backbone, _united(modules))
        record = make_record(backbone)
        record.method = self.name
        start_from_base(backbone)
        for name, method in self.parts.items():
            others = set(method_paths(backbone))
            method.complete(backbone)
            record.paths[name] = (
                *(f'{path}.peft.{site}' for path, of_block in modules[name].items() for site in of_block),
                *(path for path in method_paths(backbone) if path not in others),
            )

    def prepare(self, backbone: nn.Module) -> None:
        """Make ready for a backbone, before any method is in it."""

    def complete(self, backbone: nn.Module) -> None:
        """Add to the backbone what is not a module at a site, after the modules are attached."""

    def check_base(self, backbone: nn.Module) -> None:
        """Raise a UserError if the method does not fit the base, which holds the weights that training starts from."""

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """Build the modules to attach, by path of a block and name of a site.

        Args:
            host: the description of the backbone.
            sites: the sites of its blocks.

        Raises:
            ConfigError: if the method cannot attach to such a host.
        """
        raise NotImplementedError


def _united(modules: Mapping[str, Mapping[str, Mapping[str, nn.Module]]]) -> dict[str, dict[str, nn.Module]]:
    """Unite the modules of several methods, given by the method's name, the path of a block and a site."""
    united: dict[str, dict[str, nn.Module]] = {}
    holders: dict[tuple[str, str], str] = {}
    for name, of_method in modules.items():
        for path, of_block in of_method.items():
            for site, module in of_block.items():
                other = holders.setdefault((path, site), name)
                if other != name:
                    raise ConfigError(
                        f'peft: {other} and {name} are both at {site!r} of the block {path}, where only one can be. '
                        'Give one of them other `sites` or `blocks`.'
                    )
                united.setdefault(path, {})[site] = module
    return united


@dataclass(frozen=True)
class MethodGroup(Method):
    """Several methods in one backbone, at different sites or in different blocks.

    Args:
        methods: the methods, by name.
    """

    methods: Mapping[str, Method]

    @property
    def name(self) -> str:
        """The names of the methods, joined by ``'+'``."""
        return '+'.join(self.methods)

    @property
    def parts(self) -> Mapping[str, Method]:
        """The methods, by name."""
        return self.methods

    @property
    def trainable(self) -> tuple[str, ...]:
        """The rules of all methods."""
        return tuple(dict.fromkeys(rule for method in self.parts.values() for rule in method.trainable))

    def check_base(self, backbone: nn.Module) -> None:
        """See :meth:`Method.check_base`."""
        for method in self.parts.values():
            method.check_base(backbone)


def start_from_base(model: nn.Module, modules: Collection[nn.Module] | None = None) -> None:
    """Call :meth:`LinearModule.start_from` of a model's modules with the weights that it holds, in place.

    Args:
        model: the model.
        modules: those of its modules that are meant; None for all.
    """
    ids = None if modules is None else set(map(id, modules))
    for module, weight in modules_beside_linears(model):
        if isinstance(module, LinearModule) and (ids is None or id(module) in ids):
            module.start_from(weight.detach())


def deploy(model: nn.Module) -> int:
    """Replace every module of a method that has a form for inference by that form, in place.

    Returns:
        The number of modules that were replaced.
    """
    count = 0
    for attached in [m for m in model.modules() if isinstance(m, PeftModules)]:
        for site, module in list(attached.items()):
            form = module.to_deploy() if isinstance(module, PeftModule) else None
            if form is not None:
                attached[site] = form
                count += 1
    return count


@dataclass(frozen=True)
class ModuleMethod(Method):
    """A :class:`PeftModule` at the same sites of every block, or of some blocks.

    Args:
        cls: the class of its modules.
        sites: the sites that the config names; None for those of ``cls.sites`` that the host has.
        blocks: the blocks that the config names, see :func:`mona_mm.methods.blocks.choose_blocks`; None for all.
        options: the arguments of ``cls`` from the config. A :data:`~mona_mm.options.Width` may be a mapping from
            patterns of blocks to widths, see :func:`mona_mm.methods.blocks.in_each_block`.
    """

    cls: type[PeftModule]
    sites: tuple[str, ...] | None
    blocks: Any
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.__name__

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """See :meth:`Method.modules`.

        Raises:
            ConfigError: if the host lacks the sites or blocks, or an inner width of the method exceeds the widest
                block, or the method is far larger than the blocks that it tunes.
        """
        names = self._sites_on(host)
        possible = {
            path: {name: of_block[name] for name in names if name in of_block} for path, of_block in sites.items()
        }
        paths = choose_blocks(self.name, self.blocks, tuple(sites))
        chosen = {path: possible[path] for path in paths if possible[path]}
        if not chosen:
            which = '' if self.blocks is None else f' {show(self.blocks)}'
            raise ConfigError(
                f'peft: {self.name}: none of the blocks{which} has a site {" or ".join(names)}. Choose other blocks or '
                'sites.'
            )
        options = self._options_in(tuple(chosen))
        check_widths(self.name, self.cls, options.values(), possible)
        plans = {
            (path, name): partial(self.cls, *site.widths, **options[path])
            for path, sites_of_block in chosen.items()
            for name, site in sites_of_block.items()
        }
        alike = {(path, name): (chosen[path][name], _widths_in(self.cls, options[path])) for path, name in plans}
        check_size(self.name, chosen, [(alike[key], build) for key, build in plans.items()])
        modules = {path: {name: plans[path, name]() for name in chosen[path]} for path in chosen}
        self.cls.share(modules)
        return modules

    def _options_in(self, paths: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """The options in each block, by path."""
        of_option = {
            option: in_each_block(self.name, option, value, paths)
            if option in width_options(self.cls)
            else dict.fromkeys(paths, value)
            for option, value in self.options.items()
        }
        return {path: {option: values[path] for option, values in of_option.items()} for path in paths}

    def _sites_on(self, host: Host) -> tuple[str, ...]:
        sites = self.sites or tuple(site for site in self.cls.sites if site in host.sites)
        wrong = [site for site in sites if site not in host.sites]
        if wrong or not sites:
            block = ' and '.join(dict.fromkeys(spec.cls.rpartition('.')[2] for spec in host.specs))
            possible = ', '.join(site for site in self.cls.possible_sites if site in host.sites)
            fix = (
                f"Choose among the sites that it has in peft=dict(type='{self.name}', sites=[...]): {possible}."
                if possible
                else f'It has {", ".join(host.sites)}: use a method for one of them, or mona_mm.PeftModel, which puts '
                'a method beside single layers by their paths.'
            )
            raise ConfigError(
                f'peft: {self.name} cannot attach at {", ".join(wrong or self.cls.sites)}, since {block} has no such '
                f'site. {fix}'
            )
        return sites


def build_method(cfg: dict[str, Any] | Sequence[dict[str, Any]]) -> Method:
    """Resolve ``peft=dict(type=..., sites=..., blocks=..., **options)`` of a config, or a list of such dicts.

    Each dict of a list may have a ``name``, by which the method is counted and called in messages; by default it is the
    method's own.

    Raises:
        ConfigError: if ``type`` is missing or not a registered method, the method cannot attach at a site (the error
            lists the possible ones), the value of an option is not accepted, or two methods have one name.
        UnknownOptionError: if an option is not one of the method's arguments (the error lists them).
    """
    if isinstance(cfg, list | tuple) and cfg and all(isinstance(each, dict) for each in cfg):
        return MethodGroup(_named_methods(cfg))
    if not isinstance(cfg, dict):
        raise ConfigError(f"peft={show(cfg)} must be a dict, such as dict(type='Mona'), or a list of such dicts.")
    options = dict(cfg)
    given_type = options.pop('type', None)
    method = look_up(METHODS, given_type)
    if not (inspect.isclass(method) and issubclass(method, StreamModule | LinearModule | Method)):
        raise ConfigError(
            f'peft={show(cfg)}: unknown method {show(given_type)}; methods are '
            f'{", ".join(sorted(METHODS.module_dict))}.'
        )
    if not issubclass(method, PeftModule):
        if 'blocks' in options and 'blocks' not in inspect.signature(method).parameters:
            raise ConfigError(
                f'peft: {method.__name__} itself decides in which blocks it trains something, so it has no `blocks`.'
            )
        check_options(f'peft: {method.__name__}', method, options, given=NOT_OPTIONS)
        return method(**options)
    sites, blocks = _chosen_sites(method, options.pop('sites', None)), options.pop('blocks', None)
    check_options(
        f'peft: {method.__name__}',
        method,
        options,
        given=NOT_OPTIONS,
        more=['sites', 'blocks'],
        by_block=width_options(method),
    )
    return ModuleMethod(method, sites, blocks, options)


def _named_methods(configs: Sequence[dict[str, Any]]) -> dict[str, Method]:
    """The methods of a list of configs, by name. One without a name has that of its class, and a number behind it if
    another has that name."""
    given = [config.get('name') for config in configs]
    for name in given:
        if name is not None and (not isinstance(name, str) or not name or given.count(name) > 1):
            raise ConfigError(f'peft: name={show(name)} must be a string that no other method in the list has.')
    methods: dict[str, Method] = {}
    for config, name in zip(configs, given, strict=True):
        method = build_method({option: value for option, value in config.items() if option != 'name'})
        names = (method.name, *(f'{method.name} {number}' for number in range(2, 2 * len(configs) + 1)))
        methods[name or next(each for each in names if each not in {*methods, *given})] = method
    return methods


def _chosen_sites(method: type[PeftModule], given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    sites = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not sites or any(site not in method.possible_sites or sites.count(site) > 1 for site in sites):
        raise ConfigError(
            f'peft: {method.__name__} cannot attach at sites={show(given)}; its sites are '
            f'{", ".join(method.possible_sites)}, each once.'
        )
    return sites


def check_size(name: str, sites: Sites, modules: Iterable[tuple[Hashable, Callable[[], nn.Module]]]) -> None:
    """Check that a method has at most :data:`LARGEST_SHARE` times the parameters of the blocks that it tunes.

    The modules are counted on the meta device, before any memory is taken.

    Args:
        name: the name of the method.
        sites: the sites of the blocks that it tunes.
        modules: of every module, a key that only modules of the same size share, and a function that builds it.

    Raises:
        ConfigError: if the method is larger.
    """
    tuned = sum(next(iter(sites_of_block.values())).block_size for sites_of_block in sites.values() if sites_of_block)
    modules = list(modules)
    builders, total = dict(modules), 0
    for key, count in Counter(key for key, _ in modules).items():
        try:
            with meta_device():
                module = builders[key]()
        except UserError:
            raise
        except Exception:  # a third-party module that computes with values cannot be counted on the meta device
            return
        total += count * sum(p.numel() for p in module.parameters())
        if total > LARGEST_SHARE * tuned:
            raise ConfigError(
                f'{name}: with these options it would have more than {LARGEST_SHARE} times as many parameters as the '
                f'blocks that it tunes ({tuned:,}). Use smaller values.'
            )


def check_widths(name: str, function: Callable, options: Iterable[Mapping[str, Any]], sites: Sites) -> None:
    """Check that no :data:`~mona_mm.options.Width` exceeds the widest block.

    Args:
        name: the name of the method.
        function: the class or function that the options are for.
        options: the options in each block, with one width each.
        sites: the sites of the backbone where the method can be.

    Raises:
        ConfigError: if one does.
    """
    widest = max(max(site.widths) for sites_of_block in sites.values() for site in sites_of_block.values())
    for in_block in options:
        for option, value in _widths_in(function, in_block):
            if value > widest:
                raise ConfigError(
                    f'{name}: {option}={value} must be at most {widest}, the largest width of the blocks or layers '
                    'that it may tune.'
                )


def _widths_in(function: Callable, options: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """The name and value of every :data:`~mona_mm.options.Width` of a function, with defaults filled in."""
    parameters = inspect.signature(function).parameters
    return tuple((option, options.get(option, parameters[option].default)) for option in width_options(function))
