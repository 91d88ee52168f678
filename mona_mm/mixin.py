"""Change what one object of a class does, and nothing else: no name in its state dict, no other object."""

from functools import cache
from typing import Any

from torch import nn


class Mixin:
    """Base of the classes that :func:`mix_in` puts in front of an object's own.

    Unlike an attribute that replaces ``forward``, a class survives a deepcopy: a copy's methods are bound to the copy.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so pickle cannot find it by name.
        mixins, cls = [], type(self)
        while issubclass(cls, Mixin):
            mixin, cls = cls.__bases__
            mixins.insert(0, mixin)
        return _new, (cls, *mixins), self.__dict__


def mix_in(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put ``mixin`` in front of the class of ``module``, in place; its class keeps its name."""
    module.__class__ = _mixed(type(module), mixin)


def mix_out(module: nn.Module) -> None:
    """Undo the last :func:`mix_in`."""
    module.__class__ = type(module).__bases__[1]


def stock_class(module: nn.Module) -> type:
    """The class of a module without mixins."""
    cls = type(module)
    while issubclass(cls, Mixin):
        cls = cls.__bases__[1]
    return cls


def qualified_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


@cache
def _mixed(cls: type, mixin: type[Mixin]) -> type:
    return type(cls.__name__, (mixin, cls), {'__module__': __name__, '__doc__': mixin.__doc__})


def _new(cls: type, *mixins: type[Mixin]) -> nn.Module:
    for mixin in mixins:
        cls = _mixed(cls, mixin)
    return cls.__new__(cls)
