"""Which parameters train: rules and freezing.

Rules select by module structure, never by a substring of a parameter's name:

==================================  =================================================================================
``'all'`` or ``'full'``             every parameter
``'none'`` or ``'fixed'``           no parameter
``'bias'`` or ``'bitfit'``          every bias, relative-position bias tables included
``'norm'`` or ``'norm_tuning'``     every parameter of a normalisation layer
``'last_block'`` or                 the last block of a supported host
``'partial_1'``
a module path                       every parameter under it, ``'stages.3'``; a parameter's own path selects that one
a module type                       every parameter directly in modules of that class, ``'Conv2d'``
==================================  =================================================================================

The second names are the methods' in the tables of the Mona paper, and in reports.
"""

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
from mona_mm.hosts import find_host, method_modules, method_names
from mona_mm.nn.private import BATCH_NORMS, NORMS_WITH_STATISTICS
from mona_mm.options import Rule
from mona_mm.record import FreezeRecord, freeze_records, make_record

Rules = Annotated[str | Sequence[str], Rule("a rule or a list of rules, such as 'none' or ['norm', 'bias']", bool)]

METHOD_RULES = dict(full='all', fixed='none', bitfit='bias', norm_tuning='norm', partial_1='last_block')
"""The methods that are only a choice of the base's own parameters: published name to rule."""


def published_name(rule: str) -> str:
    """The name in the tables of what a rule is, by whichever name it is given; any other rule itself."""
    return next((name for name, meant in METHOD_RULES.items() if rule == meant), rule)


