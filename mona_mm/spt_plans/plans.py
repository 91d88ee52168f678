"""Find the plan of an SPT config, or make it before training."""

import os.path as osp
from collections.abc import Mapping
from inspect import signature
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, MissingFileError, UserError
from mona_mm.spt.allocation import allocate, check_rule, parse_budget
from mona_mm.spt.method import SPT, check_spt
from mona_mm.spt.plan import Plan, structured_module
from mona_mm.spt_plans.sensitivity import config_fingerprint, measure
from mona_mm.type_names import is_type

PLAN_FILE = 'plan.safetensors'
_ALLOCATION = ('rule', 'alpha', 'beta', 'structured_vectors', 'structured_only')


def find_plan(cfg: Config, folders: tuple[str, ...] = ()) -> str | Mapping[str, Any] | None:
    """Find the file of an SPT config's plan, or the plan that the config itself holds; None if there is none.

    Args:
        cfg: a config; one without SPT needs no plan.
        folders: the folders to search for ``plan.safetensors`` if the config names no file or one that does not exist.
    """
    peft = spt_config(cfg)
    if peft is None:
        return None
    if isinstance(peft.get('plan'), Mapping):  # the sites of its modules, in the config itself
        return peft['plan']
    files = [peft.get('plan'), *(osp.join(folder, PLAN_FILE) for folder in folders)]
    return next((file for file in files if file and osp.isfile(file)), None)


def require_plan(cfg: Config, folders: tuple[str, ...]) -> None:
    """Set the plan that :func:`find_plan` finds in the config, in place, for commands that cannot make one.

    Raises:
        MissingFileError: if there is none.
    """
    peft = spt_config(cfg)
    if peft is None:
        return
    found = find_plan(cfg, folders)
    if found is None:
        raise MissingFileError(
            f'The plan of this SPT config is missing: there is no {PLAN_FILE} in {" or ".join(folders)}. Training has '
            f'written it to its work dir; name it with --cfg-options {_path(cfg)}.plan=/path/to/it'
        )
    peft.plan = found


def make_plan(cfg: Config) -> None:
    """Measure the sensitivity of an SPT config's base and store the plan in the work dir, unless there is one.

    With several processes it is called in each of them, after they have joined a group; the main process writes the
    plan.

    Raises:
        ConfigError: if the plan in the work dir was made for other settings, the config has no budget, or SPT does not
            have its options.
        UserError: see :func:`mona_mm.spt.compute_sensitivity` and :func:`mona_mm.spt.allocate`.
    """
    peft = spt_config(cfg)
    if peft is None:
        return
    check_spt(peft)  # before the measurement, which takes long
    named = peft.get('plan')
    found = find_plan(cfg, (cfg.work_dir, *([osp.dirname(cfg.load_from)] if cfg.get('resume') else [])))
    if found:
        if found != named and not cfg.get('resume'):  # a resumed run keeps its plan, whatever the options
            _check_same_request(cfg, Plan.load(found), found)
        _say(f'Plan: {found if isinstance(found, str) else "in the config"}')
        peft.plan = found
        return
    if peft.get('budget') is None:
        missing = f'there is no {named}' if named else 'this config names no plan'
        raise ConfigError(
            f'SPT: {missing}, and no budget to make one for. Set one with --cfg-options {_path(cfg)}.budget=0.5%'
        )
    request = _request(cfg)
    parse_budget(request['budget'], 1 << 62)
    check_rule(request['rule'], request['alpha'], request['beta'])
    check_data(cfg, ('sensitivity',))  # the training's have been checked
    file = osp.join(cfg.work_dir, PLAN_FILE)
    batches = request['num_batches']
    _say(f'There is no plan yet: measuring the sensitivity of the backbone on {batches} batches of the training data.')
    sensitivity = measure(cfg, batches, request['per_sample'])
    error = None
    if is_main_process():
        try:
            options = {key: request[key] for key in _ALLOCATION}
            plan = allocate(sensitivity, request['budget'], request['structured'], **options)
            plan.save(file)
            _say(f'{plan.describe()} (budget: {plan.info["budget_parameters"]:,})\nPlan: {file}')
        except UserError as problem:
            error = problem
    messages = [error and str(error)]
    broadcast_object_list(messages)
    if messages[0]:
        raise error or ConfigError(messages[0])
    peft.plan = file


