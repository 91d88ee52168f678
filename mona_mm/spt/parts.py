"""What SPT selects from: the matrices, vectors and other tensors of a host's blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, nn

from mona_mm.hosts import Host, find_host, method_names


@dataclass(frozen=True)
class Part:
    """One matrix, vector or other tensor of the selection; of a fused ``qkv`` the rows of q, of k or of v.

    Args:
        name: of the parameter in the backbone.
        rows: first and last-but-one row in that parameter, or None for all of it.
        shape: of the part.
        block: path of the block, empty behind the last one.
        op: the linear site (``'q'``) that the part is weight or bias of, or the path of its module in the block.
        kind: ``'matrix'`` (the weight of a linear site), ``'vector'`` (one axis), ``'other'``.
        is_called: whether the host calls a linear site as a module; else only an addition to its weight can be there.
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
        """Of the part's first element in the flattened parameter."""
        return self.rows[0] * prod(self.shape[1:]) if self.rows else 0

    def of(self, parameter: Tensor) -> Tensor:
        """The part of its parameter, or of anything of that shape; a view."""
        return parameter[self.rows[0] : self.rows[1]] if self.rows else parameter


@dataclass(frozen=True)
class Architecture:
    """The base that a sensitivity or a plan is about.

    Args:
        backbone: class name.
        parameters: how many the base has, all included.
        shapes: of the parameters of the selection, and of the class token, by name.
        class_token: name of the class token, which always trains and is no part; None without one.
        parts: what is selected from.
    """

    backbone: str
    parameters: int
    shapes: dict[str, tuple[int, ...]]
    class_token: str | None
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, backbone: nn.Module) -> 'Architecture':
        """The architecture of a supported backbone, with or without a method in it.

        Outside the selection are, as in the published code on ViT, patch embedding, class token and position
        embedding, and on hierarchical hosts also what stands for them between the blocks: downsampling layers,
        tables of relative positions, and the norms of the outputs.

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
        """Paths of the blocks, in order."""
        return tuple(dict.fromkeys(part.block for part in self.parts if part.block))

    @cached_property
    def matrices(self) -> dict[tuple[str, str], Part]:
        """The weights of the linear sites by block and site."""
        return {(part.block, part.op): part for part in self.parts if part.kind == 'matrix'}

    def difference(self, other: 'Architecture') -> str:
        """How the shapes of ``other`` differ from these, naming the first; empty if they do not."""
        changed = [
            f'{name} is {other.shapes.get(name, "absent")} instead of {self.shapes.get(name, "absent")}'
            for name in dict.fromkeys((*self.shapes, *other.shapes))
            if self.shapes.get(name) != other.shapes.get(name)
        ]
        more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
        return '; '.join(changed[:3]) + more

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> 'Architecture':
        """The architecture that ``dataclasses.asdict`` has taken apart, after it has been JSON."""
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
