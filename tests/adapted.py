"""Small hosts with every kind of method in them, for what has to hold of all pairs."""

import torch
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from mona_mm.backbone import PeftBackbone
from mona_mm.spt.sparse import attach_sparse

HOSTS = {
    'Swin': dict(
        type='mmdet.SwinTransformer',
        embed_dims=16,
        depths=[2, 1],
        num_heads=[1, 2],
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
    ),
    'ViT': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=32, num_layers=2, num_heads=4, feedforward_channels=64),
        img_size=64,
        patch_size=8,
        out_type='raw',
    ),
    'SwinV2': dict(
        type='mmpretrain.SwinTransformerV2',
        arch=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], extra_norm_every_n_blocks=0),
        img_size=64,
        window_size=4,
        pad_small_map=True,
        out_indices=(0, 1, 2, 3),
    ),
    'ConvNeXt': dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 32, 64]),
        gap_before_final_norm=False,
        out_indices=(0, 1, 2, 3),
    ),
    'PVTv2': dict(
        type='mmdet.PyramidVisionTransformerV2', embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]
    ),
}
METHODS = {
    'Mona': dict(type='Mona', bottleneck=4),
    'Mona in the branches': dict(type='Mona', bottleneck=4, sites=['ffn_branch', 'ffn_out', 'parallel_ffn']),
    'LoRA': dict(type='LoRA', rank=4),
    'DoRA': dict(type='DoRA', rank=4, init='minor'),
    'Adapter': dict(type='Adapter', bottleneck=4),
    'AdaptFormer': dict(type='AdaptFormer', bottleneck=4),
    'LoRand': dict(type='LoRand', inner=4),
    'CoLin': dict(type='CoLin', bottleneck=8, rank=4),
    'Rein': dict(type='Rein', num_tokens=8, rank=4),
    'single weights': dict(type='LoRA', rank=4, sites=['fc1']),
}
PAIRS = [(host, method) for host in HOSTS for method in METHODS]
COVER = [
    (host, method)
    for host, method in PAIRS
    if host == 'Swin'
    or method in ('LoRA', 'single weights')
    or (host, method) in (('ViT', 'Mona'), ('PVTv2', 'Adapter'))
]
"""Every host and every method, and all pairs of those that read or change weights: for what takes seconds a pair."""


def adapted(host: str, method: str, **options) -> nn.Module:
    """A backbone with a method whose values are not those it begins with, in evaluation."""
    peft = dict(METHODS[method])
    if host == 'ConvNeXt' and method in ('LoRA', 'DoRA'):
        peft['sites'] = ['fc1', 'fc2']
    with DefaultScope.overwrite_default_scope(HOSTS[host]['type'].split('.')[0]):
        init_default_scope(HOSTS[host]['type'].split('.')[0])
        model = PeftBackbone(HOSTS[host], peft, **options)
    if method == 'single weights':  # of every kind of module: linears, norms, convolutions, tables
        for path, module in list(model.named_modules()):
            if '.peft' in path or '.cpb_mlp' in path or not path or hasattr(module, 'peft'):
                continue
            for name, p in list(module._parameters.items()):
                if p is not None and p.numel() >= 8:
                    attach_sparse(module, torch.arange(0, p.numel(), 3), name)
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1 + 0.5 * (p.dim() == 1))
    return model.eval()


def image(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_close(outputs, expected, tolerance: float = 1e-5) -> None:
    """Equal tensors, relative to each one's largest value."""
    for out, other in zip(outputs, expected, strict=True):
        assert out.shape == other.shape
        assert (out - other).abs().max() <= tolerance * other.abs().max()
