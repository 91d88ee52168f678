"""Choose which parameters train, by rules, and freeze the others.

Rules select by module structure, never by a substring of a parameter's name:

==================================  =================================================================================
``'all'`` or ``'full'``             every parameter
``'none'`` or ``'fixed'``           no parameter
``'bias'`` or ``'bitfit'``          every bias, relative-position bias tables included
``'norm'`` or ``'norm_tuning'``     every parameter of a normalisation layer
``'output_norms'``                  the norms of the outputs of a supported host, which pretrained checkpoints lack
``'last_block'`` or                 the last block of a supported host
``'partial_1'``
a module path, ``'stages.3'``       every parameter under it; the path of a parameter selects only that parameter
a module type, ``'Conv2d'``         every parameter directly in modules of that class
==================================  =================================================================================

The second names are those of the methods in the tables of the Mona paper and in reports.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from logging import WARNING
from typing import Annotated

from mmengine.logging import print_log
from torch import nn

from mona_mm.errors import ConfigError, FreezeError
from mona_mm.frozen.copies import is_under, moving_copies
from mona_mm.frozen.reach import unreached
from mona_mm.hosts import PeftBlock, find_host, is_host, method_modules, method_names
from mona_mm.nn.private import BATCH_NORMS, NORMS_WITH_STATISTICS
from mona_mm.options import Rule
from mona_mm.record import FreezeRecord, freeze_records, make_record, record_of

Rules = Annotated[str | Sequence[str], Rule("a rule or a list of rules, such as 'none' or ['norm', 'bias']", bool)]

METHOD_RULES = dict(full='all', fixed='none', bitfit='bias', norm_tuning='norm', partial_1='last_block')
"""The rule of each published method that only chooses parameters of the base, by the method's published name."""


def published_name(rule: str) -> str:
    """The published name of a rule, which may be given by either name; a rule without one is returned as it is."""
    return next((name for name, method_rule in METHOD_RULES.items() if rule == method_rule), rule)


