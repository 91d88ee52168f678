"""What a delta says of the methods of its model, and whether another model has the same."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from mona_mm.checkpoint.delta_file import Delta
from mona_mm.errors import CheckpointMismatchError
from mona_mm.options import widths
from mona_mm.record import freeze_records, record_of
from mona_mm.registry import METHODS

# Options of a method that may differ, since they change neither its weights nor its outputs in evaluation.
# The names of its tensors tell in which blocks or beside which layers it is; `name` is for messages.
_FREE_OPTIONS = ('dropout', 'plan', 'blocks', 'path', 'slices', 'name')


def describe_methods(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe every module that PeftBackbone, PeftModel or FrozenModel has made, by path: its method (of a PeftModel
    its targets), options and rules, the dtype of its frozen weights if it is not float32, and the places of each method
    if there are several."""
    return {
        path: dict(
            type=type_, options=options, trainable=list(record.rules), **_frozen_type(module), **_places_of(module)
        )
        for path, module, record in freeze_records(model)
        for type_, options in [_method_of(module)]
    }


def check_methods(model: nn.Module, delta: Delta) -> None:
    """Check that a delta is of the methods that the model has, in whatever way their configs say it.

    Raises:
        CheckpointMismatchError: if it is of others, with both.
    """
    in_model, in_file = describe_methods(model), delta.header.methods
    # The type that a file names is compared before it is looked up: a registry imports the module that a name starts
    # with.
    if _method_types(in_model) == _method_types(in_file) and all(
        _are_same_methods(method, in_file[path]) for path, method in in_model.items()
    ):
        return
    raise CheckpointMismatchError(
        f'{delta.file} is a delta of another method than the model has: {_format_methods(in_file)} in the file, '
        f'{_format_methods(in_model)} in the model. Load it with the config that it was trained with.'
    )


def _method_types(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The types of the methods in every module of a description, in order of the alphabet; those of a PeftModel, which
    stand beside layers, are told apart from those in blocks."""
    return {
        path: sorted([*(type_ for type_, _ in _parts(method)), *(['PeftModel'] if _has_targets(method) else [])])
        for path, method in methods.items()
    }


def _has_targets(described: Mapping[str, Any]) -> bool:
    return described.get('type') == 'PeftModel'


def _format_methods(methods: Mapping[str, Mapping[str, Any]]) -> str:
    if not methods:
        return 'none'
    texts = []
    for path, method in methods.items():
        options = {**method.get('options', {}), 'trainable': method.get('trainable', [])}
        options = ', '.join(f'{name}={value!r}' for name, value in options.items())
        texts.append(f'{path or "model"}: {method.get("type") or "no method"} ({options})')
    return '; '.join(texts)


def _method_of(module: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """The type and options of a module's method; of several, their types joined by ``'+'`` and all their configs."""
    config = record_of(module).config
    if isinstance(config, list) and len(config) > 1:
        return '+'.join(method['type'] for method in config), dict(methods=config)
    options = dict((config[0] if isinstance(config, list) else config) or {})
    return options.pop('type', None), options


def _frozen_type(module: nn.Module) -> dict[str, str]:
    dtype = record_of(module).frozen_dtype
    return dict(frozen_dtype=dtype) if dtype else {}


def _places_of(module: nn.Module) -> dict[str, list[list[str]]]:
    """The paths of the modules or layers of each of several methods, in the order of the config; of one method, the
    names of its tensors tell them."""
    record = record_of(module)
    places = [target.layers for target in record.targets] or list(record.paths.values())
    return dict(places=[sorted(paths) for paths in places]) if len(places) > 1 else {}


def _are_same_methods(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two descriptions of methods of the same types say the same, in whatever way their configs say it."""
    by_pattern = {
        option
        for described in (first, second)
        for type_, options in _parts(described)
        for option in _widths_by_pattern(type_, options)
    }
    return _resolved(first, by_pattern) == _resolved(second, by_pattern)


def _widths_by_pattern(type_: str, options: Mapping[str, Any]) -> list[str]:
    """The options that give a width by patterns of blocks; the shapes of the tensors tell the width in each."""
    method = METHODS.get(type_) if type_ else None
    return [] if method is None else [name for name in widths(method) if isinstance(options.get(name), Mapping)]


def _resolved(described: Mapping[str, Any], free: Collection[str]) -> Any:
    """A description with the method's defaults filled in, so that a default equals an option that is left out.

    Args:
        described: the description.
        free: names of options that may differ.
    """
    parts = [(type_, _resolved_options(type_, options, free)) for type_, options in _parts(described)]
    places = described.get('places')
    if isinstance(places, list) and len(places) == len(parts):
        parts = [(*part, paths) for part, paths in zip(parts, places, strict=True)]
    return sorted(parts, key=repr), sorted(described.get('trainable', []))


def _parts(described: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The type and options of every method of a description, or target of a PeftModel; it may come from a file."""
    type_, options = described.get('type'), described.get('options')
    options = options if isinstance(options, Mapping) else {}
    parts = options.get('targets' if _has_targets(described) else 'methods')
    if not isinstance(parts, list | tuple) or not all(isinstance(each, Mapping) for each in parts):
        return [(str(type_ or ''), options)]
    return [(str(each.get('type')), {k: v for k, v in each.items() if k != 'type'}) for each in parts]


def _resolved_options(type_: str, given: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """All options of one method that bear on its weights and outputs."""
    method = METHODS.get(type_) if type_ else None
    defaults = {}
    if method is not None:
        parameters = inspect.signature(method).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        if isinstance(getattr(method, 'sites', None), tuple):  # False for a Method without fixed sites
            defaults['sites'] = sorted(method.sites)
    options = {**defaults, **given}
    if isinstance(options.get('sites'), list | tuple):
        options['sites'] = sorted(options['sites'], key=str)
    return {name: _with_lists(value) for name, value in options.items() if name not in {*_FREE_OPTIONS, *free}}


def _with_lists(value: Any) -> Any:
    """A value with lists in place of tuples, as it is after it has been in JSON."""
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value
