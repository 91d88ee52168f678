"""Twins: PCPVT and SVT of mmpretrain and mmseg, whose attention is either global over fewer keys or within windows."""

from mona_mm.hosts.ffn import FFN_LINEARS
from mona_mm.hosts.host import (
    SHARED_DROP_PATH,
    TORCH_ATTENTION,
    TORCH_UNCALLED,
    BlockSpec,
    GridArgument,
    Host,
    Linear,
    fused_qkv,
    register_host,
    separate_linears,
)

_COMMON = dict(
    branches=SHARED_DROP_PATH,
    mid_norm='norm2',
    grid=GridArgument(('hw_shape',)),
)
_KEYS_AND_VALUES = dict(
    k=Linear('attn.kv.weight', 'attn.kv.bias', 0, num_slices=2),
    v=Linear('attn.kv.weight', 'attn.kv.bias', 1, num_slices=2),
)


def _specs(library: str) -> tuple[BlockSpec, BlockSpec]:
    module = f'{library}.models.backbones.twins'
    if library == 'mmseg':
        global_attention = dict(linears={**TORCH_ATTENTION, **FFN_LINEARS}, uncalled=TORCH_UNCALLED)
    else:
        linears = {**separate_linears(q='attn.q', proj='attn.proj'), **_KEYS_AND_VALUES, **FFN_LINEARS}
        global_attention = dict(linears=linears)
    within_windows = {**fused_qkv('attn.qkv'), **separate_linears(proj='attn.proj'), **FFN_LINEARS}
    return (
        BlockSpec(cls=f'{module}.GSAEncoderLayer', **global_attention, **_COMMON),
        BlockSpec(cls=f'{module}.LSAEncoderLayer', linears=within_windows, **_COMMON),
    )


for _library in ('mmpretrain', 'mmseg'):
    for _name in ('PCPVT', 'SVT'):
        register_host(
            f'{_library}.models.backbones.twins.{_name}',
            Host(specs=_specs(_library), reads_checkpoint=_library == 'mmseg'),
        )
