"""Names and layouts of published checkpoints, turned into those of the OpenMMLab backbones."""

import re
from collections.abc import Mapping

from torch import Tensor

# Microsoft's Swin and the published Mona code share these names; in order, on the part after `layers.I.`.
_SWIN_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'\.attn\.(qkv|proj|relative_position_bias_table|relative_position_index)', r'.attn.w_msa.\1'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)
_MONA_RENAMES = (
    (r'\.my_module_1\.', '.peft.post_attn.'),
    (r'\.my_module_2\.', '.peft.post_ffn.'),
    (r'\.project1\.', '.down.'),
    (r'\.project2\.', '.up.'),
    (r'\.adapter_conv\.conv1\.', '.depthwise.0.'),
    (r'\.adapter_conv\.conv2\.', '.depthwise.1.'),
    (r'\.adapter_conv\.conv3\.', '.depthwise.2.'),
    (r'\.adapter_conv\.projector\.', '.pointwise.'),
)
# What a classifier holds beyond the backbone, and masks that every library recomputes.
_NOT_IN_A_BACKBONE = re.compile(r'^(head\.|norm\.|.*\.attn_mask$)')


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and re-order a Swin checkpoint of a known format for the mmdet, mmseg and mmpretrain backbones.

    The format is recognised from the keys: Microsoft's Swin (``layers.I.blocks.J.attn.qkv``) and the published Mona
    code (the same, with ``my_module_1`` and ``my_module_2``). Anything else is returned with its names unchanged. A
    checkpoint may be the whole file (``{'model': ...}``, ``{'state_dict': ...}``) or the tensors alone, of a backbone
    or of a detector (``backbone.*``, of which only the backbone is returned).

    Args:
        state_dict: names to tensors, in the checkpoint's own names.

    Returns:
        A new dict with the names of the OpenMMLab backbone; the tensors are not copied unless re-ordered.
    """
    tensors = backbone_tensors(state_dict)
    # mmpretrain's ViT also begins with `layers.`, but has no blocks below.
    if not any(re.match(r'layers\.\d+\.blocks\.', name) for name in tensors):
        return tensors
    converted = {}
    for name, tensor in tensors.items():
        if _NOT_IN_A_BACKBONE.match(name):
            continue
        if '.downsample.' in name:
            tensor = _reorder_neighbours(tensor)
        for pattern, replacement in (*_SWIN_RENAMES, *_MONA_RENAMES):
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted


def backbone_tensors(checkpoint: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, without wrappers, and of a whole model only its ``backbone.``."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    tensors = {name.removeprefix('module.'): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    inner = {name.removeprefix('backbone.'): t for name, t in tensors.items() if name.startswith('backbone.')}
    return inner or tensors


def _reorder_neighbours(tensor: Tensor) -> Tensor:
    """From the published order of the four merged neighbours' channels to mmdet's.

    ``(..., 4C)`` holds the neighbours (0,0), (1,0), (0,1), (1,1) one after another; ``nn.Unfold`` in mmdet's
    PatchMerging yields them per channel, row by row: ``(..., C, 4)`` with (0,0), (0,1), (1,0), (1,1).
    """
    neighbours = tensor.unflatten(-1, (4, -1))  # (..., 4, C)
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()
