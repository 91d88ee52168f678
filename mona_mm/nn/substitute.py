"""A stand-in for a module during one call, so that the call keeps nothing on the module that threads share."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mona_mm.errors import ConfigError
from mona_mm.nn.mixin import is_parametrized
from mona_mm.nn.tracing import is_traced

_EXPORT = 'torch.fx.experimental.proxy_tensor'


def call_substituted(module: nn.Module, parts: Mapping[str, Any], call: Callable[[nn.Module], Any]) -> Any:
    """Call a function with a stand-in for ``module`` in which some parts are exchanged; return what it returns.

    What the call assigns to attributes of the stand-in, as a stock forward may for others to read, the module has
    afterwards. Tracers do not see that.

    Args:
        module: the module that has the parts.
        parts: tensors in place of parameters, and modules in place of submodules, by path. Without any, the module
            stands for itself.
        call: the function, which runs the class's forward on the stand-in.

    Raises:
        ConfigError: see :func:`substitute`.
    """
    if not parts:
        return call(module)
    made: list[tuple[nn.Module, nn.Module]] = []
    stand_in = substitute(module, parts, made)
    if is_traced():
        return call(stand_in)
    before = [dict(vars(each)) for each, _ in made]
    result = call(stand_in)
    for (each, original), attributes in zip(made, before, strict=True):
        for name, value in vars(each).items():
            if name not in attributes or attributes[name] is not value:
                vars(original)[name] = value
    return result


def substitute(
    module: nn.Module, parts: Mapping[str, Any], made: list[tuple[nn.Module, nn.Module]] | None = None
) -> nn.Module:
    """Make a stand-in for ``module`` in which some parts are exchanged, for one call.

    The stand-in shares everything else with the module, which is not changed: a call of another thread never sees the
    parts.

    Args:
        module: the module that has the parts. The caller runs the class's forward on its stand-in.
        parts: tensors in place of parameters, and modules in place of submodules, by path.
        made: gets this stand-in and those of the submodules around the parts, each with what it stands for.

    Raises:
        ConfigError: if a submodule around a part has a ``forward`` of its own (on the instance), which would not see
            the part.
    """
    direct: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, part in parts.items():
        child, _, path_in_child = path.partition('.')
        if path_in_child:
            inner.setdefault(child, {})[path_in_child] = part
        else:
            direct[child] = part
    children = vars(module)['_modules']
    for child, within in inner.items():
        part = children.get(child)
        if part is None or 'forward' in vars(part):
            raise ConfigError(
                f'{child} in this {type(module).__name__} is wrapped, or its forward was replaced (by an activation '
                f'checkpoint, for instance), so that {", ".join(within)} in it cannot be reached. Wrap the block or '
                'the backbone around it instead.'
            )
        direct[child] = substitute(part, within, made)
    cls = type(module)
    attributes = dict(vars(module))
    attributes.pop('forward', None)
    # torch.export derives a class that only adds its view of the parameters.
    while any(base.__module__ == _EXPORT for base in cls.__mro__):
        cls = cls.__bases__[-1]
    # A parametrized tensor is a property of the class, and would be found before the stand-in's.
    while is_parametrized(cls):
        attributes.update({name: getattr(module, name) for name in module.parametrizations})
        cls = cls.__bases__[0]
    modules = {name: direct.pop(name) for name in list(direct) if name in children}
    if modules:
        attributes['_modules'] = {**children, **modules}
    attributes.update(direct)
    stand_in = object.__new__(cls)
    vars(stand_in).update(attributes)
    if made is not None:
        made.append((stand_in, module))
    return stand_in
