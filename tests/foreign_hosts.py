"""Small configs of timm's and Hugging Face's models as backbones."""

import copy
from collections.abc import Iterable
from importlib.util import find_spec

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

INSTALLED = {library: find_spec(library) is not None for library in ('timm', 'transformers')}

_PLAIN = dict(embed_dim=24, depth=2, num_heads=2, img_size=64, patch_size=16, out_indices=(0, 1))
_WIDTHS = dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2))


def _timm(name: str, library: str = 'mmpretrain', **options) -> dict:
    return dict(type=f'{library}.TIMMBackbone', model_name=name, features_only=True, pretrained=False, **options)


TIMM = {
    'timm-vit': _timm('vit_small_patch16_224', **_PLAIN),
    'timm-vit-registers': _timm(
        'vit_small_patch14_reg4_dinov2', 'mmseg', dynamic_img_size=True, dynamic_img_pad=True, **_PLAIN
    ),
    'timm-eva02': _timm('eva02_tiny_patch14_224', 'mmseg', **_PLAIN),
    'timm-eva02-separate': _timm('eva02_base_patch14_224', **_PLAIN),
    'timm-dinov3': _timm('vit_small_patch16_dinov3', dynamic_img_pad=True, **_PLAIN),
    'timm-dinov3-plus': _timm('vit_small_plus_patch16_dinov3', 'mmseg', dynamic_img_pad=True, **_PLAIN),
    'timm-beit': _timm('beit_base_patch16_224', 'mmseg', **_PLAIN),
    'timm-swin': _timm(
        'swin_tiny_patch4_window7_224',
        img_size=64,
        window_size=4,
        embed_dim=8,
        depths=(2, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        strict_img_size=False,
        feature_cls='getter',
    ),
    'timm-swin-list': _timm(
        'swin_tiny_patch4_window7_224',
        'mmseg',
        img_size=64,
        window_size=4,
        embed_dim=8,
        depths=(2, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        strict_img_size=False,
    ),
    'timm-convnext': _timm('convnext_tiny', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), ls_init_value=0.5),
    'timm-convnextv2': _timm('convnextv2_tiny', 'mmseg', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=True),
    'timm-hiera': _timm('hiera_tiny_224', embed_dim=8, stages=(1, 1, 1, 1), img_size=(64, 64)),
    'timm-pvt': _timm('pvt_v2_b0', 'mmseg', **_WIDTHS),
    'timm-focalnet': _timm('small_focalnet'),
    'timm-caformer': _timm('small_caformer', 'mmseg'),
}
"""timm's models, small ones by options or below."""

_LAYERS = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
_STAGES = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])


def _hugging_face(model_type: str, out_indices=(0, 1), **options) -> dict:
    return dict(type='mona_mm.HFBackbone', config=dict(model_type=model_type, **options), out_indices=out_indices)


HUGGING_FACE = {
    'hf-dinov2': _hugging_face('dinov2', mlp_ratio=2, **_LAYERS),
    'hf-dinov2-swiglu': _hugging_face('dinov2', use_swiglu_ffn=True, **_LAYERS),
    'hf-dinov2-registers': _hugging_face('dinov2_with_registers', mlp_ratio=2, **_LAYERS),
    'hf-dinov3': _hugging_face('dinov3_vit', intermediate_size=48, num_register_tokens=4, **_LAYERS),
    'hf-dinov3-plus': _hugging_face('dinov3_vit', intermediate_size=48, use_gated_mlp=True, **_LAYERS),
    'hf-swin': _hugging_face(
        'swin', (0, 1, 2, 3), embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64
    ),
    'hf-convnext': _hugging_face('convnext', (0, 1, 2, 3), layer_scale_init_value=0.5, **_STAGES),
    'hf-convnextv2': _hugging_face('convnextv2', (0, 1, 2, 3), **_STAGES),
    'hf-dinov3-convnext': _hugging_face('dinov3_convnext', (0, 1, 2, 3), layer_scale_init_value=0.5, **_STAGES),
    'hf-hiera': _hugging_face(
        'hiera', (0, 1, 2, 3), embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=[64, 64]
    ),
}
"""transformers' models, small ones by their configs."""

FOREIGN = {**TIMM, **HUGGING_FACE}

FIXED_SIZE = ('timm-vit', 'timm-eva02', 'timm-eva02-separate', 'timm-beit', 'timm-hiera', 'hf-hiera')
"""Those that take images of one size alone."""


def installed(name: str):
    """The mark that skips a test of a model of a library that is not installed."""
    library = 'timm' if name.startswith('timm') else 'transformers'
    return pytest.mark.skipif(not INSTALLED[library], reason=f'{library} is not installed')


def register_small_models() -> None:
    """Add small forms of models whose own functions fix their depths to timm's registry."""
    from timm.models import focalnet, is_model, metaformer, register_model

    def small_focalnet(pretrained=False, **kwargs):
        options = dict(depths=(1, 1, 1, 1), embed_dim=8, layerscale_value=0.5)
        return focalnet._create_focalnet('focalnet_tiny_srf', pretrained=pretrained, **options, **kwargs)

    def small_caformer(pretrained=False, **kwargs):
        options = dict(depths=[1, 1, 2, 1], dims=[32, 32, 64, 64], layer_scale_init_values=[None, 0.5, 0.5, None])
        mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
        norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
        return metaformer._create_metaformer(
            'caformer_s18', pretrained=pretrained, token_mixers=mixers, norm_layers=norms, **options, **kwargs
        )

    for module, function in ((focalnet, small_focalnet), (metaformer, small_caformer)):
        if not is_model(function.__name__):
            function.__module__ = module.__name__
            register_model(function)


def build(base: dict, **more) -> nn.Module:
    """A stock backbone in evaluation."""
    model = MODELS.build({**copy.deepcopy(base), **more})
    model.eval()  # mmpretrain's returns nothing
    return model


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> None:
    """Give a model values that no initialisation gives, so that what is not loaded or copied shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def names(chosen: Iterable[str], common: Iterable[str] | None = None) -> list:
    """Names as parameters of a test, which skips where a model's library is not installed.

    Args:
        chosen: The names.
        common: Those that `make test` has, if not all; `make test-all` has the others as well.
    """
    return [
        pytest.param(name, marks=[installed(name), *([] if common is None or name in common else [pytest.mark.slow])])
        for name in chosen
    ]
