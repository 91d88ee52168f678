"""What every method is: modules attached at named sites of a host's blocks."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UserError
from mona_mm.hosts import (
    LINEAR_SITES,
    STREAM_SITES,
    Grid,
    Host,
    PeftModules,
    Site,
    Sites,
    StockLinear,
    find_host,
    inject,
    modules_beside_linears,
    sites_of,
)
from mona_mm.nn.meta import meta_device
from mona_mm.nn.tracing import is_hooked
from mona_mm.options import check_options, show
from mona_mm.options import widths as width_options
from mona_mm.record import make_record
from mona_mm.registry import METHODS
from mona_mm.type_names import look_up

NOT_OPTIONS = ('channels', 'in_channels', 'out_channels', 'site')
"""Arguments of modules that are no options: what they attach to says them."""

LARGEST_SHARE = 4
"""How many times as large as the blocks a method may be."""


class PeftModule(nn.Module):
    """Base class of :class:`StreamModule` and :class:`LinearModule`.

    A subclass is constructed once for every (block, site) pair, with the ``options`` that the config's
    ``peft=dict(type=..., **options)`` says. They are checked against the annotations of the constructor, see
    :mod:`mona_mm.options`; one that says how wide the method is inside is a :data:`~mona_mm.options.Width`.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.hosts`) at which the method attaches in every block, unless the config's ``sites``
    names others of the same kind. Those of them that a host does not have are left out."""

    possible_sites: ClassVar[tuple[str, ...]]
    """All sites that the config's ``sites`` may name."""

    fast: bool = True
    """Whether ``forward`` may compute the same in fewer operations, where the method has such a form."""

    def reset_parameters(self) -> None:
        """Give the method's own parameters their initial values.

        This is called after the base has been initialised or loaded, so that no initialisation pass of the host, which
        would overwrite them with its own rule, decides what training starts from.
        """
        raise NotImplementedError

    def to_deploy(self) -> nn.Module | None:
        """A module for inference that computes the same in fewer operations; None where the method has none."""
        return None


class StreamModule(PeftModule):
    """A method at a stream site, constructed as ``cls(channels, **options)``."""

    possible_sites = STREAM_SITES

    def forward(self, x: Tensor, hw: Grid) -> Tensor:
        """Map the tokens of a block.

        Args:
            x: ``(B, N, C)``, whose last ``H*W`` tokens are the row-major grid.
            hw: ``(H, W)``.

        Returns:
            ``(B, N, C)``: what takes the place of ``x``, or at ``parallel_ffn`` what is added beside the FFN.
        """
        raise NotImplementedError

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """``x + branch(x)``, for a branch of layers of this module that ends with a linear one.

        The tokens are handed to the branch as ``(B*N, C)`` and the sum is written over what it returns: otherwise that
        would be a view, of whose base autograd copies the gradient once more. What is not contiguous stays as it is (a
        linear layer computes it by other products), and so does what a hook of one of the layers may hold.
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
    """Whether :meth:`forward` is what :meth:`delta_weight`, added to the linear's weight, would do."""

    def forward(self, x: Tensor, out: Tensor, linear: StockLinear) -> Tensor:
        """What is added to the output of a linear layer, or of the slice of a fused one.

        Args:
            x: the layer's input, ``(..., in_channels)``.
            out: its output, ``(..., out_channels)``.
            linear: the layer itself, which has the weight and the bias.

        Returns:
            ``(..., out_channels)``.
        """
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """What is added to the linear's ``weight`` when the method is merged, both ``(out_channels, in_channels)``."""
        raise NotImplementedError

    def start_from(self, weight: Tensor) -> None:
        """Give initial values to what depends on the weight of the base, ``(out_channels, in_channels)``.

        This is called after :meth:`~PeftModule.reset_parameters`, with the weights that training starts from.
        """


class Method:
    """A method with its options, ready to be attached to a backbone.

    A method that is no one module at fixed sites derives from this and is itself registered in ``METHODS``; it is
    constructed from the config's options.
    """

    @property
    def name(self) -> str:
        """What reports and messages call the method."""
        return type(self).__name__

    @property
    def trainable(self) -> tuple[str, ...]:
        """Rules of :mod:`mona_mm.frozen.rules` for what of the base the method trains."""
        return ()

    def attach(self, backbone: nn.Module) -> None:
        """Put the method into a supported backbone, in place.

        Raises:
            UnsupportedHostError: see :func:`mona_mm.hosts.find_host`.
            ConfigError: if the backbone already carries a method, or this one cannot attach to such a host.
        """
        inject(backbone, self.modules(find_host(backbone), sites_of(backbone)))
        make_record(backbone).method = self.name
        start_from_base(backbone)

    def check_base(self, backbone: nn.Module) -> None:
        """Raise a UserError if the base, which holds the weights that training starts from, does not fit."""

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """By path of a block and site, the modules to attach.

        Args:
            host: of the backbone.
            sites: that its blocks have.

        Raises:
            ConfigError: if the method cannot attach to such a host.
        """
        raise NotImplementedError


def start_from_base(backbone: nn.Module) -> None:
    """Let the modules at linear sites of a backbone start from the weights that it holds, in place."""
    for module, weight in modules_beside_linears(backbone):
        if isinstance(module, LinearModule):
            module.start_from(weight.detach())


def deploy(model: nn.Module) -> int:
    """Put the form for inference in the place of every module of a method that has one, in place.

    Returns:
        How many there were.
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
    """A :class:`PeftModule` at the same sites of every block.

    Args:
        cls: the class of its modules.
        sites: where the config says it attaches; None for wherever of ``cls.sites`` the host has a site.
        options: arguments of ``cls``.
    """

    cls: type[PeftModule]
    sites: tuple[str, ...] | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.__name__

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """See :meth:`Method.modules`.

        Raises:
            ConfigError: if the host lacks the sites, or the method would be wider inside than its widest block, or
                far larger than what it tunes.
        """
        names = self._sites_on(host)
        chosen = {path: {name: of[name] for name in names if name in of} for path, of in sites.items()}
        check_widths(self.name, self.cls, self.options, chosen)
        check_size(self.name, sites, chosen, lambda name, site: self.cls(*site.widths, **self.options))
        return {
            path: {name: self.cls(*site.widths, **self.options) for name, site in of.items()}
            for path, of in chosen.items()
        }

    def _sites_on(self, host: Host) -> tuple[str, ...]:
        sites = self.sites or tuple(site for site in self.cls.sites if site in host.sites)
        wrong = [site for site in sites if site not in host.sites]
        if wrong or not sites:
            block = ' and '.join(dict.fromkeys(spec.cls.rpartition('.')[2] for spec in host.specs))
            possible = ', '.join(site for site in self.cls.possible_sites if site in host.sites)
            raise ConfigError(
                f'peft: {self.name} cannot attach at {", ".join(wrong or self.cls.sites)} of {block}, which has no '
                f"such site. Name some of those it has in peft=dict(type='{self.name}', sites=[...]): {possible}."
            )
        return sites


def build_method(cfg: dict[str, Any]) -> Method:
    """Resolve ``peft=dict(type=..., sites=..., **options)`` of a config.

    Raises:
        ConfigError: if ``type`` is missing or not a registered method, a site is not one the method can be at
            (the error lists what can be), or an option's value cannot be.
        UnknownOptionError: if an option is not one of the method's arguments (the error lists those).
    """
    if not isinstance(cfg, dict):
        raise ConfigError(f"peft={show(cfg)} must be a dict, such as dict(type='Mona').")
    options = dict(cfg)
    given_type = options.pop('type', None)
    method = look_up(METHODS, given_type)
    if not (inspect.isclass(method) and issubclass(method, StreamModule | LinearModule | Method)):
        raise ConfigError(
            f'peft={show(cfg)}: unknown method {show(given_type)}; methods are '
            f'{", ".join(sorted(METHODS.module_dict))}.'
        )
    is_module = issubclass(method, PeftModule)
    sites = _sites(method, options.pop('sites', None)) if is_module else None
    check_options(f'peft: {method.__name__}', method, options, given=NOT_OPTIONS, more=['sites'] if is_module else [])
    return ModuleMethod(method, sites, options) if is_module else method(**options)


def _sites(method: type[PeftModule], given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    sites = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not sites or any(site not in method.possible_sites or sites.count(site) > 1 for site in sites):
        raise ConfigError(
            f'peft: {method.__name__} cannot attach at sites={show(given)}; its sites are '
            f'{", ".join(method.possible_sites)}, each once.'
        )
    return sites


def check_size(name: str, sites: Sites, chosen: Sites, build: Callable[[str, Site], nn.Module]) -> None:
    """Check that the modules of a method are no larger than a few times what they tune, before memory is taken.

    Args:
        name: of the method.
        sites: that the blocks have.
        chosen: those of them where a module is to be.
        build: makes the module of a site by its name.

    Raises:
        ConfigError: if they are.
    """
    tuned = sum(next(iter(of.values())).block_size for of in sites.values() if of)
    counts = Counter((name, site) for of in chosen.values() for name, site in of.items())
    total = 0
    for (site_name, site), count in counts.items():
        try:
            with meta_device():
                module = build(site_name, site)
        except UserError:
            raise
        except Exception:  # somebody's module, which computes with values: it is made without being measured
            return
        total += count * sum(p.numel() for p in module.parameters())
        if total > LARGEST_SHARE * tuned:
            raise ConfigError(
                f'{name}: with these options it would have more than {LARGEST_SHARE} times as many parameters as the '
                f'blocks that it tunes, {tuned:,}. Give smaller ones.'
            )


def check_widths(name: str, function: Callable, options: Mapping[str, Any], sites: Sites) -> None:
    """Check that no :data:`~mona_mm.options.Width` among ``options`` exceeds the widest block.

    Raises:
        ConfigError: if one does.
    """
    widest = max(max(site.widths) for of in sites.values() for site in of.values())
    for option in width_options(function):
        value = options.get(option, inspect.signature(function).parameters[option].default)
        if value > widest:
            raise ConfigError(
                f'{name}: {option}={value} is larger than the widest block of this backbone, {widest}; give at most '
                'that.'
            )
