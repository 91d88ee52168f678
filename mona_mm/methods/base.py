"""What every method is: a module attached at named sites of a host's blocks."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ClassVar

from torch import Tensor, nn

from mona_mm.errors import ConfigError, UnknownOptionError
from mona_mm.registry import METHODS


class PeftModule(nn.Module):
    """Base class of the methods.

    A subclass is constructed once for every (block, site) pair, as ``cls(channels, **options)``, where ``options``
    are what the config's ``peft=dict(type=..., **options)`` says.
    """

    sites: ClassVar[tuple[str, ...]]
    """The sites (see :mod:`mona_mm.sites`) at which the method attaches in every block."""

    def reset_parameters(self) -> None:
        """Give the method's own parameters their initial values.

        Called after the base has been initialised or loaded, so that no initialisation pass of the host, which
        would overwrite them with its own rule, decides what training starts from.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map a token stream ``(B, N, C)``, whose last ``H*W`` tokens are the row-major ``(H, W)`` grid."""
        raise NotImplementedError


def build_method(cfg: dict[str, Any]) -> tuple[type[PeftModule], Callable[[int], PeftModule]]:
    """Resolve ``peft=dict(type=..., **options)`` of a config.

    Returns:
        The method's class, and a function that builds one of its modules from a channel count.

    Raises:
        ConfigError: if ``type`` is missing or not a registered method (the error lists them).
        UnknownOptionError: if an option is not one of the method's arguments (the error lists those).
    """
    options = dict(cfg)
    name = options.pop('type', None)
    method = METHODS.get(name) if isinstance(name, str) else name
    if not (inspect.isclass(method) and issubclass(method, PeftModule)):
        raise ConfigError(f'peft={cfg}: unknown method {name!r}; methods are {", ".join(sorted(METHODS.module_dict))}.')

    accepted = list(inspect.signature(method).parameters)[1:]  # the first one is `channels`
    for option in options:
        if option not in accepted:
            close = get_close_matches(option, accepted, n=1)
            hint = f' Did you mean {close[0]!r}?' if close else ''
            raise UnknownOptionError(
                f'peft: {name} has no argument {option!r}; it accepts {", ".join(accepted)}.{hint}'
            )
    return method, lambda channels: method(channels, **options)
