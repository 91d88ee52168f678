"""The registry of faster forms of stock modules. Each computes the same as the stock module, within rounding."""

from collections.abc import Callable

from torch import nn

from mona_mm.nn.mixin import qualified_name

_FAST_FORMS: dict[str, Callable[[nn.Module], bool]] = {}


def fast_form_of(*classes: str) -> Callable:
    """Register the decorated function as the one that makes modules of some classes fast.

    The function puts the fast form in front of a module's class, in place, and returns whether it did.

    Args:
        classes: qualified names of the modules' classes.
    """

    def register(make_fast: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
        _FAST_FORMS.update(dict.fromkeys(classes, make_fast))
        return make_fast

    return register


def make_fast(module: nn.Module) -> bool:
    """Put the fast form in front of a module's class, in place, if it has one; return whether it did."""
    function = _FAST_FORMS.get(qualified_name(type(module)))
    return function is not None and function(module)
