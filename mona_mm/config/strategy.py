"""Choose how processes share a model: a strategy of mmengine's FlexibleRunner, in place of the Runner."""

import importlib.util
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mona_mm.errors import ConfigError
from mona_mm.type_names import is_type

STRATEGIES = dict(
    ddp='mona_mm.DDPStrategy',
    fsdp='mona_mm.FSDPStrategy',
    fsdp2='mona_mm.FSDP2Strategy',
    deepspeed='mona_mm.DeepSpeedStrategy',
)
_WITH_COPIES = ('EMAHook', 'mmdet.MeanTeacherHook')


def use_strategy(cfg: Config, name: str) -> None:
    """Set a config to train by a strategy.

    Args:
        cfg: the config, with its launcher.
        name: a key of :data:`STRATEGIES`.

    Raises:
        ConfigError: if there is one process, a hook copies a model that would be sharded, or DeepSpeed is not
            installed.
    """
    if cfg.get('launcher', 'none') == 'none':
        raise ConfigError(
            f'--strategy {name} is for several processes: start them with tools/dist_train.sh CONFIG GPUS --strategy '
            f'{name}, or with torchrun and --launcher pytorch.'
        )
    if name != 'ddp':
        for hook in cfg.get('custom_hooks') or []:
            if any(is_type(hook, copying) for copying in _WITH_COPIES):
                raise ConfigError(
                    f'--strategy {name}: {hook["type"]} averages a copy of the model, which must be whole for that. '
                    'Use --strategy ddp, or leave the hook out of custom_hooks.'
                )
    strategy: dict[str, Any] = dict(type=STRATEGIES[name])
    if name == 'deepspeed':
        strategy |= _deepspeed(cfg)
    else:
        strategy['sync_bn'] = cfg.get('sync_bn')
        if name == 'ddp':
            strategy['model_wrapper'] = _ddp(cfg)
        else:
            strategy['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
    cfg.strategy = {**strategy, **{key: value for key, value in (cfg.get('strategy') or {}).items() if key != 'type'}}
    cfg.runner_type = 'FlexibleRunner'


def _ddp(cfg: Config) -> dict[str, Any]:
    """The config of the model's wrapper, as mmengine's Runner takes it from a config."""
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    return {**wrapper, **(cfg.get('model_wrapper_cfg') or {})}


def _deepspeed(cfg: Config) -> dict[str, Any]:
    """The options of mmengine's ``DeepSpeedStrategy``, to which accumulation, clipping and precision belong."""
    if importlib.util.find_spec('deepspeed') is None:
        raise ConfigError('--strategy deepspeed needs the package deepspeed: pip install "deepspeed<0.16".')
    wrapper = cfg.optim_wrapper
    options: dict[str, Any] = dict(
        zero_optimization=dict(stage=1),  # what trains stays whole, so that deltas need no gathering
        gradient_accumulation_steps=wrapper.pop('accumulative_counts', 1),
        train_micro_batch_size_per_gpu=cfg.train_dataloader.batch_size,
    )
    clip = wrapper.pop('clip_grad', None)
    if clip:
        options['gradient_clipping'] = clip['max_norm']
    if is_type(wrapper, 'AmpOptimWrapper'):
        precision = 'bf16' if wrapper.pop('dtype', 'float16') == 'bfloat16' else 'fp16'
        options[precision] = dict(enabled=True)
        wrapper.pop('loss_scale', None)
    wrapper.type = 'DeepSpeedOptimWrapper'
    stage = ((cfg.get('strategy') or {}).get('zero_optimization') or {}).get('stage', 1)
    if stage == 3:
        raise ConfigError(
            '--strategy deepspeed: ZeRO stage 3 shards what trains, so no deltas can be written. Use stage 1 or 2, or '
            '--strategy fsdp2, which shards the frozen weights.'
        )
    print_log(
        'DeepSpeed writes a folder a checkpoint; the delta beside it is the one file that goes anywhere.', 'current'
    )
    return options
