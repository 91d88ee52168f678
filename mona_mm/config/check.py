"""Find misspelt keys, unknown types and wrong values in a config, all of them, before anything is built."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    Registry,
)
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mona_mm.errors import ConfigError, UserError
from mona_mm.methods.base import build_method
from mona_mm.options import Count, Ratio, check_options, show
from mona_mm.spt.method import check_spt
from mona_mm.type_names import enter_scope, is_type, look_up

_NEAR = 0.75
"""How alike two names are, from 0 to 1, of which one is taken for a misspelling of the other."""

_TOP = {
    *inspect.signature(Runner.__init__).parameters,
    *('custom_imports', 'sync_bn', 'find_unused_parameters', 'model_wrapper_cfg', 'compile', 'runner_type', 'strategy'),
    *('activation_checkpointing', 'efficient_conv_bn_eval', 'base_checkpoint', 'dataset_type', 'data_root', 'classes'),
    *('train_pipeline', 'val_pipeline', 'test_pipeline', 'tta_model', 'tta_pipeline', 'vis_backends', 'backend_args'),
    *('sensitivity_dataloader', 'task', 'tasks', 'file_client_args', 'metainfo', 'num_classes', 'max_epochs'),
    'max_iters',
} - {'self', 'cfg'}
"""The names at the top of a config that mean something, or that the stock configs use for themselves."""

_LOADER = {*inspect.signature(DataLoader.__init__).parameters, 'num_batch_per_epoch', 'dataset_type'} - {'self'}
_WRAPPER = {'type', 'constructor', 'optimizer', 'paramwise_cfg', 'optimizer_cfg', '_scope_'}
_PARAMWISE = {
    *('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult'),
    *('dcn_offset_lr_mult', 'bypass_duplicate', 'layer_decay_rate'),
}
_OF_MMENGINE = ('DefaultOptimWrapperConstructor', 'PeftOptimWrapperConstructor')
_MULTIPLIERS = {'lr_mult', 'decay_mult'}
_CLIP = {'type', 'max_norm', 'norm_type', 'error_if_nonfinite', 'foreach', 'clip_value'}


def check_config(cfg: Config, options: Iterable[str] = ()) -> None:
    """Check the user-facing settings of a config.

    Keys are compared with the arguments of what their ``type`` names, and with what mmengine reads, in hooks, loops,
    loaders, data sets and their pipelines, samplers, metrics, the optimizer and its wrapper, schedulers, and methods. A
    key that is swallowed by ``**kwargs`` is an error only if it nearly is an argument. At the top, where a config may
    have names of its own, only near misses of mmengine's names are, and only if they were given on the command line or
    stand in place of the right one.

    Args:
        cfg: the config, as it will be built.
        options: the keys of ``--cfg-options``.

    Raises:
        ConfigError: if anything is wrong. It names everything, with the nearest accepted name.
    """
    enter_scope(cfg)
    found = [*_top(cfg, options), *_values(cfg), *_optimizer(cfg), *_schedulers(cfg), *_hooks(cfg)]
    for split in ('train', 'val', 'test'):
        found += _loader(cfg, split)
    for name in ('train_cfg', 'val_cfg', 'test_cfg'):
        found += _loop(cfg.get(name), name)
    for name in ('val_evaluator', 'test_evaluator'):
        found += _typed_list(cfg.get(name), name, METRICS)
    found += _methods(cfg.get('model'), 'model')
    found = list(dict.fromkeys(found))
    if found:
        many = f'{len(found)} mistakes in this config: ' if len(found) > 1 else ''
        numbers = [f'({i}) ' if many else '' for i in range(1, len(found) + 1)]
        raise ConfigError(many + ' '.join(number + text for number, text in zip(numbers, found, strict=True)))


def _top(cfg: Config, options: Iterable[str]) -> Iterator[str]:
    given = {option.partition('.')[0] for option in options}
    for name in cfg:
        close = get_close_matches(name, _TOP, n=1, cutoff=_NEAR if name in given else 0.88)
        if name not in _TOP and close and (name in given or close[0] not in cfg):
            yield f'Nothing reads {name!r}. Did you mean {close[0]!r}?'


def _optimizer(cfg: Config) -> Iterator[str]:
    wrapper = cfg.get('optim_wrapper')
    if not isinstance(wrapper, Mapping) or _constructs_itself(wrapper):
        return
    path = 'optim_wrapper'
    yield from _keys(wrapper, path, OPTIM_WRAPPERS, 'OptimWrapper', more=_WRAPPER)
    if isinstance(wrapper.get('optimizer'), Mapping):
        yield from _keys(wrapper['optimizer'], f'{path}.optimizer', OPTIMIZERS, None, ignored={'params'})
    if isinstance(wrapper.get('clip_grad'), Mapping):
        yield from _unknown(wrapper['clip_grad'], f'{path}.clip_grad', _CLIP)
    paramwise = wrapper.get('paramwise_cfg')
    if isinstance(paramwise, Mapping) and is_type(wrapper.get('constructor', _OF_MMENGINE[0]), *_OF_MMENGINE):
        yield from _unknown(paramwise, f'{path}.paramwise_cfg', _PARAMWISE)
        for name, factors in (paramwise.get('custom_keys') or {}).items():
            if isinstance(factors, Mapping):
                # Any other key is a setting of the optimizer's group, such as lars_exclude.
                yield from _unknown(factors, f'{path}.paramwise_cfg.custom_keys.{name}', _MULTIPLIERS, is_open=True)


def _constructs_itself(wrapper: Mapping) -> bool:
    """Whether a constructor of other code reads the wrapper's config in its own way, as for several optimizers."""
    constructor = dict.get(wrapper, 'constructor')
    if constructor is None:
        return 'optimizer' not in wrapper
    with OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None) as registry:
        cls = look_up(registry, constructor)
    return not any(base.__name__ in _OF_MMENGINE for base in getattr(cls, '__mro__', ()))


