"""Recipes for small data: the schedule by the number of images, the learning rate by the batch, rare classes."""

import math
from collections.abc import Collection
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size

from mona_mm.config.nodes import dicts_of
from mona_mm.config.run_hooks import checkpoint_hook
from mona_mm.config.watching import stop_early
from mona_mm.errors import ConfigError
from mona_mm.type_names import is_type, type_name

_DEFAULTS = dict(
    passes=40, iterations=(1, 1_000_000), evaluations=10, rare=None, early_stopping=None, full_learning_rate=None
)
_ADAPTIVE = ('ada', 'lamb', 'lion', 'rmsprop', 'prodigy')  # parts of the names of optimizers that normalise gradients
_LENGTHS = ('begin', 'end', 'T_max', 'total_iters', 'step_size', 'milestones')
_WARM_UPS = ('LinearLR', 'ConstantLR')


def apply_recipe(cfg: Config, given: Collection[str] = ()) -> list[str]:
    """Apply the ``recipe`` of a config whose data have been found by ``--data``, in place.

    The number of steps follows from the number of training images, and with it evaluations, checkpoints and schedulers;
    the learning rate follows from the batch (:func:`scale_learning_rate`). The recipe is then taken out of the config.

    Args:
        cfg: the config. Without ``recipe`` or ``own_data`` it stays as it is.
        given: the keys of ``--cfg-options``, whose values are kept.

    Returns:
        What was done, in lines for the user.

    Raises:
        ConfigError: if the recipe has an unknown key or an unusable value.
    """
    if not cfg.get('recipe') or not cfg.get('own_data'):
        return []
    recipe = _checked(cfg.recipe)
    cfg._cfg_dict.pop('recipe')
    images = cfg.own_data['images']['train']
    lines = [_set_schedule(cfg, recipe, images, given)]
    if recipe['full_learning_rate'] and _trains_whole(cfg.model.get('backbone')) and not _is_given(_LR, given):
        cfg.optim_wrapper.optimizer.lr = recipe['full_learning_rate']
        lines.append(f'Learning rate where the whole backbone trains: {recipe["full_learning_rate"]:g}.')
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    lines += scale_learning_rate(cfg, base, given)
    if recipe['rare']:
        _repeat_rare(cfg, recipe['rare'])
        lines.append(f'Images with a class that fewer than {recipe["rare"]:.0%} of the images have are repeated.')
    if recipe['early_stopping'] and not any(is_type(hook, 'EarlyStoppingHook') for hook in cfg.custom_hooks or ()):
        stop_early(cfg, recipe['early_stopping'])
    return lines


def scale_learning_rate(cfg: Config, base: int | None, given: Collection[str] = ()) -> list[str]:
    """Scale the learning rate of a config to its batch, in place.

    With an optimizer that divides a gradient by its size (Adam and its kin) the step does not shrink with the noise of
    the gradient, and the rate grows with the root of the batch (Malladi et al., "On the SDEs and Scaling Rules for
    Adaptive Gradient Algorithms", NeurIPS 2022); with SGD it grows with the batch (Goyal et al., arXiv:1706.02677).

    Args:
        cfg: the config.
        base: the batch for which its learning rate is; None leaves the rate alone.
        given: the keys of ``--cfg-options``; a learning rate among them stays.

    Returns:
        The line that says the new rate; nothing if it is the old one, or if mmengine scales it (``--auto-scale-lr``).
    """
    batch = batch_of(cfg)
    scaled_elsewhere = (cfg.get('auto_scale_lr') or {}).get('enable')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not base or batch == base or scaled_elsewhere or not optimizer or _is_given(_LR, given):
        return []
    name, old = type_name(dict.get(optimizer, 'type')), optimizer['lr']
    adaptive = any(part in name.lower() for part in _ADAPTIVE)
    optimizer['lr'] = float(f'{old * (batch / base) ** (0.5 if adaptive else 1.0):.4g}')
    rule = 'the root of the batch' if adaptive else 'the batch'
    return [f'Learning rate {optimizer["lr"]:g}: {old:g} is for a batch of {base}, and with {name} goes with {rule}.']


_LR = 'optim_wrapper.optimizer.lr'


def batch_of(cfg: Config) -> int:
    """The number of images behind one step of the optimizer, over all processes."""
    accumulated = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    return cfg.train_dataloader.batch_size * accumulated * get_world_size()


