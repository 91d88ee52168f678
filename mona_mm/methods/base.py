"""What every method is: a module attached at named sites of a host's blocks."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UnknownOptionError
from mona_mm.registry import METHODS
from mona_mm.sites import LINEAR_SITES, STREAM_SITES


class PeftModule(nn.Module):
    """Base class of the methods.

    A subclass is constructed once for every (block, site) pair: as ``cls(channels, **options)`` at a stream site, as
    ``cls(in_channels, out_channels, **options)`` at a linear site, where ``options`` are what the config's
    ``peft=dict(type=..., **options)`` says.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.sites`) at which the method attaches in every block, unless the config's ``sites``
    names others of the same kind."""

    def reset_parameters(self) -> None:
        """Give the method's own parameters their initial values.

        Called after the base has been initialised or loaded, so that no initialisation pass of the host, which
        would overwrite them with its own rule, decides what training starts from.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """At a stream site, map ``(B, N, C)``, whose last ``H*W`` tokens are the row-major ``(H, W)`` grid.

        At a linear site there is no ``hw``: map the linear's input ``(..., in_channels)`` to what is added to its
        output, ``(..., out_channels)``.
        """
        raise NotImplementedError


def build_method(cfg: dict[str, Any]) -> tuple[tuple[str, ...], Callable[..., PeftModule]]:
    """Resolve ``peft=dict(type=..., sites=..., **options)`` of a config.

    Returns:
        The sites at which to attach, and a function that builds one module from its width or widths.

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
    if not (inspect.isclass(method) and issubclass(method, PeftModule)):
        raise ConfigError(f'peft={cfg}: unknown method {name!r}; methods are {", ".join(sorted(METHODS.module_dict))}.')

    sites = options.pop('sites', method.sites)
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    possible = LINEAR_SITES if method.sites[0] in LINEAR_SITES else STREAM_SITES
    wrong = [site for site in sites if site not in possible]
    if wrong or not sites:
        raise ConfigError(f'peft: {name} cannot attach at sites={list(sites)}; its sites are {", ".join(possible)}.')

    accepted = [p for p in inspect.signature(method).parameters if p not in ('channels', 'in_channels', 'out_channels')]
    for option in options:
        if option not in accepted:
            close = get_close_matches(option, accepted, n=1)
            hint = f' Did you mean {close[0]!r}?' if close else ''
            accepted_list = ', '.join([*accepted, 'sites'])
            raise UnknownOptionError(f'peft: {name} has no argument {option!r}; it accepts {accepted_list}.{hint}')
    return sites, partial(method, **options)


def positive(method: str, name: str, value: Any) -> None:
    """Check a width of a method.

    Raises:
        ConfigError: if it is not a whole number of at least 1.
    """
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f'{method}: {name}={value!r} must be a whole number of at least 1.')


def probability(method: str, name: str, value: Any) -> None:
    """Check a drop probability of a method.

    Raises:
        ConfigError: if it is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ConfigError(f'{method}: {name}={value!r} must be a probability in [0, 1).')