def spt_config(cfg: Mapping[str, Any]) -> dict | None:
    """The ``dict(type='SPT', ...)`` that a PeftBackbone anywhere in a config's model has as ``peft`` or in it, or
    None."""
    place = find_spt(cfg)
    return None if place is None else place[2]


def find_spt(cfg: Mapping[str, Any]) -> tuple[str, dict, dict] | None:
    """The path of SPT's options in a config, the config of the PeftBackbone around them, and themselves; or None."""
    pending = [('model', cfg.get('model'))]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            peft = node.get('peft')
            methods = enumerate(peft) if isinstance(peft, list | tuple) else [(None, peft)]
            for index, method in methods:
                if isinstance(method, dict) and is_type(method, 'mona_mm.SPT'):
                    return f'{path}.peft' if index is None else f'{path}.peft.{index}', node, method
            pending += [(f'{path}.{key}', value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            pending += [(f'{path}.{index}', value) for index, value in enumerate(node)]
    return None


def put_plan_in(cfg: Config) -> None:
    """Write the sites of the structured modules into an SPT config, in place, so that it needs no plan file.

    This is for a checkpoint whose single weights are merged into those of the base.
    """
    peft = spt_config(cfg)
    if peft is None or isinstance(peft['plan'], Mapping):
        return
    plan = Plan.load(peft['plan'])
    structured = {**(peft.get('structured') or {}), **(plan.structured_config or {})}
    sites = {block: list(of_block) for block, of_block in plan.structured.items()}
    name = {key: value for key, value in peft.items() if key == 'name'}
    peft.clear()
    peft.update(type='SPT', **name, structured=structured or None, plan=sites)


def _request(cfg: Config) -> dict[str, Any]:
    """The settings of an SPT config for making a plan, with defaults filled in."""
    defaults = {name: p.default for name, p in signature(SPT).parameters.items()}
    request = defaults | dict(spt_config(cfg))
    return request | dict(structured=structured_module(request['structured']))


def _check_same_request(cfg: Config, plan: Plan, file: str) -> None:
    """Refuse a plan that another run has left in the work dir, if it was made with other settings."""
    request = _request(cfg)
    wanted = {'task': cfg.get('task')}
    wanted |= {key: request[key] for key in ('structured', 'num_batches', 'per_sample', *_ALLOCATION)}
    made = {'structured': plan.structured_config, **plan.info}
    if wanted['structured'] is not None and made['structured'] is not None:
        wanted['structured'] = {key: wanted['structured'].get(key) for key in made['structured']}
    if request['budget'] is not None:
        wanted['budget'] = request['budget']
        if parse_budget(request['budget'], plan.architecture.parameters) == made.get('budget_parameters'):
            made['budget'] = request['budget']
    wanted['seed'] = (cfg.get('randomness') or {}).get('seed') or 0
    advice = f'Train in another --work-dir, or name the plan to use with --cfg-options {_path(cfg)}.plan=/path'
    for key, value in wanted.items():
        if value != made.get(key):
            raise ConfigError(f'{file} is a plan for {key}={made.get(key)}, but this config has {value}. {advice}')
    if config_fingerprint(cfg) != made.get('config_fingerprint'):
        raise ConfigError(f'{file} was measured with another model or other data than those of this config. {advice}')


def _path(cfg: Config) -> str:
    """The path of SPT's options in a config, for ``--cfg-options``."""
    place = find_spt(cfg)
    return 'model.backbone.peft' if place is None else place[0]


def _say(message: str) -> None:
    if is_main_process():
        print(message, flush=True)
