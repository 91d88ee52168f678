"""Count the parameters of a model, and those that train."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mona_mm.frozen.copies import is_under, moving_copies
from mona_mm.frozen.rules import published_name
from mona_mm.hosts import method_modules
from mona_mm.nn.patterns import without_indices
from mona_mm.record import TargetRecord, record_of

_WIDTH = 120
"""The longest line of the text below the table."""


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
        targets: the layers that have a method beside them, by :func:`mona_mm.PeftModel`.
    """

    method: str | None
    parts: tuple[PartCount, ...]
    backbone_base_total: int
    backbone_total: int
    backbone_trainable: int
    targets: tuple[TargetRecord, ...] = ()

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
        for target in self.targets:
            lines += textwrap.wrap(_layers_text(target), _WIDTH, subsequent_indent='    ', break_on_hyphens=False)
        return '\n'.join(lines)


def _layers_text(target: TargetRecord) -> str:
    """The layers of a target, those with like paths together: ``LoRA beside 6 layers: decoder.layers.*.fc (6)``."""
    groups = [f'{path} ({count})' for path, count in Counter(map(without_indices, target.layers)).items()]
    return f'{target.method} beside {len(target.layers)} layers: {", ".join(groups)}'


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
    targets = list(_targets_of(model))
    beside_layers = {id(p) for _, parameters in targets for p in parameters}
    modules = [m for m in method_modules(backbone) if not any(id(p) in beside_layers for p in m.parameters())]
    method = {id(p): p for m in modules for p in m.parameters()}
    seen = {*method, *beside_layers}

    def count(part: str, parameters: Iterable[nn.Parameter]) -> PartCount:
        new = [p for p in parameters if id(p) not in seen]
        seen.update(map(id, new))
        return _count(part, new)

    parts = [count('backbone base', backbone.parameters())]
    record = record_of(backbone)
    names = []
    if method:
        names.append(record.method if record.method and not record.targets else type(modules[0]).__name__)
        for part, paths in (record.paths if len(record.paths) > 1 else {}).items():
            own = {id(p): p for path in paths for p in backbone.get_submodule(path).parameters() if id(p) in method}
            parts.append(_count(f'method ({part})', own.values()))
            method = {key: p for key, p in method.items() if key not in own}
        if method:
            parts.append(_count(f'method ({names[0]})', method.values()))
    in_backbone = set(map(id, backbone.parameters()))
    inside = [p for _, parameters in targets for p in parameters if id(p) in in_backbone]
    backbone_parts = (*parts, _count('', inside))
    for target, parameters in targets:
        names.append(target.method)
        parts.append(_count(f'method ({target.method}: {target.path})', parameters))
    if not names and record.freeze:
        names = list(map(published_name, record.freeze.rules))
    if backbone is not model:
        parts += [count(name, child.parameters()) for name, child in model.named_children() if child is not backbone]
        parts.append(count('(direct)', model.parameters(recurse=False)))
    return ParameterCount(
        method='+'.join(dict.fromkeys(names)) or None,
        parts=tuple(p for p in parts if p.total),
        backbone_base_total=backbone_parts[0].total,
        backbone_total=sum(p.total for p in backbone_parts),
        backbone_trainable=sum(p.trainable for p in backbone_parts),
        targets=tuple(target for target, _ in targets),
    )


def _targets_of(model: nn.Module) -> Iterator[tuple[TargetRecord, list[nn.Parameter]]]:
    """Yield the targets of PeftModels in ``model`` with the parameters of their methods, except in copies."""
    copies = moving_copies(model)
    for path, module in model.named_modules():
        if not is_under(path, copies):
            for target in record_of(module).targets:
                parameters = {id(p): p for p in map(module.get_parameter, sorted(target.names))}
                yield target, list(parameters.values())


def _count(part: str, parameters: Iterable[nn.Parameter]) -> PartCount:
    parameters = list(parameters)
    return PartCount(part, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
