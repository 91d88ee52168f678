"""Resolve a ``type`` of a config, in whatever form it is written.

A ``type`` is a registered name (``'PeftBackbone'``), a name with a scope (``'mona_mm.PeftBackbone'``), the full name of
a class, which mmengine writes when it dumps a pure-Python config (``'mona_mm.backbone.PeftBackbone'``), the class or
function itself, or one of mmengine's objects for lazy imports.
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
"""The class names of layers and initialisers that mmengine and mmcv register under other names, by those names."""


def type_name(type_: Any) -> str:
    """The name of the class that a ``type`` stands for, without scope; the empty string if it is not a type."""
    name = full_name(type_).rpartition('.')[2]
    return _CLASSES.get(name, name)


def full_name(type_: Any) -> str:
    """A ``type`` as a string from which mmengine builds the same object; the empty string if it is not a type."""
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
        names: registered names. One with a scope, ``'mona_mm.PeftBackbone'``, also matches a ``type`` without scope,
            which mmengine finds in the default scope, but not the same name in another scope.
    """
    given = full_name(_type(config))
    for name in names:
        scope, _, _ = name.rpartition('.')
        if type_name(given) == type_name(name) and (not scope or '.' not in given or _scope(given) == scope):
            return True
    return False


def is_of_mona_mm(config: Any) -> bool:
    """Whether the ``type`` of a config, or a ``type`` itself, has the scope or module of mona_mm."""
    return _scope(full_name(_type(config))) == 'mona_mm'


def look_up(registry: Registry, type_: Any) -> Any:
    """Look up the class or function of a ``type`` in a registry.

    Returns:
        The class or function, None if the registry does not have the name, or ``type_`` itself if it is not a name.
    """
    if isinstance(type_, LazyObject | LazyAttr):
        return type_.build()
    if not isinstance(type_, str):
        return type_
    if not all(type_.split('.')):  # mmengine would try to import a package with an empty name
        return None
    try:
        return registry.get(type_)
    except (RuntimeError, ValueError):  # mmengine and Python raise these for strings that are not names
        return None


def with_names(node: Any) -> Any:
    """Copy a config to plain dicts, lists and tuples, with full names for classes and functions, as mmengine dumps
    it."""
    if isinstance(node, dict):
        return {key: with_names(value) for key, value in dict.items(node)}  # ConfigDict.items would import lazy objects
    if isinstance(node, list | tuple):
        return type(node)(with_names(value) for value in node)
    return node if isinstance(node, str) else full_name(node) or node


def enter_scope(cfg: Config) -> None:
    """Enter the default scope of a config before there is a Runner, so that names without a scope mean the same.

    Without ``default_scope`` it is ``'mmengine'``; with ``default_scope=None``, as in pure-Python configs, there is no
    default scope, and each library uses its own.
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
