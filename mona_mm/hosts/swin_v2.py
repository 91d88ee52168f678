"""SwinV2: the norms come last in the branches, and the attention reads the weight of qkv without calling the layer."""

from torch import Tensor

from mona_mm.hosts.block import PeftBlock
from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import BlockSpec, Branch, Grid, GridArgument, Host, Linear, register_host, separate_linears
from mona_mm.hosts.swin import CHECKPOINTS


class SwinV2Block(PeftBlock):
    """The forward of a SwinV2 block, with sites. Every few blocks of the largest models end with a third norm."""

    def forward_with_sites(self, x: Tensor, hw_shape: Grid) -> Tensor:
        """Map ``(B, H*W, C)`` on the grid ``hw_shape`` to ``(B, H*W, C)``."""
        residual = self.apply_at('post_attn', x + self.norm1(self.attend(x, hw_shape)))
        x = residual + self.norm2(self.ffn(residual))
        x = self.apply_at('post_ffn', self.add_parallel_ffn(x, residual))
        return self.norm3(x) if self.extra_norm else x


register_host(
    'mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2',
    Host(
        specs=(
            BlockSpec(
                cls='mmpretrain.models.backbones.swin_transformer_v2.SwinBlockV2',
                mixin=SwinV2Block,
                linears=dict(
                    q=Linear('attn.w_msa.qkv.weight', 'attn.w_msa.q_bias', 0, is_called=False),
                    k=Linear('attn.w_msa.qkv.weight', None, 1, is_called=False),
                    v=Linear('attn.w_msa.qkv.weight', 'attn.w_msa.v_bias', 2, is_called=False),
                    **separate_linears(proj='attn.w_msa.proj'),
                    **FFN_LINEARS,
                ),
                branches=dict(attn=Branch('attn.drop', 'norm1'), ffn=Branch('ffn.dropout_layer', 'norm2')),
                grid=GridArgument(('hw_shape',)),
                uncalled=('attn.w_msa.qkv',),
            ),
        ),
        **CHECKPOINTS,
    ),
)
