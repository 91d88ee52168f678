"""The parts of a base from which SPT selects: the matrices, vectors and other tensors of a host's blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, nn

from mona_mm.hosts import Host, find_host, method_names


@dataclass(frozen=True)
class Part:
    """A matrix, vector or other tensor of the selection; in a fused ``qkv`` the rows of q, k or v.

    Args:
        name: the name of the parameter in the backbone.
        rows: the range ``(start, stop)`` of its rows in that parameter; None for all of them.
        shape: the shape of the part.
        block: the path of the block; empty after the last one.
        op: the linear site (``'q'``) whose weight or bias the part is, or else the path of its module in the block.
        kind: ``'matrix'`` (the weight of a linear site), ``'vector'`` (one axis) or ``'other'``.
        is_called: whether the host calls the linear site as a module; otherwise only a method that adds to its weight
            can attach there.
    """

    name: str
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    block: str
    op: str
    kind: str
    is_called: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def offset(self) -> int:
        """The position of the part's first element in the flattened parameter."""
        return self.rows[0] * prod(self.shape[1:]) if self.rows else 0

    def of(self, parameter: Tensor) -> Tensor:
        """The part as a view of its parameter, or of another tensor of that shape."""
        return parameter[self.rows[0] : self.rows[1]] if self.rows else parameter


@dataclass(frozen=True)
class Architecture:
    """The architecture of the base for which a sensitivity or a plan is made.

    Args:
        backbone: the name of its class.
        parameters: the number of all its parameters.
        shapes: the shapes of the parameters to select from and of the class token, by name.
        class_token: the name of the class token, which always trains and is not a part; None if there is none.
        parts: the parts to select from.
    """

    backbone: str
    parameters: int
    shapes: dict[str, tuple[int, ...]]
    class_token: str | None
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, backbone: nn.Module) -> 'Architecture':
        """Describe the architecture of a supported backbone, with or without a method in it.

        As in the published code for ViT, patch embedding, class token and position embedding are not selected from. On
        hierarchical hosts neither are downsampling layers, tables of relative positions and the norms of the outputs.

        Raises:
            UnsupportedHostError: see :func:`mona_mm.hosts.find_host`.
        """
        host = find_host(backbone)
        method = method_names(backbone)
        parameters = {name: p for name, p in backbone.named_parameters() if name not in method}
        parts = tuple(_find_parts(host, backbone, parameters))
        token = 'cls_token' if isinstance(getattr(backbone, 'cls_token', None), nn.Parameter) else None
        names = [*([token] if token else []), *dict.fromkeys(part.name for part in parts)]
        return cls(
            backbone=type(backbone).__name__,
            parameters=sum(p.numel() for p in parameters.values()),
            shapes={name: tuple(parameters[name].shape) for name in names},
            class_token=token,
            parts=parts,
        )

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The paths of the blocks, in order."""
        return tuple(dict.fromkeys(part.block for part in self.parts if part.block))

    @cached_property
    def matrices(self) -> dict[tuple[str, str], Part]:
        """The weights of the linear sites by block and site."""
        return {(part.block, part.op): part for part in self.parts if part.kind == 'matrix'}

    def difference(self, other: 'Architecture') -> str:
        """Describe how the shapes of ``other`` differ from these, with the first names; empty if they are equal."""
        changed = [
            f'{name} is {other.shapes.get(name, "absent")} instead of {self.shapes.get(name, "absent")}'
            for name in dict.fromkeys((*self.shapes, *other.shapes))
            if self.shapes.get(name) != other.shapes.get(name)
        ]
        more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
        return '; '.join(changed[:3]) + more

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> 'Architecture':
        """Make an architecture from the output of ``dataclasses.asdict`` after it has been in JSON."""
        shapes = {name: tuple(shape) for name, shape in fields['shapes'].items()}
        parts = tuple(
            Part(**{**p, 'rows': p['rows'] and tuple(p['rows']), 'shape': tuple(p['shape'])}) for p in fields['parts']
        )
        return cls(**{**fields, 'shapes': shapes, 'parts': parts})


def _find_parts(host: Host, backbone: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[Part]:
    for path, block in host.blocks(backbone).items():
        linears = host.spec(block).linears
        weights: dict[str, list[str]] = {}
        biases: dict[str, list[str]] = {}
        for site, linear in linears.items():
            weights.setdefault(f'{path}.{linear.weight}', []).append(site)
            if linear.bias:
                biases.setdefault(f'{path}.{linear.bias}', []).append(site)
        for name in [name for name in parameters if name.startswith(f'{path}.')]:
            if any(word in name for word in host.not_selected):
                continue
            shape = tuple(parameters[name].shape)
            kind = 'matrix' if name in weights else 'vector' if len(shape) == 1 else 'other'
            # Sites that share a parameter (q, k, v) have equal numbers of its rows, one after another.
            sites = weights.get(name) or biases.get(name) or [name.removeprefix(f'{path}.').rpartition('.')[0]]
            length = shape[0] // len(sites) if shape else 1
            for i, site in enumerate(sites):
                is_called = kind != 'matrix' or linears[site].is_called
                if len(sites) == 1:
                    yield Part(name, None, shape, path, site, kind, is_called)
                else:
                    rows = (i * length, (i + 1) * length)
                    yield Part(name, rows, (length, *shape[1:]), path, site, kind, is_called)
    for module in host.final_norms:
        for end in ('weight', 'bias'):
            name = f'{module}.{end}'
            if name in parameters:
                yield Part(name, None, tuple(parameters[name].shape), '', module, 'vector')