def _schedulers(cfg: Config) -> Iterator[str]:
    schedulers = cfg.get('param_scheduler')
    if isinstance(schedulers, Mapping) and 'type' not in schedulers:
        return  # of several optimizers
    more = {'convert_to_iter_based', '_scope_'}
    yield from _typed_list(schedulers, 'param_scheduler', PARAM_SCHEDULERS, more=more, ignored={'optimizer'})


def _hooks(cfg: Config) -> Iterator[str]:
    more = {'priority', '_scope_'}
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, Mapping):
            yield from _keys(hook, f'default_hooks.{name}', HOOKS, None, more=more)
    yield from _typed_list(cfg.get('custom_hooks'), 'custom_hooks', HOOKS, more=more)


def _loop(loop: Any, path: str) -> Iterator[str]:
    if isinstance(loop, Mapping):
        by_epoch = loop.get('by_epoch', 'max_iters' not in loop)
        default = dict(
            train_cfg='EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop',
            val_cfg='ValLoop',
            test_cfg='TestLoop',
        )
        ignored = {'runner', 'dataloader', 'evaluator'}
        yield from _keys(loop, path, LOOPS, default[path], more={'by_epoch'}, ignored=ignored)


def _loader(cfg: Config, split: str) -> Iterator[str]:
    path = f'{split}_dataloader'
    loaders = cfg.get(path)
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if not isinstance(loader, Mapping):
            continue
        yield from _unknown(loader, path, _LOADER | {'_scope_'})
        for name in ('sampler', 'batch_sampler'):
            if isinstance(loader.get(name), Mapping):
                ignored = {'dataset', 'sampler', 'batch_size'}
                yield from _keys(loader[name], f'{path}.{name}', DATA_SAMPLERS, None, ignored=ignored)
        yield from _dataset(loader.get('dataset'), f'{path}.dataset')


def _dataset(dataset: Any, path: str) -> Iterator[str]:
    if isinstance(dataset, Mapping):
        yield from _keys(dataset, path, DATASETS, None)
        yield from _typed_list(dataset.get('pipeline'), f'{path}.pipeline', TRANSFORMS)
        yield from _dataset(dataset.get('dataset'), f'{path}.dataset')
        yield from _dataset(dataset.get('datasets'), f'{path}.datasets')
    elif isinstance(dataset, list | tuple):
        for i, each in enumerate(dataset):
            yield from _dataset(each, f'{path}.{i}')


def _methods(node: Any, path: str) -> Iterator[str]:
    """The mistakes in the arguments of mona_mm's own parts of a model, and in the methods of its backbones."""
    if isinstance(node, Mapping):
        if is_type(node, 'mona_mm.PeftBackbone', 'mona_mm.FrozenModel', 'mona_mm.PeftModel'):
            yield from _keys(node, path, MODELS, None)
        if is_type(node, 'mona_mm.PeftBackbone') and node.get('peft') is not None:
            try:
                if is_type(node['peft'], 'SPT'):
                    check_spt(node['peft'])
                else:
                    build_method(node['peft'])
            except UserError as error:
                yield f'{path}.{error}' if str(error).startswith('peft') else f'{path}.peft: {error}'
        for key, child in dict.items(node):
            yield from _methods(child, f'{path}.{key}')
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _methods(child, f'{path}.{i}')


# Values --------------------------------------------------------------------------------------------------------------


def _loop_values(
    max_epochs: Count | None = None,
    max_iters: Count | None = None,
    val_interval: Count | None = None,
    val_begin: int | None = None,
) -> None: ...


def _loader_values(
    batch_size: Count | None = None, num_workers: int | None = None, drop_last: bool = False
) -> None: ...


def _wrapper_values(accumulative_counts: Count = 1) -> None: ...


def _optimizer_values(lr: Ratio | None = None, weight_decay: Ratio | None = None) -> None: ...


def _checkpoint_values(interval: int = -1, max_keep_ckpts: int = -1, save_last: bool = True) -> None: ...


def _hook_values(interval: Count | None = None) -> None: ...


def _scheduler_values(by_epoch: bool = True, begin: int = 0, gamma: float = 0.1, T_max: Any = None) -> None: ...


def _run_values(resume: bool = False, launcher: str = 'none', log_level: str | int = 'INFO') -> None: ...