_NORMS = (*NORMS_WITH_STATISTICS, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def as_rules(rules: Rules) -> tuple[str, ...]:
    """Turn one rule or several into a tuple.

    Raises:
        ConfigError: if they are not a string or a list of strings.
    """
    several = (rules,) if isinstance(rules, str) else rules
    if not isinstance(several, Sequence) or not several or not all(isinstance(rule, str) for rule in several):
        raise ConfigError(f"trainable={rules!r} must be a rule or a list of rules, such as 'none' or ['norm', 'bias'].")
    return tuple(several)


def select(module: nn.Module, rules: Rules) -> set[str]:
    """The names of the parameters of ``module`` that ``rules`` select. A shared parameter has its first name.

    Raises:
        ConfigError: if a rule other than ``'none'`` selects nothing; it lists similar paths and types.
    """
    selected: set[str] = set()
    first = _first_names(module)
    for rule in as_rules(rules):
        names = {first[name] for name in _select(module, rule)}
        if not names and METHOD_RULES.get(rule, rule) != 'none':
            raise ConfigError(
                f'trainable={rule!r} matches no parameter of {type(module).__name__}. A rule is one of '
                f'{", ".join(map(repr, METHOD_RULES.values()))} ({", ".join(map(repr, METHOD_RULES))}), '
                "'output_norms', a module path or a module type. " + _suggest(module, rule)
            )
        selected |= names
    return selected


def _select(module: nn.Module, rule: str) -> set[str]:
    rule = METHOD_RULES.get(rule, rule)
    if rule == 'none':
        return set()
    if rule == 'last_block':
        if not is_host(module):
            raise ConfigError(
                f"trainable='last_block' ('partial_1') is for backbones with blocks, and {type(module).__name__} is "
                'none that is known. Name the modules that train by their paths, or give the rule to the backbone '
                'within, by a PeftBackbone. ' + _suggest(module, rule)
            )
        *_, last = find_host(module).blocks(module)
        return _names_under(module, [last])
    if rule == 'output_norms':
        if not is_host(module):
            raise ConfigError(
                f"trainable='output_norms' is for backbones that are hosts of methods, and {type(module).__name__} is "
                'none. Name the norms by their paths, or give the rule to the backbone within, by a PeftBackbone. '
                + _suggest(module, rule)
            )
        return _names_under(module, [prefix.rstrip('.') for prefix in find_host(module).output_norms])
    owners = {  # the module that directly has the parameter, and its name there, by path of the parameter
        f'{path}.{name}' if path else name: (m, name)
        for path, m in module.named_modules(remove_duplicate=False)
        for name, _ in m.named_parameters(recurse=False, remove_duplicate=False)
    }
    if rule == 'all':
        return set(owners)
    if rule == 'bias':
        return {path for path, (_, name) in owners.items() if name == 'bias' or name.endswith(('_bias', '_bias_table'))}
    if rule == 'norm':
        return {path for path, (m, _) in owners.items() if isinstance(m, _NORMS)}
    if rule in owners:
        return {rule}
    return _names_under(module, [rule]) or {path for path, (m, _) in owners.items() if type(m).__name__ == rule}


def _names_under(module: nn.Module, paths: Iterable[str]) -> set[str]:
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return {name for name in names if any(name.startswith(f'{path}.') for path in paths)}


def _first_names(module: nn.Module) -> dict[str, str]:
    """The first name of every parameter, by each of its names. Parameters that modules share have several names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}


def _suggest(module: nn.Module, rule: str) -> str:
    paths = [path for path, _ in module.named_modules() if path]
    types = sorted({type(m).__name__ for m in module.modules() if next(m.parameters(recurse=False), None) is not None})
    close = get_close_matches(rule, paths + types, n=3)
    if close:
        return f'Did you mean {" or ".join(map(repr, close))}?'
    children = [name for name, _ in module.named_children()]
    return f'Module paths begin with {", ".join(children)}; module types here are {", ".join(types)}.'


def freeze(module: nn.Module, rules: Rules) -> None:
    """Freeze all parameters of ``module`` but those that ``rules`` select and those of a method, in place.

    Of a part that was frozen by rules of its own (a PeftBackbone inside a PeftModel), what those select trains as well.
    Parameters that are already frozen stay frozen: position embeddings that a host fixes, those of ``frozen_stages``,
    the base of a PeftBackbone inside a FrozenModel. A BatchNorm without trainable parameters stays in eval mode through
    every later ``module.train()``, since its statistics would change otherwise. Parameters that no output of a backbone
    depends on (after the last stage in ``out_indices``), those of a method included, stay frozen with a warning: they
    would get no gradient, and DistributedDataParallel would wait for it.

    Raises:
        ConfigError: if a rule or the method selects no parameter that can train, or if the host of a method has
            ``frozen_stages``.
    """
    rules = as_rules(rules)
    selected = {rule: select(module, rule) for rule in rules}
    kept = method_names(module).union(_trainable_in_parts(module), *selected.values())
    frozen = {name for name, p in module.named_parameters() if name not in kept and p.requires_grad}
    for name in frozen:
        module.get_parameter(name).requires_grad = False
    module.train = partial(train, module)
    training = module.training
    module.train()
    _refuse_frozen_methods(module)
    unreached_names = _freeze_unreached(module, {**selected, 'the method': method_names(module)})
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    for rule, names in selected.items():
        if METHOD_RULES.get(rule, rule) != 'none' and trainable.isdisjoint(names):
            raise ConfigError(
                f'trainable={rule!r} selects only parameters that {type(module).__name__} itself keeps frozen, by '
                f'{_frozen_stages_over(module, names)}the `trainable` of a PeftBackbone, '
                'PeftModel or FrozenModel that it is or holds. Select other parameters, or change those settings.'
            )
    module.train(training)
    frozen |= unreached_names
    previous = record_of(module).freeze
    if previous is not None:  # a FrozenModel around a PeftModel is the same module
        frozen |= previous.frozen
    make_record(module).freeze = FreezeRecord(rules, trainable, frozenset(unreached_names), frozenset(frozen))


def _frozen_stages_over(module: nn.Module, names: Iterable[str]) -> str:
    """The options ``frozen_stages`` of the parts of a module that have one of the parameters ``names``, as text."""
    found = [
        f'frozen_stages={part.frozen_stages} of {path or type(part).__name__} or by '
        for path, part in module.named_modules()
        if hasattr(part, 'frozen_stages') and any(not path or is_under(name, [path]) for name in names)
    ]
    return ''.join(found)


def _trainable_in_parts(module: nn.Module) -> set[str]:
    """The parameters that train in parts of ``module`` that were frozen before it."""
    return {f'{path}.{name}' for path, _, record in freeze_records(module) if path for name in record.trainable}


def _freeze_unreached(module: nn.Module, selected: Mapping[str, set[str]]) -> set[str]:
    """Freeze the parameters that no output depends on, with a warning, and return their names."""
    found = unreached(module)
    if not found:
        return found
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    backbones = {
        f'{type(m).__name__} (out_indices={tuple(m.out_indices)})'
        for path, m in module.named_modules()
        if hasattr(m, 'out_indices') and (not path or any(is_under(name, [path]) for name in found))
    }
    place = f'after the last output of {" or ".join(sorted(backbones))}'
    for rule, names in selected.items():
        if names & found and not names & (trains - found):
            raise ConfigError(
                f'{f"trainable={rule!r}" if rule != "the method" else "The method"} selects only parameters {place}, '
                f'which have no effect on the outputs: {", ".join(sorted(names & found)[:3])}. Select parameters '
                'before that output, or add a later stage to out_indices.'
            )
    for name, parameter in module.named_parameters():
        if name in found:
            parameter.requires_grad = False
    print_log(
        f'{len(found)} selected parameters lie {place} and would never get a gradient, so they stay frozen: '
        f'{", ".join(sorted(found)[:3])}{", ..." if len(found) > 3 else ""}.',
        logger='current',
        level=WARNING,
    )
    return found


def behind_outputs(model: nn.Module) -> set[str]:
    """The parameters that were selected to train but stay frozen, since no output of their backbone depends on them."""
    return {f'{path}.{name}' if path else name for path, _, record in freeze_records(model) for name in record.behind}


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """``nn.Module.train`` of a module that :func:`freeze` has frozen: frozen BatchNorms stay in eval mode."""
    type(self).train(self, mode)
    for m in self.modules():
        if isinstance(m, BATCH_NORMS) and m.affine and not any(p.requires_grad for p in m.parameters()):
            m.eval()
    return self


def _refuse_frozen_methods(module: nn.Module) -> None:
    followers = {id(m) for path in moving_copies(module) for m in module.get_submodule(path).modules()}
    modules = [m for m in method_modules(module) if id(m) not in followers]
    without_effect = {id(module.get_parameter(name)) for name in behind_outputs(module)}
    # A host may keep the statistics of its BatchNorms (norm_eval); single weights in them train all the same.
    in_norms = {id(m) for norm in module.modules() if isinstance(norm, BATCH_NORMS) for m in norm.modules()}
    frozen_by_host = [
        m
        for m in modules
        if not (m.training or id(m) in in_norms)
        or not all(p.requires_grad or id(p) in without_effect for p in m.parameters())
    ]
    inside = set(frozen_by_host)
    host = next((m for m in module.modules() if hasattr(m, 'frozen_stages') and inside & set(m.modules())), module)
    stages = getattr(host, 'frozen_stages', -1)
    method = type([*frozen_by_host, *modules][0]).__name__ if modules else ''
    # Not where targets match single layers, or the method is in later blocks alone.
    first = next((m for m in module.modules() if isinstance(m, PeftBlock)), None)
    is_at_start = not record_of(module).targets and first is not None and len(first.peft) > 0
    if frozen_by_host or (is_at_start and stages >= 1):
        raise ConfigError(
            f'frozen_stages={stages} in the base config: {type(host).__name__} freezes those stages itself, with '
            f'the {method} modules in them, and repeats it at every .train(), even after the model '
            f'has been wrapped for DDP. A method freezes its base anyway: set frozen_stages={_no_stages(type(host))}, '
            'and select in `trainable` which parameters of the base train.'
        )


def _no_stages(cls: type) -> int:
    """The value of ``frozen_stages`` with which a backbone freezes none: its default where that does, as 0 in an
    EfficientNet, which takes no -1."""
    for each in cls.__mro__:
        parameter = inspect.signature(each.__init__).parameters.get('frozen_stages')
        if parameter is not None:
            return min(parameter.default, 0) if isinstance(parameter.default, int) else -1
    return -1


def check_trainable(model: nn.Module) -> None:
    """Check that the parameters that train in ``model`` are those of its :class:`FreezeRecord` s.

    Parts that follow another part (a teacher its student) are not checked.

    Raises:
        FreezeError: if they differ; it names the first such parameters.
    """
    copies = moving_copies(model)
    for path, module, record in freeze_records(model):
        if is_under(path, copies):
            continue
        actual = {name for name, p in module.named_parameters() if p.requires_grad}
        wrong = sorted(actual ^ record.trainable)
        if wrong:
            listed = ', '.join(f'{name} ({"trains" if name in actual else "is frozen"})' for name in wrong[:5])
            raise FreezeError(
                f'{len(wrong)} parameters of {path or "the model"} do not train as the config asked '
                f'(trainable={list(record.rules)}): {listed}{", ..." if len(wrong) > 5 else ""}. Something changed '
                'requires_grad after the model was built.'
            )
