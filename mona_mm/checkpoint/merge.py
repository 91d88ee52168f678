"""Merge methods that add to weights into the weights of their base."""

from collections.abc import Callable, Iterable, Iterator
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
from mona_mm.methods.base import LinearModule, PeftModule
from mona_mm.nn.mixin import Mixin, mix_out
from mona_mm.record import freeze_records, record_of
from mona_mm.registry import METHODS
from mona_mm.type_names import is_of_mona_mm, is_type, look_up, with_names


def unmergeable(model: nn.Module) -> list[str]:
    """The methods in ``model`` that do more than add to weights, so that no stock model can compute the same."""
    return sorted(
        {
            type(module).__name__
            for _, block in _blocks(model)
            for site, module in block.peft.items()
            if site not in block.spec.linears or not _has_delta_weight(module)
        }
    )


def _has_delta_weight(module: nn.Module) -> bool:
    method = getattr(type(module), 'delta_weight', LinearModule.delta_weight)
    return method is not LinearModule.delta_weight


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Compute the merged values of the parameters to which a method adds, by every name in the state dict.

    ``model`` itself is not changed. Low-rank products are added in float64. Weights in half precision are returned in
    float32, since half precision would round small additions away.

    Raises:
        ConfigError: if a method in the model is :func:`unmergeable`, or a weight to which one adds is parametrized or
            shared by several modules.
    """
    left = unmergeable(model)
    if left:
        raise ConfigError(
            f'{", ".join(left)} cannot be merged into the weights of a base, since no stock model computes the same. '
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

    sums: dict[int, Tensor] = {}  # by the id of the parameter, since a parameter may have several names

    def add(name: str, change: Callable[[Tensor], Tensor]) -> None:
        if name not in parameters:
            raise ConfigError(
                f'{name} is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations before merging.'
            )
        if holders[id(parameters[name])] > 1:
            raise ConfigError(
                f'{", ".join(names[id(parameters[name])])} are one weight that several modules share, so an addition '
                'for one of them would change all. Such a model cannot be merged.'
            )
        key = id(parameters[name])
        sums[key] = change(sums.get(key, parameters[name]))

    with torch.no_grad():
        for path, _, changes in _modules_beside_parameters(model):
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
    """The state dict of ``model`` as a stock model has it, with merged weights and without the method's tensors.

    ``model`` itself is not changed. Weights in half precision (``frozen_dtype``) are returned in float32.

    Raises:
        ConfigError: see :func:`merged_weights`.
    """
    sums, removed = merged_weights(model), method_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in removed}
    return {name: sums[name] if name in sums else _single(tensor.detach().clone()) for name, tensor in state.items()}


def merge(model: nn.Module) -> nn.Module:
    """Merge a method into the weights of its base and remove everything of mona_mm from ``model``, in place.

    The result is the stock model, with its classes, the names of its state dict, its ``init_weights`` and ``train``.
    Parameters that :mod:`mona_mm.frozen.rules` has frozen train again (but not in a teacher or an average, where
    nothing trains), and the fast forms (``fast=True``) are removed. The parameters stay the same objects, so that an
    optimizer can continue with them. Weights that ``frozen_dtype`` kept in half precision become float32, and the
    backbone computes in the precision of its input. An average of the model (``EMAHook``) is a model of its own and is
    merged separately.

    Args:
        model: a model, or a backbone alone, whose methods add to weights (LoRA, DoRA, SPT with these and single
            weights) or only choose which parameters train (BitFit, ...). For inference with a Mona see
            :func:`mona_mm.methods.deploy`.

    Returns:
        ``model``.

    Raises:
        ConfigError: if it holds another method, or a weight to which one adds is parametrized or shared by several
            modules; the model is then unchanged.
        UserError: if it is called within :func:`mona_mm.reading` of the model.
    """
    with writing(model), torch.no_grad():
        sums = merged_weights(model)
        untrained = [module for module in model.modules() if _is_kept_from_training(module)]
        for module in [m for m in model.modules() if record_of(m).frozen_dtype]:
            for weight in kept_weights(module):
                weight.data = weight.data.float()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, total in sums.items():
            parameters[name].copy_(total)
        for _, module, changes in list(_modules_beside_parameters(model)):
            for name in changes:
                getattr(module, name).requires_grad = True
            del module.peft
        for module in [m for m in model.modules() if record_of(m).method]:
            remove(module)
        for module in model.modules():
            _make_stock(module)
        for module in untrained:
            module.requires_grad_(False)
    return model


def _is_kept_from_training(module: nn.Module) -> bool:
    """Whether nothing in a module trains although it was built with trainable parameters, as in a teacher."""
    was_trainable = any(record.trainable for _, _, record in freeze_records(module))
    return was_trainable and not any(p.requires_grad for p in module.parameters())


def _make_stock(module: nn.Module) -> None:
    """Remove everything that PeftBackbone, PeftModel and FrozenModel have added to a module, in place."""
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
        module.is_init = True  # otherwise a Runner would load the file of init_cfg over the merged weights


_METHODS = ('forward', 'train', 'init_weights')
_ATTRIBUTES = ('peft_record', '_masks')


def _modules_beside_parameters(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module, PeftModules]]:
    """Yield the path and module for every module whose parameters have method modules beside them, and those modules.

    Such a method module maps a parameter to the tensor that the forward uses (SPT's single weights).
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        changes = None if isinstance(module, PeftBlock) else module._modules.get('peft')
        if isinstance(changes, PeftModules):
            yield path, module, changes


def self_contained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` with its single weights (SPT) merged into those of the base.

    ``model`` itself is not changed.
    """
    # deepcopy keeps tensors that modules share as one tensor.
    state = deepcopy(dict(model.state_dict()))
    with torch.no_grad():
        for path, _, changes in _modules_beside_parameters(model, remove_duplicate=False):
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
    """Make a config without types of mona_mm, for a :func:`merged_state_dict`.

    Every PeftBackbone, PeftModel and FrozenModel is replaced by its ``base``, and other classes by mmengine's. Only
    data sets that the libraries do not have keep their types, see :func:`types_left`. Pretrained files are left out,
    since all weights come from the merged checkpoint.
    """
    plain = _stock(with_names(cfg.to_dict()))
    _forget_pretrained(plain.get('model'))
    plain['custom_hooks'] = [hook for hook in plain.get('custom_hooks') or [] if not is_of_mona_mm(hook)]
    plain['custom_imports'] = None
    for hook in (plain.get('default_hooks') or {}).values():
        if hook and is_type(hook, 'mona_mm.SafeCheckpointHook'):  # None removes one of mmengine's hooks
            hook['type'] = 'CheckpointHook'
    if is_of_mona_mm((plain.get('optim_wrapper') or {}).get('constructor')):
        del plain['optim_wrapper']['constructor']
    schedulers = plain.get('param_scheduler')
    if isinstance(schedulers, dict) and 'type' in schedulers:  # without a type it has a scheduler for each optimizer
        schedulers = [schedulers]
    if isinstance(schedulers, list):
        plain['param_scheduler'] = [stock for scheduler in schedulers for stock in _stock_schedulers(scheduler)]
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
    """mmengine's closest equivalent of a scheduler; its cosine begins only after the warm-up."""
    if not is_type(scheduler, 'mona_mm.WarmupCosineLR'):
        return [scheduler]
    options = {key: scheduler[key] for key in ('by_epoch', 'end', 'verbose') if key in scheduler}
    begin = scheduler.get('begin', 0)
    middle = begin + scheduler['warmup']
    warmup = dict(type='LinearLR', start_factor=scheduler['start_ratio'], **{**options, 'begin': begin, 'end': middle})
    return [warmup, dict(type='CosineAnnealingLR', eta_min_ratio=scheduler['end_ratio'], begin=middle, **options)]


def self_contained_config(cfg: Config) -> Config:
    """Make a config for a :func:`self_contained_state_dict`, without pretrained files."""
    plain = with_names(cfg.to_dict())
    _forget_pretrained(plain['model'])
    return Config({**plain, 'load_from': None})


def set_deploy(cfg: Config) -> None:
    """Set ``deploy=True`` for the methods of a config that have a form for inference, in place.

    The config then fits the state dict of a model that :func:`mona_mm.methods.deploy` has changed.
    """
    _set_deploy(cfg.model)


def _stock(node: Any) -> Any:
    if isinstance(node, dict):
        if is_type(node, 'mona_mm.PeftBackbone', 'mona_mm.PeftModel', 'mona_mm.FrozenModel'):
            return _stock(node['base'])
        return {key: _stock(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_stock(value) for value in node)
    return node


def _forget_pretrained(node: Any) -> None:
    for key, value in _children(node):
        if key == 'init_cfg':
            others = [entry for entry in value if not _names_file(entry)] if isinstance(value, list | tuple) else []
            node[key] = None if _names_file(value) else others or value
        elif key == 'pretrained' and (isinstance(value, str) or value is True):  # mmseg's models, timm's backbones
            node[key] = None if isinstance(value, str) else False
        else:
            _forget_pretrained(value)


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    """The items of a dict, list or tuple by key or index; nothing for other values."""
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()


def _names_file(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` names only files. Some hosts read a ``checkpoint`` whatever the type."""
    if isinstance(init_cfg, list | tuple):
        return bool(init_cfg) and all(map(_names_file, init_cfg))
    return isinstance(init_cfg, dict) and (is_type(init_cfg, 'Pretrained') or 'checkpoint' in init_cfg)


def _set_deploy(node: Any) -> None:
    if isinstance(node, dict) and is_type(node, 'mona_mm.PeftBackbone') and _has_deploy_form(node.get('peft')):
        node['deploy'] = True
    for _, value in _children(node):
        _set_deploy(value)


def _has_deploy_form(peft: Any) -> bool:
    if isinstance(peft, list | tuple):
        return any(map(_has_deploy_form, peft))
    method = look_up(METHODS, (peft or {}).get('type'))
    if is_type(peft, 'mona_mm.SPT'):  # its modules may be those of Mona
        method = look_up(METHODS, (peft.get('structured') or {}).get('type'))
    return getattr(method, 'to_deploy', PeftModule.to_deploy) is not PeftModule.to_deploy