def _checked(recipe: dict[str, Any]) -> dict[str, Any]:
    for key in recipe:
        if key not in _DEFAULTS:
            raise ConfigError(f'recipe.{key}: a recipe has {", ".join(_DEFAULTS)}.')
    found = {**_DEFAULTS, **recipe}

    def check(key: str, what: str, fits: bool) -> None:
        if not fits:
            raise ConfigError(f'recipe.{key}={found[key]}: must be {what}.')

    low_high = found['iterations']
    is_range = isinstance(low_high, list | tuple) and len(low_high) == 2 and all(isinstance(n, int) for n in low_high)
    check(
        'iterations',
        'the least and the largest number of steps, (200, 20000)',
        is_range and 1 <= low_high[0] <= low_high[1],
    )
    check('passes', 'a number above 0', _is_number(found['passes']) and found['passes'] > 0)
    check(
        'evaluations',
        'a whole number of at least 1',
        isinstance(found['evaluations'], int) and found['evaluations'] >= 1,
    )
    for key in ('rare', 'full_learning_rate'):
        check(key, 'a number between 0 and 1', not found[key] or (_is_number(found[key]) and 0 < found[key] < 1))
    stop = found['early_stopping']
    check(
        'early_stopping', 'a number of evaluations of at least 1', stop is None or (isinstance(stop, int) and stop >= 1)
    )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_given(key: str, given: Collection[str]) -> bool:
    """Whether a setting, a part of it or what it is a part of is among the options of the user."""
    return any(key == each or key.startswith(f'{each}.') or each.startswith(f'{key}.') for each in given)


# The schedule --------------------------------------------------------------------------------------------------------


def _set_schedule(cfg: Config, recipe: dict[str, Any], images: int, given: Collection[str]) -> str:
    loop, batch = cfg.train_cfg, cfg.train_dataloader.batch_size * get_world_size()
    low, high = recipe['iterations']
    iterations = min(max(math.ceil(recipe['passes'] * images / batch), low), high)
    if 'max_iters' in loop:
        key, total, unit = 'max_iters', iterations, 'steps'
    else:
        key, total, unit = 'max_epochs', math.ceil(iterations * batch / _length(cfg, images)), 'epochs'
    if _is_given(f'train_cfg.{key}', given):
        total = loop[key]
    if not _is_given('param_scheduler', given):
        _stretch(cfg, unit, loop[key], total, iterations)
    loop[key] = total
    loop.pop('dynamic_intervals', None)  # which count in the old number of steps
    interval = max(1, total // recipe['evaluations'])
    if _is_given('train_cfg.val_interval', given):
        interval = loop['val_interval']
    loop['val_interval'] = interval
    checkpoint = checkpoint_hook(cfg)
    if not _is_given('default_hooks.checkpoint.interval', given):
        checkpoint['interval'], checkpoint['by_epoch'] = interval, unit == 'epochs'
    logger = cfg.default_hooks.get('logger')
    if logger and unit == 'steps' and not _is_given('default_hooks.logger.interval', given):
        logger['interval'] = min(logger.get('interval', 10), max(1, total // 10))
    seen = total if unit == 'epochs' else total * batch / images
    return (
        f'Schedule for {images} training images: {total} {unit}, batch {batch}, each image {seen:.3g} times, evaluated '
        f'every {interval}.'
    )


def _length(cfg: Config, images: int) -> int:
    """The number of images in an epoch, which a RepeatDataset multiplies."""
    for part in dicts_of(cfg.train_dataloader.dataset):
        if is_type(part, 'RepeatDataset'):
            images *= part['times']
    return images


def _stretch(cfg: Config, unit: str, configured: int, total: int, iterations: int) -> None:
    """Make the schedulers, which end with the old schedule, end with the new one, in place."""
    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    same = [each for each in schedulers if each.get('by_epoch', True) == (unit == 'epochs')]
    old = max((each['end'] for each in same if each.get('end')), default=configured)
    least = 2 if unit == 'steps' else 1  # after a warm-up of a single step mmengine's rate stays where that began
    for each in schedulers:
        if not any(each is other for other in same):  # a warm-up in steps within a schedule in epochs
            if is_type(each, *_WARM_UPS) and each.get('end'):
                each['end'] = min(each['end'], max(2, iterations // 10))
            continue
        for key in _LENGTHS:
            value = each.get(key)
            if isinstance(value, list | tuple):
                each[key] = sorted({max(least, round(n * total / old)) for n in value})
            elif isinstance(value, int) and value:
                each[key] = max(least, round(value * total / old))


# The data and the model ----------------------------------------------------------------------------------------------


def _repeat_rare(cfg: Config, share: float) -> None:
    """Repeat the images of rare classes as LVIS does (Gupta et al., CVPR 2019): by the root of share / frequency."""
    dataset = cfg.train_dataloader.dataset
    if any(is_type(part, 'BaseSegDataset') for part in dicts_of(dataset)):
        raise ConfigError('recipe.rare: label maps are not read before training, so leave it out for a segmentor.')
    cfg.train_dataloader.dataset = ConfigDict(
        type='mmengine.ClassBalancedDataset', dataset=dataset, oversample_thr=share
    )


def _trains_whole(backbone: dict[str, Any] | None) -> bool:
    """Whether all parameters of a backbone train, by its config."""
    if not backbone or not is_type(backbone, 'mona_mm.PeftBackbone'):
        return True
    trainable = backbone.get('trainable')
    return backbone.get('peft') is None if trainable is None else trainable in ('full', 'all')
