"""Change the behaviour of one module without changing its state dict or any other module of its class."""

from typing import Any

from torch import nn


class Mixin:
    """Base of the classes that :func:`mix_in` puts in front of a module's own class.

    Unlike an attribute that replaces ``forward``, a class survives a deepcopy: a copy's methods are bound to the copy.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time, so pickle cannot find it by name.
        mixins, cls = [], type(self)
        while _is_mixed(cls):
            mixin, cls = cls.__bases__
            mixins.insert(0, mixin)
        if issubclass(cls, Mixin):  # a class that other code derived from the mixed one, with pickling of its own
            return super().__reduce_ex__(protocol)
        return _new, (cls, *mixins), self.__dict__


def mix_in(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put ``mixin`` in front of the class of ``module``, in place; its class keeps its name."""
    module.__class__ = _mixed(type(module), mixin)


def mix_out(module: nn.Module) -> None:
    """Undo the last :func:`mix_in`."""
    module.__class__ = _unmixed(type(module))


def stock_class(module: nn.Module) -> type:
    """The class of a module without mixins and without the classes that :mod:`torch.nn.utils.parametrize` and
    torch.export derive."""
    return next(
        cls
        for cls in type(module).__mro__
        if issubclass(cls, nn.Module) and not issubclass(cls, Mixin) and not is_parametrized(cls)
    )


def qualified_name(cls: type) -> str:
    return f'{cls.__module__}.{cls.__qualname__}'


_CLASSES: dict[tuple[type, type[Mixin]], type] = {}


def _mixed(cls: type, mixin: type[Mixin]) -> type:
    made = _CLASSES.get((cls, mixin))
    if made is None:
        made = type(cls.__name__, (mixin, cls), {'__module__': __name__, '__doc__': mixin.__doc__})
        made = _CLASSES.setdefault((cls, mixin), made)  # atomic: two threads get the same class
    return made


def _is_mixed(cls: type) -> bool:
    return issubclass(cls, Mixin) and cls.__module__ == __name__ and len(cls.__bases__) == 2


def _unmixed(cls: type) -> type:
    if _is_mixed(cls):
        return cls.__bases__[1]
    # Other code (parametrize, torch.export) derived this class from a mixed one: derive the same one without the mixin.
    base, *others = cls.__bases__
    attributes = {name: value for name, value in vars(cls).items() if name not in ('__dict__', '__weakref__')}
    return type(cls.__name__, (_unmixed(base), *others), attributes)


def is_parametrized(cls: type) -> bool:
    """Whether :mod:`torch.nn.utils.parametrize` has made this class for a module with parametrized tensors."""
    return cls.__module__ == 'torch.nn.utils.parametrize' and cls.__name__.startswith('Parametrized')


def _new(cls: type, *mixins: type[Mixin]) -> nn.Module:
    for mixin in mixins:
        cls = _mixed(cls, mixin)
    return cls.__new__(cls)
