"""Single layers of any module as places for a method, without a description of the module around them.

A layer is a ``Linear``, a ``Conv2d``, or one of the matrices of torch's ``MultiheadAttention``, which reads its weights
and calls no layer of its own. A method's module stands beside a layer in one of three forms:

==============  ====================================================================================================
linear          a module's ``forward`` adds to the output of a linear layer, or of a 1x1 convolution (with a stride: to
                that of a linear layer on every n-th pixel)
convolution     a module's ``convolve`` adds to the output of any other convolution
weight          ``delta_weight`` is added to the weight before the layer's forward: in attention, in grouped
                convolutions, and for modules without ``convolve``
==============  ====================================================================================================
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mona_mm.hosts.block import PeftBlock, StockLinear, keep_calling
from mona_mm.hosts.host import BlockSpec, Linear, find_host, input_of, is_host
from mona_mm.hosts.inject import Site
from mona_mm.hosts.sites import PeftModules
from mona_mm.nn.mixin import mix_in, qualified_name, stock_class
from mona_mm.nn.substitute import call_substituted

_LINEARS = ('torch.nn.modules.linear.Linear', 'mmcv.cnn.bricks.wrappers.Linear')
_CONVOLUTIONS = ('torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d')
_ATTENTION = 'torch.nn.modules.activation.MultiheadAttention'
_QKV = dict(zip('qkv', range(3), strict=True))


@dataclass(frozen=True)
class Layer:
    """A layer that a method can stand beside.

    Args:
        holder: the module that gets the method's module as a part of its new child ``peft``.
        name: the name of the method's module there.
        linear: the weight of the layer in ``holder``.
    """

    holder: nn.Module
    name: str
    linear: Linear

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the layer; a fused one has the rows of other layers as well."""
        return self.holder.get_parameter(self.linear.weight)

    @property
    def site(self) -> Site:
        """The widths and the size of the layer. The input of a convolution is as wide as a patch."""
        rows = self.linear.rows(self.weight)
        widths = self.weight.shape[1:].numel(), rows.stop - rows.start
        return Site(widths, self.linear.is_called, widths[0] * widths[1])

    @property
    def is_convolution(self) -> bool:
        """Whether its forward is not that of a linear layer on some pixels, but that of a convolution."""
        conv = self.holder
        return isinstance(conv, nn.Conv2d) and not (conv.kernel_size == (1, 1) and set(conv.padding) <= {0})

    @property
    def is_plain(self) -> bool:
        """Whether every output sees all input channels, and nothing but zeros beyond the edges of a map."""
        conv = self.holder
        is_padded_plainly = not self.is_convolution or conv.padding_mode == 'zeros'
        return not isinstance(conv, nn.Conv2d) or (conv.groups == 1 and is_padded_plainly)

    def slices(self, names: tuple[str, ...]) -> list['Layer']:
        """The layers ``'q'``, ``'k'`` or ``'v'`` in a fused ``in_proj_weight``; any other layer has no slices."""
        if self.name != 'in_proj_weight':
            return []
        return [replace(self, name=name, linear=replace(self.linear, slice_index=_QKV[name])) for name in names]

    def by_weight(self) -> 'Layer':
        """The same layer for a module that is to add to its weight."""
        return replace(self, linear=replace(self.linear, is_called=False))


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Find the layers of a model by path; one that is at several paths is there under each.

    The path is that of the ``Linear`` or ``Conv2d``, and in an attention at ``attn`` it is ``attn.in_proj_weight``
    (``attn.q_proj_weight`` and so on where the widths differ) and ``attn.out_proj``. Layers of a method do not count,
    nor do classes with another forward than that of their base, nor parametrized weights.
    """
    return dict(_layers_in('', model))


def _layers_in(path: str, module: nn.Module) -> Iterator[tuple[str, Layer]]:
    if isinstance(module, PeftModules):
        return
    prefix = f'{path}.' if path else ''
    if isinstance(module, nn.MultiheadAttention):
        if _forward_of(module) == _ATTENTION:
            names = ('in_proj_weight', 'q_proj_weight', 'k_proj_weight', 'v_proj_weight')
            for name in names:
                if module._parameters.get(name) is not None:
                    yield f'{prefix}{name}', Layer(module, name, Linear(name, 'in_proj_bias', is_called=False))
            if module.out_proj._parameters.get('weight') is not None:
                linear = Linear('out_proj.weight', 'out_proj.bias', is_called=False)
                yield f'{prefix}out_proj', Layer(module, 'out_proj', linear)
        return
    if _forward_of(module) in (*_LINEARS, *_CONVOLUTIONS) and module._parameters.get('weight') is not None:
        yield path, Layer(module, 'weight', Linear('weight', 'bias'))
    for name, child in module._modules.items():
        if child is not None:
            yield from _layers_in(f'{prefix}{name}', child)


def _forward_of(module: nn.Module) -> str:
    """The qualified name of the class whose forward a module has; empty for a forward of the object itself."""
    owner = next((cls for cls in stock_class(module).__mro__ if 'forward' in vars(cls)), None)
    return '' if owner is None or 'forward' in vars(module) else qualified_name(owner)


def read_past(model: nn.Module) -> set[int]:
    """The ids of the weights of linear layers that the hosts in ``model`` read without calling the layers."""
    return {
        id(block.get_parameter(linear.weight))
        for backbone in model.modules()
        if is_host(backbone)
        for block in find_host(backbone).blocks(backbone).values()
        for linear in find_host(backbone).spec(block).linears.values()
        if not linear.is_called
    }


def weights_with_method(model: nn.Module) -> set[int]:
    """The ids of the weights beside which a method already stands in ``model``."""
    found = {
        id(block.get_parameter(block.spec.linears[site].weight))
        for block in model.modules()
        if isinstance(block, PeftBlock)
        for site in block.peft
        if site in block.spec.linears
    }
    for module in model.modules():
        if isinstance(module._modules.get('peft'), PeftModules) and not isinstance(module, PeftBlock):
            found |= {id(module._parameters.get(name)) for name in module.peft}
    return found


class PeftLayer(PeftBlock):
    """Mixin in front of the class of a layer, or of an attention, that has a method's modules beside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, with the additions to its weights and to its output."""

        def stock(layer: nn.Module) -> Any:
            return super(PeftBlock, layer).forward(*args, **kwargs)

        out = call_substituted(self, self.weights(), stock)
        for name, linear in self.spec.linears.items():
            if linear.is_called:
                x = input_of(args, kwargs)
                out = out + self._addition(self.peft[name], x, out)
        return out

    def _addition(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        stock = StockLinear(self, slice(None))
        if not isinstance(self, nn.Conv2d):
            return module(x, out, stock)
        if Layer(self, 'weight', self.spec.linears['weight']).is_convolution:
            return module.convolve(x, out, stock)
        x = x[..., :: self.stride[0], :: self.stride[1]]
        return module(x.movedim(-3, -1), out.movedim(-3, -1), stock).movedim(-1, -3)


def attach_to_layer(layer: Layer, module: nn.Module) -> None:
    """Put a method's module beside a layer, in place; :func:`mona_mm.hosts.remove` undoes it."""
    holder = layer.holder
    if not isinstance(holder, PeftLayer):
        cls = qualified_name(stock_class(holder))
        mix_in(holder, PeftLayer)
        holder.spec = BlockSpec(cls, {}, {}, mixin=PeftLayer, without=('post_ffn', 'parallel_ffn'))
        holder.peft = PeftModules()
        holder.hooked = frozenset()
        holder.register_forward_hook(keep_calling)
    holder.spec = replace(holder.spec, linears={**holder.spec.linears, layer.name: layer.linear})
    holder.peft[layer.name] = module
