"""The plain vision transformers of mmpretrain (with SAM's) and mmseg, and the checkpoints of mmpretrain's ViT."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mona_mm.hosts.block import PeftBlock
from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.formats import END, CheckpointFormat, OwnNames, put, rename
from mona_mm.hosts.host import (
    MMCV_BRANCHES,
    REFUSED,
    TORCH_ATTENTION,
    TORCH_UNCALLED,
    BlockSpec,
    Branch,
    Grid,
    GridSource,
    Host,
    fused_qkv,
    register_host,
    separate_linears,
)


class ViTBlock(PeftBlock):
    """The forward of a ViT layer, with sites. Class and register tokens come before those of the grid."""

    def forward_with_sites(self, x: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)``."""
        residual = self.apply_at('post_attn', x + self.attend(self.norm1(x)))
        x = self.ffn(self.norm2(residual), identity=residual)
        return self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))


def _last_output(backbone: nn.Module, x: Tensor, hw: Grid) -> Tensor:
    return backbone._format_output(backbone.ln1(x) if backbone.final_norm else x, hw)


def convert_vit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's ViT, MAE (without its decoder), MoCo v3 (its encoder) and DINOv2 to mmpretrain's names.

    DINOv2 may be Meta's or timm's. Where there are registers, timm has added the position of the class token to that
    token and keeps none for it. Its SwiGLU is an ``fc1`` of twice the width. Meta's training code puts the blocks into
    groups, ``blocks.GROUP.BLOCK.``, where the numbers of the blocks go on.
    """
    tensors = rename(tensors, ((r'^blocks\.\d+\.(?=\d+\.)', 'blocks.'),))
    renames = (
        (r'^norm\.', 'ln1.'),
        (r'^fc_norm\.', 'ln2.'),
        (r'^norm_pre\.', 'pre_norm.'),
        (r'^reg_token$', 'register_tokens'),
        (r'^blocks\.(\d+)\.norm(\d)\.', r'layers.\1.ln\2.'),
        (r'^blocks\.', 'layers.'),
        (r'\.mlp\.(w12|w3)\.', r'.ffn.\1.'),
        *_feed_forward(tensors, 'blocks.0.mlp.fc1.weight', 'blocks.0.mlp.fc2.weight'),
        (r'\.ls1\.gamma$', '.attn.gamma1.weight'),
        (r'\.ls2\.gamma$', '.ffn.gamma2.weight'),
        (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    )
    return _with_place_of_class_token(rename(tensors, renames))


def _feed_forward(tensors: Mapping[str, Tensor], first: str, second: str) -> tuple[tuple[str, str], ...]:
    """The renames of an FFN's two linear layers, whose weights have the names ``first`` and ``second``.

    It is a SwiGLU if the first layer has twice as many outputs as the second has inputs.
    """
    is_swiglu = first in tensors and second in tensors and len(tensors[first]) == 2 * tensors[second].shape[1]
    names = ('.ffn.w12.', '.ffn.w3.') if is_swiglu else ('.ffn.layers.0.0.', '.ffn.layers.1.')
    return (r'\.mlp\.(?:fc1|weights_in)\.', names[0]), (r'\.mlp\.(?:fc2|weights_out)\.', names[1])


def _with_place_of_class_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a zero position for the class token first, where a checkpoint with registers has none for it."""
    positions = tensors.get('pos_embed')
    if (
        positions is not None
        and 'register_tokens' in tensors
        and int(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]
    ):
        tensors['pos_embed'] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    return tensors


