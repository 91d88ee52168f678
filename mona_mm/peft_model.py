"""Put methods beside single layers of any module, as ``type='mona_mm.PeftModel'`` in a config asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from mona_mm.backbone import build_base, load_hosts_strictly
from mona_mm.errors import ConfigError
from mona_mm.frozen.copies import moving_copies
from mona_mm.frozen.rules import Rules, as_rules, freeze
from mona_mm.hosts import (
    Layer,
    PeftLayer,
    PeftModules,
    attach_to_layer,
    find_layers,
    read_past,
    taken_out,
    weights_with_method,
)
from mona_mm.methods import LinearModule
from mona_mm.methods.auxiliary import expect_auxiliary_losses
from mona_mm.methods.base import NOT_OPTIONS, check_size, check_widths, start_from_base
from mona_mm.nn.patterns import PathPattern
from mona_mm.options import check_options, checked, show
from mona_mm.record import TargetRecord, freeze_records, make_record, record_of
from mona_mm.registry import METHODS, MODELS
from mona_mm.type_names import is_type, look_up, with_names

_EXAMPLE = "dict(path='decoder.**.{value_proj,output_proj}', type='LoRA', rank=8)"


@MODELS.register_module()
@checked
def PeftModel(base: dict[str, Any], targets: Sequence[Mapping[str, Any]], trainable: Rules | None = None) -> nn.Module:
    """Any module of a config (a whole detector, a neck, a head, a ResNet) with methods beside its layers.

    The object returned *is* the base, modified in place: its class and the names of its parameters stay. The parameters
    of the methods have ``.peft.`` in their names and always train; of the base only ``trainable`` does. A PeftBackbone
    within the base keeps its own method and what trains of it.

    Args:
        base: the module's own config.
        targets: the methods and their layers, each ``dict(path='decoder.layers.*.cross_attn.**', type='LoRA', rank=8)``
            with the options of the method. ``path`` is one pattern, or a list of them, for the whole path of a layer
            (see :class:`~mona_mm.nn.patterns.PathPattern`): ``*`` stands for characters within a name, ``**`` for any
            number of names, and ``re:`` begins a regular expression. Layers are ``Linear``, ``Conv2d``, and of torch's
            ``MultiheadAttention`` at ``attn`` the matrices ``attn.in_proj_weight`` and ``attn.out_proj``; other modules
            that a pattern matches are passed over. ``slices=['q', 'v']`` puts a module beside each of these slices of
            an ``in_proj_weight``, and none beside the rest of it.
        trainable: which parameters of the base train, a rule or a list of rules of :mod:`mona_mm.frozen.rules`; by
            default none.

    Raises:
        ConfigError: if the base or a method is unknown, a method cannot stand beside layers, a pattern matches no layer
            (the error names near paths), two targets match one layer, a layer already has a method, a method cannot
            add to a weight that is read, a rule selects nothing, or the base freezes matched layers by
            ``frozen_stages``.
        UnknownOptionError: if a method does not have an option.
    """
    if not targets:
        raise ConfigError(
            f'targets=[] puts no method anywhere. Give at least one, such as {_EXAMPLE}, or use mona_mm.FrozenModel.'
        )
    methods = [build_target(target) for target in targets]
    module = build_base(base)
    if record_of(module).freeze is not None:
        raise ConfigError(
            'base of a PeftModel cannot itself be a PeftBackbone, FrozenModel or PeftModel: give all targets and '
            '`trainable` in one place. (Parts of the base, such as its backbone, can be.)'
        )
    load_hosts_strictly(module)
    chosen = choose_layers(module, methods)
    records = tuple(_attach(module, method, layers) for method, layers in zip(methods, chosen, strict=True))
    expect_auxiliary_losses(module)
    record = make_record(module)
    record.targets, record.method = records, '+'.join(dict.fromkeys(r.method for r in records))
    record.config = dict(type='PeftModel', targets=[_plain(target) for target in targets])
    _tell_inner_records(module, frozenset().union(*(r.names for r in records)))
    freeze(module, as_rules('none' if trainable is None else trainable))
    # A bound method would be pickled by its name, and would become the base's own when it is loaded.
    module.init_weights = partial(init_weights, module, vars(module).get('init_weights'))
    return module


@dataclass(frozen=True)
class Target:
    """A method for all layers whose paths match.

    Args:
        patterns: the patterns.
        cls: the class of the method's modules.
        options: the options of the method.
        slices: the slices of a fused ``in_proj_weight`` that get a module each; empty for one module for all of it.
    """

    patterns: tuple[PathPattern, ...]
    cls: type[LinearModule]
    options: dict[str, Any]
    slices: tuple[str, ...]

    @property
    def path(self) -> str:
        """The patterns as text."""
        return ', '.join(pattern.text for pattern in self.patterns)

    def place(self, layer: Layer) -> list[Layer]:
        """The layers that get a module where the target matches a layer: itself, or some of its slices."""
        is_added_to_output = layer.linear.is_called and layer.is_plain
        if not is_added_to_output or (layer.is_convolution and not self.cls.has_convolve()):
            layer = layer.by_weight()
        return layer.slices(self.slices) or [layer]

    def build(self, path: str, layer: Layer) -> LinearModule:
        """Build the module for a layer at a path.

        Raises:
            ConfigError: if the module cannot stand beside the layer.
        """
        module = self.cls(*layer.site.widths, **self.options)
        if not layer.linear.is_called and not module.is_weight_delta:
            raise ConfigError(
                f'targets: {self.cls.__name__} with these options cannot stand beside {path}, where it would have to '
                f'add to the weight of a {type(layer.holder).__name__}. Leave dropout and drop_path out, or choose '
                'other layers.'
            )
        return module


def build_target(cfg: Mapping[str, Any]) -> Target:
    """Resolve one of the ``targets`` of a :func:`PeftModel`.

    Raises:
        ConfigError: if its path or method is missing or invalid.
        UnknownOptionError: if the method does not have an option.
    """
    options = dict(cfg)
    paths, given_type, slices = options.pop('path', None), options.pop('type', None), options.pop('slices', ())
    patterns = [paths] if isinstance(paths, str) else paths
    if not isinstance(patterns, list | tuple) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ConfigError(f'targets: path={show(paths)} must be a pattern of paths or a list of them: {_EXAMPLE}')
    cls = look_up(METHODS, given_type)
    if not (isinstance(cls, type) and issubclass(cls, LinearModule)):
        known = [name for name, m in METHODS.module_dict.items() if isinstance(m, type) and issubclass(m, LinearModule)]
        raise ConfigError(
            f'targets: type={show(given_type)} must be a method that can stand beside a layer: '
            f'{", ".join(sorted(known))}.'
        )
    check_options(f'targets: {cls.__name__}', cls, options, given=NOT_OPTIONS, more=['path', 'slices'])
    if not isinstance(slices, list | tuple) or any(s not in ('q', 'k', 'v') or slices.count(s) > 1 for s in slices):
        raise ConfigError(f"targets: slices={show(slices)} must be a list of 'q', 'k' and 'v', each at most once.")
    return Target(tuple(map(PathPattern, patterns)), cls, options, tuple(slices))


def choose_layers(module: nn.Module, targets: Sequence[Target]) -> list[dict[str, list[Layer]]]:
    """Find the layers that each target matches, by path. One with several paths has the first of them that matches.

    Raises:
        ConfigError: if a pattern matches none, two targets match one, a layer has a method already, or it is one whose
            weight is read by code that would not see an addition, or a part of the module follows another part.
    """
    for copy, followed in moving_copies(module).items():
        raise ConfigError(
            f'targets: {copy} in this {type(module).__name__} follows {followed}, and would not with other layers. Put '
            'the PeftModel around the model of which the copy is made, in the config (detector=dict(...)).'
        )
    layers = find_layers(module)
    taken: dict[tuple[int, str], tuple[str, Target]] = {}
    chosen: list[dict[str, list[Layer]]] = []
    for target in targets:
        chosen.append({})
        for pattern in target.patterns:
            matched = {path: layer for path, layer in layers.items() if pattern.matches(path)}
            if not matched:
                raise ConfigError(_describe_no_match(module, pattern, layers))
            for path, layer in matched.items():
                placed = target.place(layer)
                if _take(taken, target, path, placed):
                    chosen[-1][path] = placed
        if target.slices and not any(layer.name in target.slices for (layer, *_) in chosen[-1].values()):
            raise ConfigError(
                f'targets: {target.path!r} matches no in_proj_weight, so slices={list(target.slices)} would have no '
                'effect. Leave slices out.'
            )
    _check_free(module, {path: layer for matched in chosen for path, (layer, *_) in matched.items()})
    return chosen


def _take(taken: dict[tuple[int, str], tuple[str, Target]], target: Target, path: str, layers: Sequence[Layer]) -> bool:
    """Note that a target has layers, by holder and name, and return whether it has them under this path."""
    for layer in layers:
        for name in 'qkv' if layer.name == 'in_proj_weight' else (layer.name,):
            first, other = taken.setdefault((id(layer.holder), name), (path, target))
            if other is not target:
                raise ConfigError(
                    f'targets: {path} is matched by {other.path!r} and by {target.path!r}, and a layer, or a slice of '
                    'it, gets one method. Make one of the patterns narrower, or give them different slices.'
                )
            if first != path:
                return False
    return True


def _describe_no_match(module: nn.Module, pattern: PathPattern, layers: Mapping[str, Layer]) -> str:
    others = {type(m).__name__ for path, m in module.named_modules() if path and pattern.matches(path)}
    if others:
        reason = f'only {", ".join(sorted(others))}, and no layer'
        hint = f"To match the layers within, append '.**': {pattern.text + '.**'!r}."
        if not pattern.text.startswith('re:') and any(map(PathPattern(f'{pattern.text}.**').matches, layers)):
            return f'targets: {pattern.text!r} matches {reason}. {hint}'
    else:
        reason = 'nothing'
    near = ', '.join(map(repr, pattern.near(layers))) if layers else 'there are none'
    return f'targets: {pattern.text!r} matches {reason} in this {type(module).__name__}. Near paths of layers: {near}.'


def _check_free(module: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Check that no layer has a method, or a weight that is read by others than its own forward."""
    occupied, past = weights_with_method(module), read_past(module)
    for path, layer in layers.items():
        if id(layer.weight) in occupied or isinstance(layer.holder._modules.get('peft'), PeftModules):
            raise ConfigError(
                f'targets: {path} already has a method beside it, that of a PeftBackbone or PeftModel within this '
                f'{type(module).__name__}. Make the pattern narrower.'
            )
        if id(layer.weight) in past and not isinstance(layer.holder, nn.MultiheadAttention):
            raise ConfigError(
                f'targets: the block around {path} reads its weight without calling it, so a method beside it has no '
                'effect. Give this method to the backbone, by a PeftBackbone, or make the pattern narrower.'
            )
    cached = [path for path, m in module.named_modules() if record_of(m).feature_cache is not None]
    for prefix in cached:
        if any(path.startswith(f'{prefix}.') for path in layers):
            raise ConfigError(f'targets: {prefix} keeps its features (cache_features), so no method can be in it.')