def _seed_values(seed: int | None = None, deterministic: bool = False, diff_rank_seed: bool = False) -> None: ...


def _values(cfg: Config) -> Iterator[str]:
    """Values that no use of them accepts."""
    wrapper = cfg.get('optim_wrapper') or {}
    hooks = cfg.get('default_hooks') or {}
    checks: list[tuple[str, Callable, Any]] = [
        ('train_cfg', _loop_values, cfg.get('train_cfg')),
        ('optim_wrapper', _wrapper_values, wrapper),
        ('optim_wrapper.optimizer', _optimizer_values, wrapper.get('optimizer')),
        ('default_hooks.checkpoint', _checkpoint_values, hooks.get('checkpoint')),
        ('default_hooks.logger', _hook_values, hooks.get('logger')),
        ('randomness', _seed_values, cfg.get('randomness')),
        ('the config', _run_values, cfg._cfg_dict),
    ]
    for split in ('train', 'val', 'test'):
        checks.append((f'{split}_dataloader', _loader_values, cfg.get(f'{split}_dataloader')))
    schedulers = cfg.get('param_scheduler')
    for i, scheduler in enumerate(schedulers if isinstance(schedulers, list | tuple) else [schedulers]):
        checks.append((f'param_scheduler.{i}', _scheduler_values, scheduler))
    for path, function, values in checks:
        for name in inspect.signature(function).parameters if isinstance(values, Mapping) else ():
            if name in values:
                try:
                    check_options(path, function, {name: values[name]})
                except UserError as error:
                    yield str(error)


# Keys ----------------------------------------------------------------------------------------------------------------


def _typed_list(
    configs: Any, path: str, registry: Registry, more: Iterable[str] = (), ignored: Iterable[str] = ()
) -> Iterator[str]:
    if isinstance(configs, Mapping):
        configs = [configs]
    for i, each in enumerate(configs if isinstance(configs, list | tuple) else ()):
        if isinstance(each, Mapping):
            yield from _keys(each, f'{path}.{i}', registry, None, more, ignored)
            yield from _inner_transforms(each, f'{path}.{i}', registry)


def _inner_transforms(transform: Mapping, path: str, registry: Registry) -> Iterator[str]:
    """The transforms within one, such as in a random choice."""
    inner = transform.get('transforms') if registry is TRANSFORMS else None
    if isinstance(inner, list | tuple):
        for i, each in enumerate(inner):
            branch = each if isinstance(each, list | tuple) else [each]
            if all(isinstance(one, Mapping) and _class_of(one.get('type'), registry) for one in branch):
                yield from _typed_list(branch, f'{path}.transforms.{i}', registry)


def _keys(
    config: Mapping,
    path: str,
    registry: Registry,
    default: str | None,
    more: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> Iterator[str]:
    """The mistakes in the keys of a config that something is built from."""
    type_ = dict.get(config, 'type', default)
    if type_ is None:
        return
    cls = _class_of(type_, registry)
    if cls is None:
        close = get_close_matches(str(type_), _registered(registry), n=1, cutoff=_NEAR)
        if close:
            yield f'{path}: there is no {registry.name} {show(type_)}. Did you mean {close[0]!r}?'
        return
    if not callable(cls):
        return
    accepted, is_open = _arguments(cls)
    accepted = (accepted | {'type', '_scope_', *more}) - set(ignored)
    yield from _unknown(config, path, accepted, is_open, getattr(cls, '__name__', str(type_)))


def _unknown(
    config: Mapping, path: str, accepted: Iterable[str], is_open: bool = False, owner: str = ''
) -> Iterator[str]:
    accepted = sorted(accepted)
    for key in config:
        if key in accepted or not isinstance(key, str):
            continue
        close = get_close_matches(key, accepted, n=1, cutoff=_NEAR if is_open else 0.6)
        if close:
            yield f'{path} has no {key!r}. Did you mean {close[0]!r}?'
        elif not is_open:
            names = ', '.join(name for name in accepted if name not in ('type', '_scope_'))
            yield f'{path} has no {key!r}; {owner or "it"} accepts {names}.'


def _class_of(type_: Any, registry: Registry) -> Any:
    with registry.switch_scope_and_registry(None) as found:
        return look_up(found, type_)


def _registered(registry: Registry) -> Sequence[str]:
    with registry.switch_scope_and_registry(None) as found:
        names = {*found.module_dict, *registry.root.module_dict}
    return sorted(names)


@cache
def _arguments(cls: Any) -> tuple[frozenset[str], bool]:
    """The names of the arguments that a class or function takes, and whether it takes any others.

    A class that hands ``**kwargs`` on takes those of the classes that it derives from.
    """
    names: set[str] = set()
    functions = [cls]
    if inspect.isclass(cls):
        functions = [vars(base)['__init__'] for base in cls.__mro__ if '__init__' in vars(base)]
    for function in functions:
        if function is object.__init__:  # without any of its own a class takes nothing; else it uses the rest itself
            return frozenset(names), function is not functions[0]
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # of compiled code
            return frozenset(names), True
        kinds = {parameter.kind for parameter in parameters}
        names.update(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != 'self')
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return frozenset(names), False
    return frozenset(names), True
