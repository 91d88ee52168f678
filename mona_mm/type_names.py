"""What a ``type`` of a config means, however it is written.

A ``type`` is a registered name (``'PeftBackbone'``), one with a scope (``'mona_mm.PeftBackbone'``), the full name of a
class, which mmengine writes when it dumps a pure-Python config (``'mona_mm.backbone.PeftBackbone'``), the class or
function itself, or an object of mmengine's that imports it later.
"""

import inspect
from functools import partial
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry, init_default_scope

from mona_mm.compat.runner import forget_scopes

_CLASSES = dict(
    BN='BatchNorm2d',
    BN1d='BatchNorm1d',
    BN2d='BatchNorm2d',
    BN3d='BatchNorm3d',
    SyncBN='SyncBatchNorm',
    GN='GroupNorm',
    LN='LayerNorm',
    IN='InstanceNorm2d',
    IN1d='InstanceNorm1d',
    IN2d='InstanceNorm2d',
    IN3d='InstanceNorm3d',
    HSwish='Hardswish',
    Clip='Clamp',
    Conv='Conv2d',
    Constant='ConstantInit',
    Xavier='XavierInit',
    Normal='NormalInit',
    TruncNormal='TruncNormalInit',
    Uniform='UniformInit',
    Kaiming='KaimingInit',
    Caffe2Xavier='Caffe2XavierInit',
    Pretrained='PretrainedInit',
)
"""The names under which mmengine and mmcv register layers and initialisers that are called otherwise."""


def type_name(type_: Any) -> str:
    """The name of the class that a ``type`` means, without scope; the empty string of what is no type."""
    name = full_name(type_).rpartition('.')[2]
    return _CLASSES.get(name, name)


def full_name(type_: Any) -> str:
    """A ``type`` as a string, from which mmengine builds the same; the empty string of what is no type."""
    if isinstance(type_, str):
        return type_
    if isinstance(type_, LazyObject | LazyAttr):
        return f'{type_.module}.{type_}'
    if isinstance(type_, partial):
        return full_name(type_.func)
    if inspect.isclass(type_) or inspect.isroutine(type_):
        return f'{type_.__module__}.{type_.__qualname__}'
    return ''


def is_type(config: Any, *names: str) -> bool:
    """Whether the ``type`` of a config is one of ``names``.

    Args:
        config: a dict with a ``type``, or a ``type`` itself.
        names: registered names. One with a scope, ``'mona_mm.PeftBackbone'``, is also meant by the name alone, which
            mmengine finds in the default scope, but not by that name in another scope.
    """
    given = full_name(_type(config))
    for name in names:
        scope, _, _ = name.rpartition('.')
        if type_name(given) == type_name(name) and (not scope or '.' not in given or _scope(given) == scope):
            return True
    return False


def is_ours(config: Any) -> bool:
    """Whether the ``type`` of a config, or a ``type`` itself, says that it is of mona_mm."""
    return _scope(full_name(_type(config))) == 'mona_mm'


def look_up(registry: Registry, type_: Any) -> Any:
    """What a ``type`` means in a registry: a class or function; None if a name is not there, what is no name itself."""
    if isinstance(type_, LazyObject | LazyAttr):
        return type_.build()
    if not isinstance(type_, str):
        return type_
    if not all(type_.split('.')):  # mmengine would import a package of no name
        return None
    try:
        return registry.get(type_)
    except (RuntimeError, ValueError):  # mmengine's and Python's, of what is no name of an object
        return None


def with_names(node: Any) -> Any:
    """A copy of a config in plain dicts, lists and tuples, with the full names of classes and functions in it, as
    mmengine dumps it."""
    if isinstance(node, dict):
        return {key: with_names(value) for key, value in dict.items(node)}  # ConfigDict's own would import
    if isinstance(node, list | tuple):
        return type(node)(with_names(value) for value in node)
    return node if isinstance(node, str) else full_name(node) or node


def enter_scope(cfg: Config) -> None:
    """Let names without a scope mean what they mean in the run of a config, before there is a runner.

    That is mmengine's own where the config says nothing, and with ``default_scope=None``, as pure-Python configs have
    it, that of the library whose code asks.
    """
    scope = cfg.get('default_scope', 'mmengine')
    if scope is None:
        forget_scopes()
    else:
        init_default_scope(scope)


def _type(config: Any) -> Any:
    return dict.get(config, 'type') if isinstance(config, dict) else config


def _scope(name: str) -> str:
    return name.partition('.')[0] if '.' in name else ''