def convert_vit_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Hugging Face's DINOv2 to mmpretrain's names. Its queries, keys and values are three linear layers."""
    tensors = {name.removeprefix('dinov2.').removeprefix('dinov2_with_registers.'): t for name, t in tensors.items()}
    layer = 'encoder.layer.0.mlp.'
    first, second = (f'{layer}{name}.weight' for name in ('weights_in', 'weights_out'))
    renames = (
        (r'^layernorm\.', 'ln1.'),
        (r'^embeddings\.(cls_token|register_tokens)$', r'\1'),
        (r'^embeddings\.position_embeddings$', 'pos_embed'),
        (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.projection.'),
        (r'^encoder\.layer\.(\d+)\.norm(\d)\.', r'layers.\1.ln\2.'),
        (r'^encoder\.layer\.', 'layers.'),
        (r'\.attention\.attention\.(query|key|value)\.', r'.attn.\1.'),
        (r'\.attention\.output\.dense\.', '.attn.proj.'),
        (r'\.layer_scale1\.lambda1$', '.attn.gamma1.weight'),
        (r'\.layer_scale2\.lambda1$', '.ffn.gamma2.weight'),
        *_feed_forward(tensors, first, second),
    )
    return _join_qkv(rename(tensors, renames))


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the weights, or biases, of query, key and value into one tensor where all three are there."""
    for name in [name for name in tensors if '.attn.query.' in name]:
        parts = [name.replace('query', part) for part in ('query', 'key', 'value')]
        if all(part in tensors for part in parts):  # else the names that are there will not be known
            tensors[name.replace('query', 'qkv')] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def convert_vit_npz(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Google's ViT to mmpretrain's names and layouts.

    Its kernels are ``(in, out)``, those of the attention ``(width, heads, head width)``, and that of the patch
    embedding HWIO.
    """
    converted: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        name, tensor = source, _npz_layout(source, tensor)
        name = re.sub(r'^Transformer/encoderblock_(\d+)/', r'layers.\1.', name)
        for old, new in _NPZ_NAMES:
            name = name.replace(old, new)
        put(converted, 'cls_token' if name == 'cls' else name, tensor, source)
    return _join_qkv(converted)


_NPZ_NAMES = (
    ('LayerNorm_0/', 'ln1.'),
    ('LayerNorm_2/', 'ln2.'),
    ('MultiHeadDotProductAttention_1/out/', 'attn.proj.'),
    ('MultiHeadDotProductAttention_1/', 'attn.'),
    ('MlpBlock_3/Dense_0/', 'ffn.layers.0.0.'),
    ('MlpBlock_3/Dense_1/', 'ffn.layers.1.'),
    ('Transformer/encoder_norm/', 'ln1.'),
    ('Transformer/posembed_input/pos_embedding', 'pos_embed'),
    ('embedding/', 'patch_embed.projection.'),
    ('/', '.'),
    ('kernel', 'weight'),
    ('scale', 'weight'),
)


def _npz_layout(name: str, tensor: Tensor) -> Tensor:
    if name == 'cls' or not name.endswith('kernel'):
        # the heads' biases are (heads, head width)
        return tensor.flatten() if name.endswith('bias') else tensor
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    # out is (heads, head width, width), the others are (width, heads, head width)
    matrix = tensor.flatten(0, 1) if '/out/' in name else tensor.flatten(1)
    return matrix.T.contiguous()


_ATTENTION = {**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj')}
_LAYER = dict(
    cls='mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer',
    mixin=ViTBlock,
    branches=dict(attn=Branch('attn.out_drop'), ffn=Branch('ffn.dropout_layer')),
    grid=GridSource('patch_embed'),
)

register_host(
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer',
    Host(
        specs=(
            BlockSpec(has='ffn.layers', linears={**_ATTENTION, **FFN_LINEARS}, **_LAYER),
            BlockSpec(has='ffn.w12', linears={**_ATTENTION, **separate_linears(fc1='ffn.w12', fc2='ffn.w3')}, **_LAYER),
        ),
        last_output=_last_output,
        own_names=OwnNames(
            in_blocks=rf'layers\.\d+\.(ln[12]\.{END}|ffn\.(layers\.(0\.0|1)|w12|w3)\.{END}|attn\.(qkv|proj)\.{END}'
            r'|attn\.gamma1\.weight|ffn\.gamma2\.weight)',
            outside=rf'cls_token|register_tokens|pos_embed|(pre_norm|ln[12])\.{END}|patch_embed\.(projection|norm)\.{END}',
        ),
        formats=(
            CheckpointFormat(
                name='vit',
                recognised_by=r'blocks\.\d+\.(\d+\.)?attn\.',
                convert=convert_vit,
                # heads, and MAE's decoder and mask token
                left_out=r'head|pre_logits\.|decoder|mask_token$',
            ),
            CheckpointFormat(
                name='vit-huggingface',
                recognised_by=r'(dinov2\.|dinov2_with_registers\.)?encoder\.layer\.\d+\.attention\.attention\.query\.',
                convert=convert_vit_huggingface,
                left_out=r'(.*\.)?mask_token$|classifier\.',
            ),
            CheckpointFormat(
                name='vit-npz',
                recognised_by=r'Transformer/encoderblock_\d+/',
                convert=convert_vit_npz,
                left_out=r'(head|pre_logits)/|opt',  # heads, and the state of the optimizer
            ),
        ),
        position_tables=('pos_embed',),
        final_norms=('ln1', 'ln2'),  # its published selection holds the final norm
    ),
)

register_host(
    'mmseg.models.backbones.vit.VisionTransformer',
    Host(
        specs=(
            BlockSpec(
                cls='mmseg.models.backbones.vit.TransformerEncoderLayer',
                linears={**TORCH_ATTENTION, **FFN_LINEARS},
                branches=MMCV_BRANCHES,
                mid_norm='ln2',
                grid=GridSource('patch_embed'),
                uncalled=TORCH_UNCALLED,
            ),
        ),
        reads_checkpoint=True,
        position_tables=('pos_embed',),
    ),
)

register_host(
    'mmpretrain.models.backbones.vit_sam.ViTSAM',
    Host(
        specs=(
            BlockSpec(
                cls='mmpretrain.models.backbones.vit_sam.TransformerEncoderLayer',
                linears={**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS},
                branches=dict(ffn=Branch('ffn.dropout_layer')),  # the attention branch ends in window layout
                mid_norm='ln2',
                layout='BHWC',
            ),
        ),
        position_tables=('pos_embed', 'rel_pos_h', 'rel_pos_w'),
        not_selected=('rel_pos',),
    ),
)

REFUSED['mmpretrain.models.backbones.deit3.DeiT3'] = (
    'its layers call the norm `ln1` before both branches and `ln2` never, so that no place in them is behind the '
    'attention alone'
)
