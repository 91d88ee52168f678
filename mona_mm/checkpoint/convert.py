"""Names and layouts of published checkpoints, turned into those of the OpenMMLab backbones."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Microsoft's Swin and the published Mona code share these names; in order, on the part after `layers.I.`.
_SWIN_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'\.attn\.(qkv|proj|relative_position_bias_table|relative_position_index)', r'.attn.w_msa.\1'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
_MODULE_RENAMES = (
    (r'(\.peft\.\w+)\.(norm\.|gamma)', r'\1.entrance.\2'),
    (r'\.project1\.', '.down.'),
    (r'\.project2\.', '.up.'),
    (r'\.adapter_conv\.conv1\.', '.depthwise.0.'),
    (r'\.adapter_conv\.conv2\.', '.depthwise.1.'),
    (r'\.adapter_conv\.conv3\.', '.depthwise.2.'),
    (r'\.adapter_conv\.projector\.', '.pointwise.'),
)
# What a classifier holds beyond the backbone, and masks that every library recomputes.
_NOT_IN_A_BACKBONE = re.compile(r'^(head\.|norm\.|.*\.attn_mask$)')


def convert_state_dict(state_dict: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
    """Rename and re-order a Swin checkpoint of a known format for the mmdet, mmseg and mmpretrain backbones.

    The format is recognised from the keys: Microsoft's Swin (``layers.I.blocks.J.attn.qkv``) and the published Mona
    code (the same, with the modules of Mona, Adapter, AdaptFormer, LoRand or LoRA). Anything else is returned with
    its names unchanged. A checkpoint may be the whole file (``{'model': ...}``, ``{'state_dict': ...}``) or the tensors
    alone, of a backbone or of a detector (``backbone.*``, of which only the backbone is returned).

    Args:
        state_dict: names to tensors, in the checkpoint's own names.
        prefix: of the names to take, and to take off; without one, ``backbone.`` is found by itself.

    Returns:
        A new dict with the names of the OpenMMLab backbone; the tensors are not copied unless re-ordered.
    """
    tensors = backbone_tensors(state_dict, prefix)
    # mmpretrain's ViT also begins with `layers.`, but has no blocks below.
    if not any(re.match(r'layers\.\d+\.blocks\.', name) for name in tensors):
        return tensors
    renames = (*_SWIN_RENAMES, *_sites(tensors), *_MODULE_RENAMES)
    converted = {}
    for name, tensor in tensors.items():
        if _NOT_IN_A_BACKBONE.match(name):
            continue
        if '.downsample.' in name:
            tensor = _reorder_neighbours(tensor)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        converted.update(_lora_slices(name, tensor))
    return _stack_factors(converted)


def _sites(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Which sites ``my_module_1`` and ``my_module_2`` stand for: it depends on the method, seen from its other keys."""
    if any('.adapter_conv.' in name for name in tensors):
        sites = ('post_attn', 'post_ffn')  # Mona
    elif any('.param_dict.' in name for name in tensors):
        sites = ('attn_out', 'ffn_out')  # LoRand
    elif any('.my_module_2.' in name for name in tensors):
        sites = ('attn_branch', 'ffn_branch')  # Adapter
    else:
        sites = ('parallel_ffn',)  # AdaptFormer
    return tuple((rf'\.my_module_{i}\.', f'.peft.{site}.') for i, site in enumerate(sites, start=1))


def _lora_slices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Published LoRA keeps q's and v's factors in one tensor, q's rows first."""
    match = re.match(r'(.*\.)attn\.w_msa\.qkv\.lora_([AB])$', name)
    if match is None:
        return {name: tensor}
    block, part = match[1], 'down' if match[2] == 'A' else 'up'
    q, v = tensor.chunk(2)
    return {f'{block}peft.q.{part}.weight': q, f'{block}peft.v.{part}.weight': v}


def _stack_factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published LoRand numbers its factors (``param_dict.A0``, ``g0``, ``B0``, ...); ours are one tensor a kind."""
    pattern = re.compile(r'(.*\.)?param_dict\.([AgGB])(\d+)$')
    stacks: dict[str, dict[int, Tensor]] = {}
    for name in [name for name in tensors if pattern.match(name)]:
        path, kind, index = pattern.match(name).groups()
        stacks.setdefault(f'{path or ""}{kind.lower()}', {})[int(index)] = tensors.pop(name)
    tensors.update({name: torch.stack([of[i] for i in sorted(of)]) for name, of in stacks.items()})
    return tensors


def backbone_tensors(checkpoint: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappers, and of a whole model only those under ``prefix``."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    tensors = {name.removeprefix('module.'): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    start = f'{(prefix or "backbone").rstrip(".")}.'
    inner = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return inner if inner or prefix else tensors


def _reorder_neighbours(tensor: Tensor) -> Tensor:
    """From the published order of the four merged neighbours' channels to mmdet's.

    ``(..., 4C)`` holds the neighbours (0,0), (1,0), (0,1), (1,1) one after another; ``nn.Unfold`` in mmdet's
    PatchMerging yields them per channel, row by row: ``(..., C, 4)`` with (0,0), (0,1), (1,0), (1,1).
    """
    neighbours = tensor.unflatten(-1, (4, -1))  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()
