"""Build the model of a config without memory for its weights."""

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mona_mm.frozen.rules import freeze
from mona_mm.nn.meta import meta_device
from mona_mm.type_names import enter_scope, is_type


def build_on_meta(cfg: Config) -> nn.Module:
    """Build the model of a config with parameters on the meta device, for counting and inspecting, not for running.

    Parameters that a ``ParamFreezeHook`` of the config would freeze are frozen.
    """
    enter_scope(cfg)
    with meta_device():
        model = MODELS.build(cfg.model)
    freeze_by_hooks(model, cfg)
    return model


def freeze_by_hooks(model: nn.Module, cfg: Config) -> None:
    """Freeze the parameters that a ``ParamFreezeHook`` of the config would freeze."""
    for hook in cfg.get('custom_hooks') or []:
        if is_type(hook, 'mona_mm.ParamFreezeHook') and hook.get('trainable') is not None:
            freeze(model, hook['trainable'])
