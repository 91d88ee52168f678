"""Hugging Face's vision models as backbones for dense prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from mona_mm.checkpoint.pretrained import load_pretrained, pretrained_file
from mona_mm.errors import ConfigError
from mona_mm.options import checked, show
from mona_mm.registry import MODELS

FIXED_SIZE = ('hiera',)
"""The model types whose backbones take images of the size of their config alone."""


@MODELS.register_module()
class HFBackbone(BaseModule):
    """A model of transformers' ``AutoBackbone``, with maps ``(B, C, H, W)`` for necks and heads of the OpenMMLab stack.

    Images whose sides are no multiples of the patch size are padded at their right and lower edges. Weights are loaded
    from the file, address or folder of a ``Pretrained`` ``init_cfg``, with the checks of every other backbone; without
    one they have the model's own initialisation. The hub is never contacted, unless ``config`` is the name of a model
    there and ``allow_download`` is set, and then for the config alone.

    Args:
        config: the model's config: a dict with ``model_type``, such as ``dict(model_type='dinov2', hidden_size=384,
            num_attention_heads=6)``, the path of a ``config.json`` or of a folder with one, or the name of a model on
            the hub.
        out_indices: the layers of a plain transformer, or the stages of a hierarchical model, whose maps are the
            outputs, counted from 0; a negative index counts from the end.
        with_cp: checkpoint the activations of every block, if the model can do so.
        allow_download: fetch the config of a name that is no path from the hub.
        init_cfg: the initialisation config of mmengine's BaseModule.

    Raises:
        ConfigError: if transformers is not installed, has no such backbone or refuses the config, if ``out_indices``
            are not indices of its layers, or the model has no activation checkpoints. ``forward`` raises it for an
            image of a size that the model cannot take.
    """

    @checked
    def __init__(
        self,
        config: dict[str, Any] | str,
        out_indices: Sequence[int] = (-1,),
        with_cp: bool = False,
        allow_download: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        given = show(config)
        config = _read_config(config, allow_download)
        self.out_indices = _stages(config, out_indices, given)
        self.hf_model = _build(config, self.out_indices, given)
        self.patch_stride = _pair(getattr(config, 'patch_stride', None) or getattr(config, 'patch_size', 1))
        if with_cp:
            if not self.hf_model.supports_gradient_checkpointing:
                raise ConfigError(f'with_cp=True: {type(self.hf_model).__name__} has no activation checkpoints.')
            self.hf_model.gradient_checkpointing_enable(dict(use_reentrant=False))

    def init_weights(self) -> None:
        """Load the file of a ``Pretrained`` ``init_cfg``; without one the weights stay as the model was built."""
        pretrained = pretrained_file(self)
        if pretrained is not None:
            load_pretrained(self, **pretrained)
        elif self.init_cfg:
            super().init_weights()
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``(B, 3, H, W)`` to one map ``(B, C, h, w)`` for each of ``out_indices``."""
        config = self.hf_model.config
        if config.model_type in FIXED_SIZE and tuple(x.shape[-2:]) != _pair(config.image_size):
            raise ConfigError(
                f'{type(self.hf_model).__name__} takes images of {_pair(config.image_size)} alone, the image_size of '
                f'its config, and not of {tuple(x.shape[-2:])}.'
            )
        height, width = (-side % stride for side, stride in zip(x.shape[-2:], self.patch_stride, strict=True))
        if height or width:
            x = F.pad(x, (0, width, 0, height))
        return tuple(self.hf_model(x).feature_maps)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def _transformers() -> Any:
    try:
        import transformers  # an extra, which takes seconds to import
    except ImportError as error:
        raise ConfigError(f"HFBackbone needs transformers: pip install 'mona_mm[transformers]' ({error}).") from error
    return transformers


def _read_config(config: dict[str, Any] | str, allow_download: bool) -> Any:
    auto_config, given = _transformers().AutoConfig, show(config)
    if isinstance(config, str):
        is_local = Path(config).exists()
        if not is_local and not allow_download:
            raise ConfigError(
                f'HFBackbone: config={given} is no file or folder here. Name a folder with a config.json, give the '
                "config as a dict with its model_type, or set allow_download=True to ask Hugging Face's hub for it."
            )
        read, arguments = auto_config.from_pretrained, dict(local_files_only=is_local)
        positional = (config,)
    else:
        read, arguments, positional = auto_config.for_model, dict(config), ()
        if not isinstance(config.get('model_type'), str):
            raise ConfigError(f"HFBackbone: config={given} needs a model_type, such as model_type='dinov2'.")
    try:
        return read(*positional, **arguments)
    except Exception as error:  # transformers validates configs in many ways
        raise ConfigError(f'HFBackbone: transformers refuses config={given} ({_line(error)}).') from error


def _stages(config: Any, out_indices: Sequence[int], given: str) -> tuple[int, ...]:
    """The indices of layers or stages, from 0 and in order. transformers counts the stem as well."""
    names = getattr(config, 'stage_names', None)
    if not names:
        raise ConfigError(
            f'HFBackbone: transformers has no backbone for config={given}. AutoBackbone lists those that it has.'
        )
    count = len(names) - 1
    stages = [index + count if index < 0 else index for index in out_indices]
    if not stages or stages != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < count:
        raise ConfigError(
            f'HFBackbone: out_indices={show(tuple(out_indices))} must be different indices of the {count} layers or '
            f'stages of {config.model_type}, in order, from 0 to {count - 1}.'
        )
    return tuple(stages)


def _build(config: Any, out_indices: Sequence[int], given: str) -> Any:
    config.out_features = [config.stage_names[index + 1] for index in out_indices]
    config.reshape_hidden_states = True
    try:
        return _transformers().AutoBackbone.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers validates configs in many ways
        raise ConfigError(f'HFBackbone: transformers cannot build config={given} ({_line(error)}).') from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {" ".join(lines)}'[:400]
