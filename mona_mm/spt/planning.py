"""The plan of a config: found, or made before training."""

import os.path as osp

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process

from mona_mm.data import check_data
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.spt.allocation import allocate, parse_budget
from mona_mm.spt.plan import Plan, structured_module
from mona_mm.spt.sensitivity import measure

PLAN_FILE = 'plan.safetensors'
_ALLOCATION = ('rule', 'alpha', 'beta', 'structured_vectors', 'structured_only')


def find_plan(cfg: Config, folders: tuple[str, ...] = ()) -> bool:
    """Fill in the plan of an SPT config, in place.

    Args:
        cfg: a config; one without SPT needs no plan.
        folders: where to look for ``plan.safetensors`` when the file that the config names does not exist, or it names
            none.

    Returns:
        Whether the config has the plan that it needs.

    Raises:
        ConfigError: if the plan in one of the folders was made for another budget or task, or by other rules.
        PlanError: if the file is damaged.
    """
    peft = spt_config(cfg)
    if peft is None or (peft.get('plan') and osp.isfile(peft.plan)):
        return True
    for folder in folders:
        file = osp.join(folder, PLAN_FILE)
        if osp.isfile(file):
            _check_same_request(cfg, Plan.load(file), file)
            peft.plan = file
            return True
    return False


def require_plan(cfg: Config, folders: tuple[str, ...]) -> None:
    """:func:`find_plan`, for what cannot make one.

    Raises:
        MissingFileError: if there is none.
    """
    if not find_plan(cfg, folders):
        raise MissingFileError(
            f'The plan of this SPT config is not there: no {PLAN_FILE} in {" or ".join(folders)}. Training left it in '
            'its work dir; name it with --cfg-options model.backbone.peft.plan=/path/to/it'
        )


def make_plan(cfg: Config) -> None:
    """Measure the sensitivity of an SPT config's base and store the plan in the work dir, unless there is one.

    In every process of a group, which has been joined; the plan is then that of the main process.

    Raises:
        UserError: what :func:`find_plan`, :func:`mona_mm.spt.compute_sensitivity` and :func:`mona_mm.spt.allocate`
            raise; also a ConfigError if the config says no budget.
    """
    if find_plan(cfg, (cfg.work_dir,)):
        return
    peft = spt_config(cfg)
    if peft.get('budget') is None:
        named = f'there is no {peft.plan}' if peft.get('plan') else 'this config names no plan'
        raise ConfigError(
            f'SPT: {named}, and no budget to make one for. Set one with --cfg-options model.backbone.peft.budget=0.5%'
        )
    parse_budget(peft.budget, 1 << 62)  # a misspelt one is better known before than after
    structured = structured_module(peft.get('structured'))
    check_data(cfg, ('sensitivity',))  # the training's have been checked
    file = osp.join(cfg.work_dir, PLAN_FILE)
    batches = peft.get('num_batches', 16)
    _say(f'There is no plan yet: measuring the sensitivity of the backbone on {batches} batches of the training data.')
    sensitivity = measure(cfg, batches, peft.get('per_sample', False))
    if is_main_process():
        options = {key: peft[key] for key in _ALLOCATION if key in peft}
        plan = allocate(sensitivity, peft.budget, structured, **options)
        plan.save(file)
        _say(f'{plan.describe()} (budget: {plan.info["budget_parameters"]:,})\nPlan: {file}')
    barrier()
    peft.plan = file


def spt_config(cfg: Config) -> dict | None:
    """The ``peft=dict(type='SPT', ...)`` of a config's backbone, or None."""
    backbone = (cfg.get('model') or {}).get('backbone')
    peft = backbone.get('peft') if isinstance(backbone, dict) else None
    return peft if isinstance(peft, dict) and peft.get('type') == 'SPT' else None


def _check_same_request(cfg: Config, plan: Plan, file: str) -> None:
    """A plan left by another run must not decide what this one trains."""
    peft = spt_config(cfg)
    asked = {'structured': structured_module(peft.get('structured'))}
    made = {'structured': plan.structured_config}
    for key in ('budget', *_ALLOCATION):
        if peft.get(key) is not None:
            asked[key], made[key] = peft[key], plan.info.get(key)
    if cfg.get('task') and plan.info.get('task'):
        asked['task'], made['task'] = cfg.task, plan.info['task']
    if asked['structured'] is not None and made['structured'] is not None:
        asked['structured'] = {key: asked['structured'].get(key) for key in made['structured']}
    different = [key for key in asked if str(asked[key]) != str(made[key])]
    if different:
        key = different[0]
        raise ConfigError(
            f'{file} is a plan for {key}={made[key]}, and this config says {asked[key]}. Train in another --work-dir, '
            'or name the plan to use with --cfg-options model.backbone.peft.plan=/path/to/it'
        )


def _say(message: str) -> None:
    if is_main_process():
        print(message, flush=True)