_NORMS = (*NORMS_WITH_STATISTICS, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def as_rules(rules: Rules) -> tuple[str, ...]:
    """One rule or several, as a tuple.

    Raises:
        ConfigError: if they are neither.
    """
    several = (rules,) if isinstance(rules, str) else rules
    if not isinstance(several, Sequence) or not several or not all(isinstance(rule, str) for rule in several):
        raise ConfigError(f"trainable={rules!r} must be a rule or a list of rules, such as 'none' or ['norm', 'bias'].")
    return tuple(several)


def select(module: nn.Module, rules: Rules) -> set[str]:
    """The names of the parameters of ``module`` that ``rules`` select; of several names that one has, the first.

    Raises:
        ConfigError: if a rule selects nothing (other than ``'none'``); it lists what could have been meant.
    """
    selected: set[str] = set()
    first = _first_names(module)
    for rule in as_rules(rules):
        names = {first[name] for name in _select(module, rule)}
        if not names and METHOD_RULES.get(rule, rule) != 'none':
            raise ConfigError(
                f'trainable={rule!r} matches nothing in {type(module).__name__}. A rule is '
                f'{", ".join(map(repr, METHOD_RULES.values()))} ({", ".join(map(repr, METHOD_RULES))}), a module path '
                'or a module type. ' + _suggest(module, rule)
            )
        selected |= names
    return selected


def _select(module: nn.Module, rule: str) -> set[str]:
    rule = METHOD_RULES.get(rule, rule)
    if rule == 'none':
        return set()
    if rule == 'last_block':
        *_, last = find_host(module).blocks(module)
        return _names(module, [last])
    own = {  # parameter -> (the module it is directly in, its name there)
        f'{path}.{name}' if path else name: (m, name)
        for path, m in module.named_modules(remove_duplicate=False)
        for name, _ in m.named_parameters(recurse=False, remove_duplicate=False)
    }
    if rule == 'all':
        return set(own)
    if rule == 'bias':
        return {full for full, (_, name) in own.items() if name == 'bias' or name.endswith(('_bias', '_bias_table'))}
    if rule == 'norm':
        return {full for full, (m, _) in own.items() if isinstance(m, _NORMS)}
    if rule in own:
        return {rule}
    return _names(module, [rule]) or {full for full, (m, _) in own.items() if type(m).__name__ == rule}


def _names(module: nn.Module, paths: Iterable[str]) -> set[str]:
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return {name for name in names if any(name.startswith(f'{path}.') for path in paths)}


def _first_names(module: nn.Module) -> dict[str, str]:
    """By every name of every parameter, its first: modules that share parameters give them several."""
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
    """Let only the parameters that ``rules`` select train, and those of a method; freeze every other, in place.

    What is frozen already stays so: position embeddings that a host fixes, ``frozen_stages``, the base of a
    PeftBackbone inside a FrozenModel. A BatchNorm that is frozen altogether stays in eval mode through every later
    ``module.train()``: with statistics that move it would not be frozen. What none of a backbone's outputs depends on
    (behind the last of its ``out_indices``), a method's modules included, stays frozen with a warning: it would get no
    gradient, for which DistributedDataParallel waits.

    Raises:
        ConfigError: if a rule, or the method, selects nothing, or nothing that can train, or under a method if the
            host has ``frozen_stages`` of its own.
    """
    rules = as_rules(rules)
    selected = {rule: select(module, rule) for rule in rules}
    kept = method_names(module).union(*selected.values())
    frozen = {name for name, p in module.named_parameters() if name not in kept and p.requires_grad}
    for name in frozen:
        module.get_parameter(name).requires_grad = False
    module.train = partial(train, module)
    training = module.training
    module.train()
    _refuse_frozen_methods(module)
    behind = _freeze_unreached(module, {**selected, 'the method': method_names(module)})
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    for rule, names in selected.items():
        if METHOD_RULES.get(rule, rule) != 'none' and trainable.isdisjoint(names):
            raise ConfigError(
                f'trainable={rule!r} selects only parameters that {type(module).__name__} itself keeps frozen '
                f'(frozen_stages={getattr(module, "frozen_stages", None)}, or a PeftBackbone within it with a '
                '`trainable` of its own), so it would train nothing.'
            )
    module.train(training)
    make_record(module).freeze = FreezeRecord(rules, trainable, frozenset(behind), frozenset(frozen | behind))


def _freeze_unreached(module: nn.Module, selected: Mapping[str, set[str]]) -> set[str]:
    behind = unreached(module)
    if not behind:
        return behind
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    outputs = {tuple(m.out_indices) for m in module.modules() if hasattr(m, 'out_indices')}
    where = f'behind the last output of {type(module).__name__} (out_indices={" or ".join(map(str, outputs))})'
    for rule, names in selected.items():
        if names & behind and not names & (trains - behind):
            raise ConfigError(
                f'What {f"trainable={rule!r}" if rule != "the method" else rule} lets train lies {where}, which '
                f'nothing computed there reaches: {", ".join(sorted(names & behind)[:3])}. It would train nothing. '
                'Choose what lies before that, or let out_indices end later.'
            )
    for name, parameter in module.named_parameters():
        if name in behind:
            parameter.requires_grad = False
    print_log(
        f'{len(behind)} parameters that were to train lie {where} and would never get a gradient: they stay frozen '
        f'({", ".join(sorted(behind)[:3])}{", ..." if len(behind) > 3 else ""}).',
        logger='current',
        level=WARNING,
    )
    return behind


def behind_outputs(model: nn.Module) -> set[str]:
    """The parameters that were selected to train and stay frozen, since no output of their backbone depends on them."""
    return {f'{path}.{name}' if path else name for path, _, record in freeze_records(model) for name in record.behind}


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """``nn.Module.train`` of a module given to :func:`freeze`."""
    type(self).train(self, mode)
    for m in self.modules():
        if isinstance(m, BATCH_NORMS) and m.affine and not any(p.requires_grad for p in m.parameters()):
            m.eval()
    return self


def _refuse_frozen_methods(module: nn.Module) -> None:
    followers = {id(m) for path in moving_copies(module) for m in module.get_submodule(path).modules()}
    modules = [m for m in method_modules(module) if id(m) not in followers]
    behind = {id(module.get_parameter(name)) for name in behind_outputs(module)}
    reached = [
        m for m in modules if not m.training or not all(p.requires_grad or id(p) in behind for p in m.parameters())
    ]
    stages = getattr(module, 'frozen_stages', -1)
    if reached or (modules and stages >= 1):
        raise ConfigError(
            f'frozen_stages={stages} in the base config: {type(module).__name__} freezes those stages by itself, '
            f'the {type(modules[0]).__name__} modules in them included, and does so again at every .train(), after '
            'the model has been wrapped for DDP. A method freezes its base anyway: set frozen_stages=-1, and say in '
            '`trainable` what else is to train.'
        )


def check_trainable(model: nn.Module) -> None:
    """Check that what trains in ``model`` is still what its :class:`FreezeRecord` s say; a teacher follows.

    Raises:
        FreezeError: if not; it names the first parameters that differ.
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
