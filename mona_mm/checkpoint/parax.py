"""Convert the names of the published ParaX code, in its Swin and its ConvNeXt, to those of this package.

Its Swin has Microsoft's names and its ConvNeXt the official ones. The names of a host are converted beside the host,
see :mod:`mona_mm.hosts.swin` and :mod:`mona_mm.hosts.convnext`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from mona_mm.hosts.formats import END, put

FORMATS = ('swin', 'convnext')
"""The formats of checkpoints in which ParaX was published."""

NAMES = (
    r'.*\.peft\.post_(attn|ffn)\.('
    rf'(norm|opening|closing|router\.[02]|mixing|project)\.{END}'
    r'|norm_scale|chain|(residual_)?(scale|bias)|pool\.(down|up|filters\.\d+))'
)
"""A regular expression for the names of the tensors of a ParaX in this package."""

_SITES = {'adapter1': 'post_attn', 'adapter2': 'post_ffn', 'adapter': 'post_ffn'}
_PARTS = {
    'norm_gamma': 'norm_scale',
    'dwconv1': 'opening',
    'dwconv2': 'closing',
    'attn.0': 'mixing',
    'conv_res_scale': 'chain',
    'proj': 'project',
    'layer_scale': 'scale',
    'layer_bias': 'bias',
    'res_scale': 'residual_scale',
    'res_bias': 'residual_bias',
}
_MODULE = re.compile(r'((?:layers|stages)\.(\d+)\..*)\.(adapter[12]?)\.(.+)')
_POOL = re.compile(r'peft_params\.(\d+)\.(?:proj([AB])|conv(\d+)x\3)_params')


def convert_parax(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the modules, pools and output norms of the published ParaX to the names of this package; other names stay.

    The pool of a stage gets a name for each of its modules. Filters are numbered by ascending kernel size, as all
    published configs have them. A temperature of the router, whose exponential is a factor on the router's output,
    becomes a factor on the router's last layer.

    Raises:
        CheckpointMismatchError: if two tensors would get the same name.
    """
    modules: dict[str, list[str]] = {}
    pools: dict[str, dict[str, Tensor]] = {}
    converted: dict[str, Tensor] = {}
    temperatures: dict[str, Tensor] = {}
    for source, tensor in tensors.items():
        if module := _MODULE.fullmatch(source):
            block, stage, adapter, part = module.groups()
            path = f'{block}.peft.{_SITES[adapter]}'
            if path not in modules.setdefault(stage, []):
                modules[stage].append(path)
            if part == 'logit_scale':
                temperatures[path] = tensor
            else:
                put(converted, f'{path}.{_part(part)}', tensor, source)
        elif pool := _POOL.fullmatch(source):
            pools.setdefault(pool[1], {})[pool[2] or pool[3]] = tensor
        else:
            put(converted, re.sub(r'^extra_norm\.?(\d)', r'norm\1', source), tensor, source)
    for path, temperature in temperatures.items():
        if temperature.any():
            _scale_router(converted, path, temperature.exp())
    for stage, pool in pools.items():
        for path in modules.get(stage, ()):
            converted.update({f'{path}.pool.{name}': tensor for name, tensor in _experts(pool).items()})
    return converted


def _part(name: str) -> str:
    """The name in this package of a part of a published module."""
    return next((new + name[len(old) :] for old, new in _PARTS.items() if f'{name}.'.startswith(f'{old}.')), name)


def _experts(pool: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a pool by their names in this package, given those down by ``'A'``, those up by ``'B'``, and the
    filters ``(M, r, 1, k, k)`` by their kernel size."""
    sizes = sorted((size for size in pool if size.isdecimal()), key=int)
    names = {'A': 'down', 'B': 'up', **{size: f'filters.{i}' for i, size in enumerate(sizes)}}
    return {names[key]: tensor.squeeze(2) if key in sizes else tensor for key, tensor in pool.items()}


def _scale_router(converted: dict[str, Tensor], path: str, factors: Tensor) -> None:
    """Multiply the rows of each kind of expert in the last layer of a router by a factor of its own, in place."""
    for name in (f'{path}.router.2.weight', f'{path}.router.2.bias'):
        if name in converted:
            rows = converted[name].unflatten(0, (len(factors), -1))
            converted[name] = (rows * factors.view(-1, *[1] * (rows.dim() - 1))).flatten(0, 1)
