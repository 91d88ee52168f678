"""Merge a method into the weights of its base, where it is an addition to them."""

from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mona_mm.methods.folded_mona import can_fold, folded_options
from mona_mm.sites import PeftBlock, PeftModules, method_names
from mona_mm.type_names import is_ours, is_type, with_names


def unmergeable(model: nn.Module) -> list[str]:
    """The methods in ``model`` that are no addition to weights, so that no stock model can compute what they do."""
    return sorted(
        {
            type(module).__name__
            for _, block in _blocks(model)
            for site, module in block.peft.items()
            if site not in block.host.linears or not hasattr(module, 'delta_weight')
        }
    )


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` as of a stock one: what the method adds to weights is in them, and its own is gone.

    ``model`` itself is not changed. The sum is computed in float64. Weights in half precision (``frozen_dtype``) come
    out in float32: there they would round small additions away.

    Raises:
        ValueError: if something in the model is :func:`unmergeable`.
    """
    left = unmergeable(model)
    if left:
        raise ValueError(f'{", ".join(left)} cannot be merged into the weights of a base.')
    own = method_names(model)
    state = {name: _single(t) for name, t in self_contained_state_dict(model).items() if name not in own}
    merged = set()
    with torch.no_grad():
        for path, block in _blocks(model):
            for site, module in block.peft.items():
                linear = block.host.linears[site]
                weight = state[f'{path}.{linear.weight}' if path else linear.weight]
                if (weight.data_ptr(), site) in merged:  # under another name of a block that has several
                    continue
                merged.add((weight.data_ptr(), site))
                rows = weight[linear.rows(weight)]
                rows.copy_(rows.double() + module.delta_weight().double().view_as(rows))
    return state


def self_contained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, which is not changed, with its single weights (SPT) in those of the base."""
    # What has several names, because modules share it, is one tensor here, too.
    state = deepcopy(dict(model.state_dict()))
    with torch.no_grad():
        for path, module in model.named_modules(remove_duplicate=False):
            # A module of its own beside a parameter, which maps it to what the forward computes with.
            inner = None if isinstance(module, PeftBlock) else module._modules.get('peft')
            if not isinstance(inner, PeftModules):
                continue
            prefix = f'{path}.' if path else ''
            for name, change in inner.items():
                state[prefix + name] = change(state[prefix + name])
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f'{prefix}peft.')}
    return state


def _single(tensor: Tensor) -> Tensor:
    halves = (torch.float16, torch.bfloat16)
    return tensor.float() if tensor.dtype in halves else tensor


def _blocks(model: nn.Module) -> list[tuple[str, PeftBlock]]:
    modules = model.named_modules(remove_duplicate=False)
    return [(path, module) for path, module in modules if isinstance(module, PeftBlock)]


def stock_config(cfg: Config) -> Config:
    """A config without anything of mona_mm: every ``base`` in the place of what is built around it, mmengine's classes
    for its own. Only of data sets that the libraries do not have, the types stay: see :func:`types_left`. No pretrained
    file is named in it: all weights are merged ones, and many a file only mona_mm can read."""
    plain = _stock(with_names(cfg.to_dict()))
    _forget_pretrained(plain.get('model'))
    plain['custom_hooks'] = [hook for hook in plain.get('custom_hooks') or [] if not is_ours(hook)]
    plain['custom_imports'] = None
    for hook in (plain.get('default_hooks') or {}).values():
        if hook and is_type(hook, 'mona_mm.SafeCheckpointHook'):  # None takes one of mmengine's away
            hook['type'] = 'CheckpointHook'
    if is_ours((plain.get('optim_wrapper') or {}).get('constructor')):
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
        if isinstance(node, dict) and is_ours(node):
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


def self_contained_config(cfg: Config, folded: bool = False) -> Config:
    """A config for a :func:`self_contained_state_dict`, which needs no pretrained file.

    ``folded`` makes every Mona a :class:`~mona_mm.methods.FoldedMona`.
    """
    plain = with_names(cfg.to_dict())
    _forget_pretrained(plain['model'])
    if folded:
        _fold(plain['model'])
    return Config({**plain, 'load_from': None})


def _stock(node: Any) -> Any:
    if isinstance(node, dict):
        if is_type(node, 'mona_mm.PeftBackbone', 'mona_mm.FrozenModel'):
            return _stock(node['base'])
        return {key: _stock(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_stock(value) for value in node)
    return node


def _forget_pretrained(node: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == 'init_cfg':
            several = [each for each in value if not _names_file(each)] if isinstance(value, list | tuple) else []
            node[key] = None if _names_file(value) else several or value
        elif key == 'pretrained' and (isinstance(value, str) or value is True):  # mmseg's models, timm's backbones
            node[key] = None if isinstance(value, str) else False
        else:
            _forget_pretrained(value)


def _names_file(init_cfg: Any) -> bool:
    """Some hosts read a ``checkpoint`` whatever the type of their ``init_cfg``."""
    if isinstance(init_cfg, list | tuple):
        return bool(init_cfg) and all(map(_names_file, init_cfg))
    return isinstance(init_cfg, dict) and (is_type(init_cfg, 'Pretrained') or 'checkpoint' in init_cfg)


def _fold(node: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == 'peft' and isinstance(value, dict) and can_fold(value):
            node[key] = folded_options(value)
        else:
            _fold(value)
