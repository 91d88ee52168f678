"""The faster forms of stock modules: each computes what the stock one does, within rounding."""

from collections.abc import Callable

from torch import nn

from mona_mm.nn.mixin import qualified_name

_FAST_FORMS: dict[str, Callable[[nn.Module], bool]] = {}


def fast_form_of(*classes: str) -> Callable:
    """Decorator: a function that puts the fast form in front of the class of a module, in place, where it has one.

    Args:
        classes: qualified names of the modules' classes. The function returns whether it did.
    """

    def register(make_fast: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
        _FAST_FORMS.update(dict.fromkeys(classes, make_fast))
        return make_fast

    return register


def make_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of a module, in place, if there is one for that class."""
    function = _FAST_FORMS.get(qualified_name(type(module)))
    return function is not None and function(module)
