"""Count the parameters of a model, and those that train."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mona_mm.frozen.rules import published_name
from mona_mm.hosts import method_modules
from mona_mm.record import record_of


@dataclass(frozen=True)
class PartCount:
    """The parameter counts of one part of a model."""

    part: str
    trainable: int
    total: int


@dataclass(frozen=True)
class ParameterCount:
    """The parameter counts of a model.

    Args:
        method: the name of the method, or else the ``trainable`` rules by their published names; None for a stock
            model.
        parts: the counts of the model's parts.
        backbone_base_total: the parameters of the backbone without the method.
        backbone_total: the parameters of the backbone with the method. A model without a backbone counts as one.
        backbone_trainable: those of them that train.
    """

    method: str | None
    parts: tuple[PartCount, ...]
    backbone_base_total: int
    backbone_total: int
    backbone_trainable: int

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts)

    def table(self) -> str:
        """Format a table of the parts and the share of the backbone that trains, as lines of text."""
        rows = [('part', 'trainable', 'total', '%')]
        for p in (*self.parts, PartCount('model', self.trainable, self.total)):
            share = f'{100 * p.trainable / p.total:.2f}' if p.total else '-'
            rows.append((p.part, f'{p.trainable:,}', f'{p.total:,}', share))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ['  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
                 for row in rows]  # fmt: skip
        rule = '-' * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines.append(
            f'trainable in the backbone: {self.backbone_trainable:,} '
            f'= {_percent(self.backbone_trainable, self.backbone_base_total)} of the base, '
            f'{_percent(self.backbone_trainable, self.backbone_total)} of base and method'
        )
        return '\n'.join(lines)


def _percent(part: int, whole: int) -> str:
    return f'{100 * part / whole:.2f}%' if whole else '-'


def backbone_path(model: nn.Module) -> str:
    """The path of a model's backbone, which is the first one if there are several; empty for a backbone alone."""
    if isinstance(getattr(model, 'backbone', None), nn.Module):
        return 'backbone'
    return next((path for path, _ in model.named_modules() if path.endswith('.backbone')), '')


def count_trainable(model: nn.Module) -> ParameterCount:
    """Count the parameters of ``model``, which may be a whole model or a backbone alone, and those that train.

    A parameter that several parts share counts for the first of them. Meta tensors count like any others.
    """
    backbone = model.get_submodule(backbone_path(model))
    method = {id(p): p for m in method_modules(backbone) for p in m.parameters()}
    seen = set(method)

    def count(part: str, parameters: Iterable[nn.Parameter]) -> PartCount:
        new = [p for p in parameters if id(p) not in seen]
        seen.update(map(id, new))
        return _count(part, new)

    parts = [count('backbone base', backbone.parameters())]
    record = record_of(backbone)
    name = '+'.join(map(published_name, record.freeze.rules)) if record.freeze else None
    if method:
        name = record.method or type(method_modules(backbone)[0]).__name__
        for part, paths in (record.paths if len(record.paths) > 1 else {}).items():
            own = {id(p): p for path in paths for p in backbone.get_submodule(path).parameters() if id(p) in method}
            parts.append(_count(f'method ({part})', own.values()))
            method = {key: p for key, p in method.items() if key not in own}
        if method:
            parts.append(_count(f'method ({name})', method.values()))
    backbone_parts = tuple(parts)
    if backbone is not model:
        parts += [count(name, child.parameters()) for name, child in model.named_children() if child is not backbone]
        parts.append(count('(direct)', model.parameters(recurse=False)))
    return ParameterCount(
        method=name,
        parts=tuple(p for p in parts if p.total),
        backbone_base_total=backbone_parts[0].total,
        backbone_total=sum(p.total for p in backbone_parts),
        backbone_trainable=sum(p.trainable for p in backbone_parts),
    )


def _count(part: str, parameters: Iterable[nn.Parameter]) -> PartCount:
    parameters = list(parameters)
    return PartCount(part, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
