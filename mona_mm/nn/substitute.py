"""A stand-in for a module, for one call: what is kept on a module during a call, other threads would find."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mona_mm.errors import ConfigError
from mona_mm.nn.mixin import is_parametrized

_EXPORT = 'torch.fx.experimental.proxy_tensor'


def substitute(module: nn.Module, parts: Mapping[str, Any]) -> nn.Module:
    """A stand-in for a module that has other parts, for one call: everything else it shares, and nothing is changed.

    So nothing of a call is ever kept on a module, where another thread's call would find it.

    Args:
        module: whatever has the parts. Of its stand-in the caller runs the class's forward.
        parts: by path, tensors to take for parameters, and callables for submodules.

    Raises:
        ConfigError: if a module within it, around a part, has been given a ``forward`` of its own, which would not
            see the part.
    """
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, part in parts.items():
        child, _, rest = path.partition('.')
        if rest:
            inner.setdefault(child, {})[rest] = part
        else:
            own[child] = part
    children = vars(module)['_modules']
    for child, within in inner.items():
        part = children.get(child)
        if part is None or 'forward' in vars(part):
            raise ConfigError(
                f'{child} in this {type(module).__name__} is wrapped, or its forward replaced (by an activation '
                f'checkpoint, for instance), which hides {", ".join(within)} in it. Wrap the block or the backbone '
                'around it instead.'
            )
        own[child] = substitute(part, within)
    cls = type(module)
    attributes = dict(vars(module))
    attributes.pop('forward', None)
    while any(
        base.__module__ == _EXPORT for base in cls.__mro__
    ):  # torch.export's view of it, which has no other parts
        cls = cls.__bases__[-1]
    # A parametrized tensor is a property of the class, and would be found before the stand-in's.
    while is_parametrized(cls):
        attributes.update({name: getattr(module, name) for name in module.parametrizations})
        cls = cls.__bases__[0]
    modules = {name: own.pop(name) for name in list(own) if name in children}
    if modules:
        attributes['_modules'] = {**children, **modules}
    attributes.update(own)
    stand_in = object.__new__(cls)
    vars(stand_in).update(attributes)
    return stand_in
