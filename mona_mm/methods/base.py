"""What every method is: a module attached at named sites of a host's blocks."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UnknownOptionError
from mona_mm.observed import is_hooked
from mona_mm.registry import METHODS
from mona_mm.sites import LINEAR_SITES, STREAM_SITES, Host, inject

_GIVEN = ('channels', 'in_channels', 'out_channels', 'site')
"""Arguments of modules that are no options: what they attach to says them."""


class PeftModule(nn.Module):
    """Base class of the methods.

    A subclass is constructed once for every (block, site) pair: as ``cls(channels, **options)`` at a stream site, as
    ``cls(in_channels, out_channels, **options)`` at a linear site, where ``options`` are what the config's
    ``peft=dict(type=..., **options)`` says.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.sites`) at which the method attaches in every block, unless the config's ``sites``
    names others of the same kind. Those of them that a host does not have are left out."""

    hidden: ClassVar[str | None] = None
    """The argument that says how wide the method is inside: at most as wide as the host's widest block."""

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
            ConfigError: if the host lacks the sites, or the method would be wider inside than its widest block.
        """
        sites = self._sites_on(host)
        widest = max(max(of[site]) for of in widths.values() for site in sites)
        default = {name: p.default for name, p in inspect.signature(self.cls).parameters.items()}
        hidden = {**default, **self.options}.get(self.cls.hidden)
        if isinstance(hidden, int) and hidden > widest:
            raise ConfigError(
                f'{self.cls.__name__}: {self.cls.hidden}={hidden} is larger than the widest block of this backbone, '
                f'{widest}; give at most that.'
            )
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
        ConfigError: if ``type`` is missing or not a registered method, or a site is not one the method can be at
            (the error lists what can be).
        UnknownOptionError: if an option is not one of the method's arguments (the error lists those).
    """
    if not isinstance(cfg, dict):
        raise ConfigError(f"peft={cfg!r} must be a dict, such as dict(type='Mona').")
    options = dict(cfg)
    name = options.pop('type', None)
    method = METHODS.get(name) if isinstance(name, str) else name
    if not (inspect.isclass(method) and issubclass(method, PeftModule | Method)):
        raise ConfigError(f'peft={cfg}: unknown method {name!r}; methods are {", ".join(sorted(METHODS.module_dict))}.')

    is_module = issubclass(method, PeftModule)
    sites = options.pop('sites', None) if is_module else None
    if sites is not None:
        given, possible = sites, _same_kind(method)
        sites = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, Sequence) else ()
        if not sites or len(set(sites)) < len(sites) or any(site not in possible for site in sites):
            raise ConfigError(
                f'peft: {name} cannot attach at sites={given!r}; its sites are {", ".join(possible)}, each once.'
            )

    check_option_names(name, method, options, ['sites'] if is_module else [])
    return ModuleMethod(method, sites, options) if is_module else method(**options)


def check_option_names(name: str, cls: type, options: Iterable[str], more: Sequence[str] = ()) -> None:
    """Check that ``options`` are arguments of a class, or among ``more``.

    Raises:
        UnknownOptionError: if one is not; it lists those.
    """
    accepted = [p for p in inspect.signature(cls).parameters if p not in _GIVEN] + list(more)
    for option in options:
        if option not in accepted:
            close = get_close_matches(option, accepted, n=1)
            hint = f' Did you mean {close[0]!r}?' if close else ''
            raise UnknownOptionError(
                f'peft: {name} has no argument {option!r}; it accepts {", ".join(accepted)}.{hint}'
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


def positive(method: str, name: str, value: Any) -> None:
    """Check a width of a method.

    Raises:
        ConfigError: if it is not a whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'{method}: {name}={value!r} must be a whole number of at least 1.')


def probability(method: str, name: str, value: Any) -> None:
    """Check a drop probability of a method.

    Raises:
        ConfigError: if it is not in [0, 1).
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise ConfigError(f'{method}: {name}={value!r} must be a probability in [0, 1).')


def number(method: str, name: str, value: Any) -> None:
    """Check a factor of a method.

    Raises:
        ConfigError: if it is not a finite number.
    """
    if not _is_number(value):
        raise ConfigError(f'{method}: {name}={value!r} must be a number.')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
