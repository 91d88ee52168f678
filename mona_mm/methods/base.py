"""What every method is: a module attached at named sites of a host's blocks."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UserError
from mona_mm.meta import meta_device
from mona_mm.observed import is_hooked
from mona_mm.options import check_options, show
from mona_mm.options import widths as widths_of
from mona_mm.registry import METHODS
from mona_mm.sites import LINEAR_SITES, STREAM_SITES, Host, inject
from mona_mm.type_names import look_up

GIVEN = ('channels', 'in_channels', 'out_channels', 'site')
"""Arguments of modules that are no options: what they attach to says them."""

LARGEST_SHARE = 4
"""How many times as large as the linear layers of the blocks a method may be."""


class PeftModule(nn.Module):
    """Base class of the methods.

    A subclass is constructed once for every (block, site) pair: as ``cls(channels, **options)`` at a stream site, as
    ``cls(in_channels, out_channels, **options)`` at a linear site, where ``options`` are what the config's
    ``peft=dict(type=..., **options)`` says. They are checked against the annotations of the constructor, see
    :mod:`mona_mm.options`; one that says how wide the method is inside is a :data:`~mona_mm.options.Width`.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.sites`) at which the method attaches in every block, unless the config's ``sites``
    names others of the same kind. Those of them that a host does not have are left out."""

    is_weight_delta: bool = False
    """At a linear site: whether :meth:`forward` is what ``delta_weight()``, added to the linear's weight, would do."""

    fast: bool = True
    """Whether :meth:`forward` may compute the same in fewer operations, where the method has such a form."""

    def reset_parameters(self) -> None:
        """Give the method's own parameters their initial values.

        Called after the base has been initialised or loaded, so that no initialisation pass of the host, which
        would overwrite them with its own rule, decides what training starts from.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """At a stream site, map ``(B, N, C)``, whose last ``H*W`` tokens are the row-major ``(H, W)`` grid.

        At a linear site the second argument is not the grid but the linear's output (or slice of it): map input
        ``(..., in_channels)`` and output ``(..., out_channels)`` to what is added to the output.
        """
        raise NotImplementedError


class Method:
    """A method with its options, ready to be attached to a backbone.

    A method that is no one module at fixed sites derives from this and is itself registered in ``METHODS``; it is
    constructed from the config's options.
    """

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def trainable(self) -> tuple[str, ...]:
        """Rules of :mod:`mona_mm.freeze` for what of the base the method trains."""
        return ()

    def attach(self, backbone: nn.Module) -> None:
        """Put the method into a supported backbone, in place; see :func:`mona_mm.sites.inject` for what is raised."""
        inject(backbone, self)

    def check_base(self, backbone: nn.Module) -> None:
        """Called when the base holds the weights that training starts from; raises a UserError if they do not fit."""

    def modules(
        self, host: Host, widths: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> dict[str, dict[str, nn.Module]]:
        """See :class:`mona_mm.sites.Attachment`."""
        raise NotImplementedError


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
        return self.cls.__name__

    def modules(
        self, host: Host, widths: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> dict[str, dict[str, PeftModule]]:
        """See :class:`mona_mm.sites.Attachment`.

        Raises:
            ConfigError: if the host lacks the sites, or the method would be wider inside than its widest block, or
                far larger than what it tunes.
        """
        sites = self._sites_on(host)
        at_sites = {path: {site: of[site] for site in sites} for path, of in widths.items()}
        check_widths(self.name, self.cls, self.options, at_sites)
        check_size(self.name, widths, at_sites, lambda site, width: self.cls(*width, **self.options))
        return {path: {site: self.cls(*of[site], **self.options) for site in sites} for path, of in widths.items()}

    def _sites_on(self, host: Host) -> tuple[str, ...]:
        sites = self.sites or tuple(site for site in self.cls.sites if site in host.sites)
        wrong = [site for site in sites if site not in host.sites]
        if wrong or not sites:
            name, block = self.cls.__name__, host.block.rpartition('.')[2]
            possible = ', '.join(site for site in _same_kind(self.cls) if site in host.sites)
            raise ConfigError(
                f'peft: {name} cannot attach at {", ".join(wrong or self.cls.sites)} of {block}, which has no such '
                f"site. Name some of those it has in peft=dict(type='{name}', sites=[...]): {possible}."
            )
        return sites


def _same_kind(method: type[PeftModule]) -> tuple[str, ...]:
    return LINEAR_SITES if method.sites[0] in LINEAR_SITES else STREAM_SITES


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
    if not (inspect.isclass(method) and issubclass(method, PeftModule | Method)):
        raise ConfigError(
            f'peft={show(cfg)}: unknown method {show(given_type)}; methods are '
            f'{", ".join(sorted(METHODS.module_dict))}.'
        )
    name = method.__name__

    is_module = issubclass(method, PeftModule)
    sites = options.pop('sites', None) if is_module else None
    if sites is not None:
        given, possible = sites, _same_kind(method)
        sites = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, Sequence) else ()
        if not sites or any(site not in possible or sites.count(site) > 1 for site in sites):
            raise ConfigError(
                f'peft: {name} cannot attach at sites={show(given)}; its sites are {", ".join(possible)}, each once.'
            )

    check_options(f'peft: {name}', method, options, given=GIVEN, more=['sites'] if is_module else [])
    return ModuleMethod(method, sites, options) if is_module else method(**options)


def check_size(
    name: str,
    widths: Mapping[str, Mapping[str, tuple[int, ...]]],
    sites: Mapping[str, Iterable[str]],
    build: Callable[[str, tuple[int, ...]], nn.Module],
) -> None:
    """Check that the modules of a method are no larger than a few times what they tune, before memory is taken.

    Args:
        name: of the method.
        widths: see :meth:`Method.modules`.
        sites: by path of a block, where a module is to be.
        build: makes the module of a site and its widths.

    Raises:
        ConfigError: if they are.
    """
    tuned = sum(math.prod(each) for of in widths.values() for each in of.values() if len(each) == 2)
    counts = Counter((site, widths[path][site]) for path, of in sites.items() for site in of)
    total = 0
    for (site, width), count in counts.items():
        try:
            with meta_device():
                module = build(site, width)
        except UserError:
            raise
        except Exception:  # somebody's module, which computes with values: it is made without being measured
            return
        total += count * sum(p.numel() for p in module.parameters())
        if total > LARGEST_SHARE * tuned:
            raise ConfigError(
                f'{name}: with these options it would have more than {LARGEST_SHARE} times as many parameters as the '
                f'linear layers of the blocks that it tunes, {tuned:,}. Give smaller ones.'
            )


def check_widths(
    name: str, function: Callable, options: Mapping[str, Any], widths: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    """Check that no :data:`~mona_mm.options.Width` among ``options`` exceeds the widest block.

    Raises:
        ConfigError: if one does.
    """
    widest = max(max(width) for of in widths.values() for width in of.values())
    for option in widths_of(function):
        value = options.get(option, inspect.signature(function).parameters[option].default)
        if value > widest:
            raise ConfigError(
                f'{name}: {option}={value} is larger than the widest block of this backbone, {widest}; give at most '
                'that.'
            )


def as_rows(x: Tensor) -> Tensor:
    """``(..., C) -> (tokens, C)``, for a linear layer whose output is to be changed in place.

    Of more axes that output would be a view, of whose base autograd copies the gradient once more. What is not
    contiguous stays as it is: a linear layer computes it by other products.
    """
    return x.flatten(0, -2) if x.is_contiguous() else x


def owned(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, to be changed in place: a copy of its own where a hook of the layer may hold the output."""
    out = layer(x)
    return out.clone() if is_hooked(layer) else out


def add_residual(branch: Tensor, x: Tensor) -> Tensor:
    """``x`` plus the ``branch`` of ``as_rows(x)``, written over the branch where type and layout are those of ``x``."""
    if branch.dtype == x.dtype and x.is_contiguous():
        return branch.add_(as_rows(x)).view(x.shape)
    return x + branch.view(x.shape)