def _attach(module: nn.Module, target: Target, chosen: Mapping[str, list[Layer]]) -> TargetRecord:
    """Put the method of a target beside its layers, in place."""
    sites = {path: {layer.name: layer.site for layer in layers} for path, layers in chosen.items()}
    name = target.cls.__name__
    check_widths(name, target.cls, [target.options], sites)
    every_site = [site for sites_of_layers in sites.values() for site in sites_of_layers.values()]
    check_size(name, sites, [(site, partial(target.cls, *site.widths, **target.options)) for site in every_site])
    added = []
    for path, layers in chosen.items():
        for layer in layers:
            added.append(target.build(path, layer))
            attach_to_layer(layer, added[-1])
    start_from_base(module, added)
    ids = {id(p) for m in added for p in m.parameters()}
    names = frozenset(n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in ids)
    return TargetRecord(target.path, name, tuple(chosen), names)


def _plain(target: Mapping[str, Any]) -> dict[str, Any]:
    """A target in a form that JSON can hold, with the registered name of its method."""
    return {**with_names(dict(target)), 'type': look_up(METHODS, target['type']).__name__}


def _tell_inner_records(module: nn.Module, names: frozenset[str]) -> None:
    """Add parameters of a method to the records of the parts that were frozen before it was attached, in place."""
    for path, part, record in freeze_records(module):
        own = {name.removeprefix(f'{path}.') for name in names if name.startswith(f'{path}.')}
        make_record(part).freeze = replace(record, trainable=record.trainable | own)


def init_weights(self: nn.Module, inner: partial | None = None) -> None:
    """``init_weights`` of a :func:`PeftModel`: that of the base, then the initial values of the methods.

    If the whole base is loaded from a ``Pretrained`` file, the methods have their values from the file, or keep those
    that they were built with.
    """
    is_loaded = inner is None and hasattr(type(self), 'init_weights') and _is_loaded_whole(self)
    layers = [layer for layer in self.modules() if isinstance(layer, PeftLayer)]
    with taken_out(layer.peft for layer in layers):  # a Pretrained file is loaded into them all the same
        if inner is not None:
            inner()
        elif hasattr(type(self), 'init_weights'):
            type(self).init_weights(self)
    if is_loaded:
        return
    modules = [module for layer in layers for module in layer.peft.values()]
    for module in modules:
        module.reset_parameters()
    start_from_base(self, modules)


def _is_loaded_whole(module: nn.Module) -> bool:
    init_cfg = getattr(module, 'init_cfg', None)
    entries = init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]
    return any(entry and is_type(entry, 'Pretrained') for entry in entries)
