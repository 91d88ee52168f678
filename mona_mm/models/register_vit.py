"""A plain vision transformer with register tokens."""

import torch
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn


class RegisterViT(VisionTransformer):
    """mmpretrain's VisionTransformer with register tokens between the class token and the patch tokens.

    Registers have no position embedding, and only the output type ``'raw'`` includes them.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024.

    Args:
        num_registers: the number of register tokens.
        options: the arguments of mmpretrain's VisionTransformer.
    """

    def __init__(self, num_registers: int = 0, **options) -> None:
        super().__init__(**options)
        self.num_registers = num_registers
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, self.embed_dims))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images ``(B, 3, H, W)`` to the outputs of the layers in ``out_indices``, in the form of ``out_type``."""
        batch = x.shape[0]
        x, hw = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1)
        x = x + resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            hw,
            mode=self.interpolate_mode,
            num_extra_tokens=self.num_extra_tokens,
        )
        if self.num_registers:
            first, patches = x.split((self.num_extra_tokens, x.shape[1] - self.num_extra_tokens), dim=1)
            x = torch.cat((first, self.register_tokens.expand(batch, -1, -1), patches), dim=1)
        x = self.pre_norm(self.drop_after_pos(x))
        outs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == len(self.layers) - 1 and self.final_norm:
                x = self.ln1(x)
            if index in self.out_indices:
                outs.append(self._format_output(x, hw))
        return tuple(outs)

    def _format_output(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.num_registers and self.out_type != 'raw':
            first, _, patches = x.split((self.num_extra_tokens, self.num_registers, hw[0] * hw[1]), dim=1)
            x = torch.cat((first, patches), dim=1)
        return super()._format_output(x, hw)
