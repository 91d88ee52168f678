"""Merge a method into the weights of its base, where it is an addition to them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from torch import Tensor, nn

from mona_mm.checkpoint.lock import writing
from mona_mm.errors import ConfigError
from mona_mm.frozen.half_precision import kept_weights
from mona_mm.hosts import Linear, PeftBlock, PeftModules, method_names, remove
from mona_mm.methods.base import PeftModule
from mona_mm.nn.mixin import Mixin, mix_out
from mona_mm.record import freeze_records, record_of
from mona_mm.registry import METHODS
from mona_mm.type_names import is_of_mona_mm, is_type, look_up, with_names


def unmergeable(model: nn.Module) -> list[str]:
    """The methods in ``model`` that are no addition to weights, so that no stock model can compute what they do."""
    return sorted(
        {
            type(module).__name__
            for _, block in _blocks(model)
            for site, module in block.peft.items()
            if site not in block.spec.linears or not hasattr(module, 'delta_weight')
        }
    )


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the parameters become to which a method adds: the sums, by name in the state dict, under every name.

    ``model`` itself is not changed. A low-rank product is added in float64. Weights in half precision come out in
    float32: there they would round small additions away.

    Raises:
        ConfigError: if something in the model is :func:`unmergeable`; a weight is parametrized; or it is shared with a
            module to which nothing is added, or something else.
    """
    left = unmergeable(model)
    if left:
        raise ConfigError(
            f'{", ".join(left)} cannot be merged into the weights of a base: it computes what no stock model does. '
            '`tools/delta.py merge` writes such a model with a config of its own.'
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    sums: dict[int, Tensor] = {}  # by parameter and not by name, of which it has several where a part has two paths

    def add(name: str, change: Callable[[Tensor], Tensor]) -> None:
        if name not in parameters:
            raise ConfigError(
                f'{name} is parametrized; torch.nn.utils.parametrize.remove_parametrizations comes first.'
            )
        if holders[id(parameters[name])] > 1:
            raise ConfigError(
                f'{", ".join(names[id(parameters[name])])} are one weight, so that what is added to it for one of the '
                'modules would be added for all.'
            )
        key = id(parameters[name])
        sums[key] = change(sums.get(key, parameters[name]))

    with torch.no_grad():
        for path, _, changes in _changed(model):
            for name, change in changes.items():
                add(f'{path}.{name}' if path else name, change)
        for path, block in _blocks(model):
            for site, module in block.peft.items():
                linear = block.spec.linears[site]
                add(f'{path}.{linear.weight}' if path else linear.weight, partial(_with_rows, linear, module))
    return {name: _single(total) for key, total in sums.items() for name in names[key]}


def _with_rows(linear: Linear, module: nn.Module, weight: Tensor) -> Tensor:
    weight = _single(weight).clone()
    rows = weight[linear.rows(weight)]
    delta = module.delta_weight(rows.flatten(1))
    rows.copy_(rows.double() + delta.double().view_as(rows))
    return weight


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` as of a stock one: what the method adds to weights is in them, and its own is gone.

    ``model`` itself is not changed. Weights in half precision (``frozen_dtype``) come out in float32.

    Raises:
        ConfigError: see :func:`merged_weights`.
    """
    sums, own = merged_weights(model), method_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    return {name: sums[name] if name in sums else _single(tensor.detach().clone()) for name, tensor in state.items()}


def merge(model: nn.Module) -> nn.Module:
    """Merge a method into the weights of its base and remove everything of mona_mm from ``model``, in place.

    What is left is the stock model: its classes, the names of its state dict, its ``init_weights`` and ``train``; what
    :mod:`mona_mm.frozen.rules` froze trains again (in a teacher or an average, where nothing trains, nothing does), and
    the fast forms (``fast=True``) are gone. The parameters stay the objects that they were, so that an optimizer which
    has them goes on. Weights that ``frozen_dtype`` kept in half precision are in float32, and the backbone computes in
    the precision of its input. An average of the model (``EMAHook``) is another model, and merged on its own.

    Args:
        model: a model, or a backbone alone, whose methods are additions to weights (LoRA, SPT with LoRA modules and
            single weights) or only a choice of what trains (BitFit, ...). For inference with a Mona see
            :func:`mona_mm.methods.deploy`.

    Returns:
        ``model``.

    Raises:
        ConfigError: if it holds another method; or a weight is parametrized, or shared with another module. The model
            is not changed then.
        UserError: within :func:`mona_mm.reading` of the model.
    """
    with writing(model), torch.no_grad():
        sums = merged_weights(model)
        still = [module for module in model.modules() if _is_kept_from_training(module)]
        for module in [m for m in model.modules() if record_of(m).frozen_dtype]:
            for weight in kept_weights(module):
                weight.data = weight.data.float()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, total in sums.items():
            parameters[name].copy_(total)
        for _, module, changes in list(_changed(model)):
            for name in changes:
                getattr(module, name).requires_grad = True
            del module.peft
        for module in [m for m in model.modules() if record_of(m).method]:
            remove(module)
        for module in model.modules():
            _make_stock(module)
        for module in still:
            module.requires_grad_(False)
    return model


def _is_kept_from_training(module: nn.Module) -> bool:
    """Whether nothing in a module trains, though something was built to: a teacher, an average."""
    built_to = any(record.trainable for _, _, record in freeze_records(module))
    return built_to and not any(p.requires_grad for p in module.parameters())


def _make_stock(module: nn.Module) -> None:
    """Take from a module, in place, what PeftBackbone and FrozenModel gave it."""
    record = record_of(module).freeze
    for name, parameter in module.named_parameters() if record is not None else ():
        if name in record.frozen:
            parameter.requires_grad = True
    while isinstance(module, Mixin):
        mix_out(module)
    for name in _METHODS:
        function = vars(module).get(name)
        if isinstance(function, partial) and function.func.__module__.startswith('mona_mm.'):
            del vars(module)[name]
    for name in _ATTRIBUTES:
        vars(module).pop(name, None)
    if isinstance(module, BaseModule):
        module.is_init = True  # else a Runner would load what init_cfg names over the merged weights


_METHODS = ('forward', 'train', 'init_weights')
_ATTRIBUTES = ('peft_record', '_masks')


def _changed(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module, PeftModules]]:
    """The modules, by path, that have a module of their own beside a parameter, which maps it to what the forward
    computes with (SPT's single weights), and those."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        changes = None if isinstance(module, PeftBlock) else module._modules.get('peft')
        if isinstance(changes, PeftModules):
            yield path, module, changes


def self_contained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, which is not changed, with its single weights (SPT) in those of the base."""
    # What has several names, because modules share it, is one tensor here, too.
    state = deepcopy(dict(model.state_dict()))
    with torch.no_grad():
        for path, _, changes in _changed(model, remove_duplicate=False):
            prefix = f'{path}.' if path else ''
            for name, change in changes.items():
                state[prefix + name] = change(state[prefix + name])
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f'{prefix}peft.')}
    return state


def _single(tensor: Tensor) -> Tensor:
    halves = (torch.float16, torch.bfloat16)
    return tensor.float() if tensor.dtype in halves else tensor


def _blocks(model: nn.Module) -> list[tuple[str, PeftBlock]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, PeftBlock)]


def stock_config(cfg: Config) -> Config:
    """A config without anything of mona_mm: every ``base`` in the place of what is built around it, mmengine's classes
    for its own. Only of data sets that the libraries do not have, the types stay: see :func:`types_left`. No pretrained
    file is named in it: all weights are merged ones, and many a file only mona_mm can read."""
    plain = _stock(with_names(cfg.to_dict()))
    _forget_pretrained(plain.get('model'))
    plain['custom_hooks'] = [hook for hook in plain.get('custom_hooks') or [] if not is_of_mona_mm(hook)]
    plain['custom_imports'] = None
    for hook in (plain.get('default_hooks') or {}).values():
        if hook and is_type(hook, 'mona_mm.SafeCheckpointHook'):  # None takes one of mmengine's away
            hook['type'] = 'CheckpointHook'
    if is_of_mona_mm((plain.get('optim_wrapper') or {}).get('constructor')):
        del plain['optim_wrapper']['constructor']
    schedulers = plain.get('param_scheduler')
    if isinstance(schedulers, dict) and 'type' in schedulers:  # else by the names of several optimizers
        schedulers = [schedulers]
    if isinstance(schedulers, list):
        plain['param_scheduler'] = [stock for each in schedulers for stock in _stock_schedulers(each)]
    return Config(plain)


def types_left(cfg: Config) -> list[str]:
    """The types of mona_mm that a config names."""
    found: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, dict) and is_of_mona_mm(node):
            found.add(node['type'])
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
            look(value)

    look(with_names(cfg.to_dict()))
    return sorted(found)


def _stock_schedulers(scheduler: dict[str, Any]) -> list[dict[str, Any]]:
    """mmengine's nearest to a scheduler: its cosine begins after the warm-up."""
    if not is_type(scheduler, 'mona_mm.WarmupCosineLR'):
        return [scheduler]
    options = {key: scheduler[key] for key in ('by_epoch', 'end', 'verbose') if key in scheduler}
    begin = scheduler.get('begin', 0)
    middle = begin + scheduler['warmup']
    warmup = dict(type='LinearLR', start_factor=scheduler['start_ratio'], **{**options, 'begin': begin, 'end': middle})
    return [warmup, dict(type='CosineAnnealingLR', eta_min_ratio=scheduler['end_ratio'], begin=middle, **options)]


def self_contained_config(cfg: Config) -> Config:
    """A config for a :func:`self_contained_state_dict`, which needs no pretrained file."""
    plain = with_names(cfg.to_dict())
    _forget_pretrained(plain['model'])
    return Config({**plain, 'load_from': None})


def set_deploy(cfg: Config) -> None:
    """Let a config build its methods in their forms for inference, in place: for a state dict of a model in which
    :func:`mona_mm.methods.deploy` has put them."""
    _set_deploy(cfg.model)


def _stock(node: Any) -> Any:
    if isinstance(node, dict):
        if is_type(node, 'mona_mm.PeftBackbone', 'mona_mm.FrozenModel'):
            return _stock(node['base'])
        return {key: _stock(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_stock(value) for value in node)
    return node


def _forget_pretrained(node: Any) -> None:
    for key, value in _children(node):
        if key == 'init_cfg':
            several = [each for each in value if not _names_file(each)] if isinstance(value, list | tuple) else []
            node[key] = None if _names_file(value) else several or value
        elif key == 'pretrained' and (isinstance(value, str) or value is True):  # mmseg's models, timm's backbones
            node[key] = None if isinstance(value, str) else False
        else:
            _forget_pretrained(value)


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    """What a dict, list or tuple holds, by key or index; nothing of anything else."""
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()


def _names_file(init_cfg: Any) -> bool:
    """Some hosts read a ``checkpoint`` whatever the type of their ``init_cfg``."""
    if isinstance(init_cfg, list | tuple):
        return bool(init_cfg) and all(map(_names_file, init_cfg))
    return isinstance(init_cfg, dict) and (is_type(init_cfg, 'Pretrained') or 'checkpoint' in init_cfg)


def _set_deploy(node: Any) -> None:
    if isinstance(node, dict) and is_type(node, 'mona_mm.PeftBackbone') and _has_deploy_form(node.get('peft')):
        node['deploy'] = True
    for _, value in _children(node):
        _set_deploy(value)


def _has_deploy_form(peft: Mapping[str, Any] | None) -> bool:
    method = look_up(METHODS, (peft or {}).get('type'))
    if is_type(peft, 'mona_mm.SPT'):  # whose modules may be Mona's
        method = look_up(METHODS, (peft.get('structured') or {}).get('type'))
    return getattr(method, 'to_deploy', PeftModule.to_deploy) is not PeftModule.to_deploy
