"""The plan: what SPT trains in a backbone, and its file."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mona_mm.checkpoint import container
from mona_mm.checkpoint.container import HeaderTooLongError, Kind
from mona_mm.errors import ConfigError, PlanError
from mona_mm.nn.digest import fingerprint
from mona_mm.nn.meta import meta_device
from mona_mm.options import LARGEST, show
from mona_mm.spt.parts import Architecture
from mona_mm.spt.structured import build_structured
from mona_mm.type_names import type_name

KIND = Kind(
    name='plan',
    format='mona_mm.spt.plan/2',
    error=PlanError,
    renewal='Make it anew with tools/spt_sensitivity.py.',
    hint='Published plans (.pth) are read by mona_mm.spt.load_published_plan.',
)
# What a Mona module replaces in the selection: the matrices of the branch that it follows.
STREAM_GROUPS = {'post_attn': ('q', 'k', 'v', 'proj'), 'post_ffn': ('fc1', 'fc2')}

VectorName = tuple[str, tuple[int, int] | None]


@dataclass(frozen=True)
class Counts:
    """Parameters that a plan trains: of structured modules, of whole vectors (and class token), single weights."""

    structured: int
    vectors: int
    weights: int

    @property
    def total(self) -> int:
        return self.structured + self.vectors + self.weights


@dataclass(frozen=True)
class Plan:
    """Which modules, vectors and single weights of a base train.

    Args:
        architecture: of the base that the plan is for.
        structured_config: the structured module, ``dict(type='LoRA', rank=8)``, with its options.
        structured: by path of a block, the sites that get a structured module.
        vectors: parameters that train whole, with the range of rows, or None for all of the parameter. The class token
            of a host that has one is among them.
        weights: by name of a parameter, the flat indices of the single weights that train in it, int64, ascending.
        info: where the plan is from, readable: config and its fingerprint, data, seed, budget, rule and its options.
    """

    architecture: Architecture
    structured_config: dict[str, Any] | None
    structured: dict[str, tuple[str, ...]]
    vectors: tuple[VectorName, ...]
    weights: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'structured_config', structured_module(self.structured_config))
        problem = self._problem()
        if problem:
            raise PlanError(f'This is no plan for a {self.architecture.backbone}: {problem}.')

    def _problem(self) -> str:
        """What contradicts the architecture, or itself."""
        parts = {(part.name, part.rows) for part in self.architecture.parts}
        parts.add((self.architecture.class_token, None))
        for vector in self.vectors:
            if vector not in parts:
                return f'it has no vector {vector[0]} with rows {vector[1]}'
        if len(set(self.vectors)) < len(self.vectors):
            return 'a vector is named twice'
        if self.structured and self.structured_config is None:
            return 'the structured module is not said'
        for block, sites in self.structured.items():
            for site in sites:
                is_stream = self.structured_config['type'] == 'Mona'
                if (site in STREAM_GROUPS) != is_stream or not self._members(block, site):
                    return f'{self.structured_config["type"]} has no site {site!r} in a block {block!r}'
            if len(set(sites)) < len(sites):
                return f'a site of {block} is named twice'
        for name, indices in self.weights.items():
            shape = self.architecture.shapes.get(name)
            if shape is None:
                return f'it has no parameter {name}'
            if indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
                return f'the indices in {name} are not a list of whole numbers'
            if indices[0] < 0 or indices[-1] >= torch.Size(shape).numel() or (indices.diff() <= 0).any():
                return f'the indices in {name}, {shape}, are not ascending or lie outside'
        for name, rows in self.vectors:
            indices = self.weights.get(name)
            if indices is not None and (rows is None or ((indices >= rows[0]) & (indices < rows[1])).any()):
                return f'single weights of {name} are named, which trains whole'
        return ''

    def _members(self, block: str, site: str) -> list:
        matrices = self.architecture.matrices
        return [matrices[block, s] for s in STREAM_GROUPS.get(site, (site,)) if (block, s) in matrices]

    @cached_property
    def counts(self) -> Counts:
        """How many parameters train, counted from what is in the plan."""
        numel = {(part.name, part.rows): part.numel for part in self.architecture.parts}
        token = self.architecture.class_token
        if token:
            numel[token, None] = torch.Size(self.architecture.shapes[token]).numel()
        return Counts(
            structured=sum(
                module_cost(self.structured_config, self.architecture, block, site)
                for block, sites in self.structured.items()
                for site in sites
            ),
            vectors=sum(numel[vector] for vector in self.vectors),
            weights=sum(len(indices) for indices in self.weights.values()),
        )

    def check(self, backbone: nn.Module) -> None:
        """Check that the plan is for such a backbone.

        Raises:
            PlanError: if the parameters it selects from have other names or shapes there; it names the first.
            UnsupportedHostError: if the backbone is not a supported host.
        """
        difference = self.architecture.difference(Architecture.of(backbone))
        if difference:
            raise PlanError(
                f'The plan ({self._origin()}) is for a {self.architecture.backbone} of another architecture than this '
                f'{type(backbone).__name__}: {difference}. Make a plan for this config with tools/spt_sensitivity.py.'
            )

    def check_weights(self, backbone: nn.Module) -> None:
        """Check that the plan was made for the weights that the base holds now, loaded and not yet trained.

        Nothing to check where the sensitivity was not measured on pretrained weights, or not by mona_mm.

        Raises:
            PlanError: if it was made for others.
        """
        digest = self.info.get('base_digest')
        if digest and digest != base_digest(backbone, self.architecture):
            raise PlanError(
                f'The plan ({self._origin()}) was made for other weights than this {type(backbone).__name__} holds: '
                f'for {self.info.get("pretrained")}. Load those, or make a plan for these with '
                'tools/spt_sensitivity.py.'
            )

    def _origin(self) -> str:
        return ', '.join(str(self.info[key]) for key in ('file', 'config', 'budget') if self.info.get(key))

    def describe(self) -> str:
        """What trains, in one line."""
        counts = self.counts
        found = [f'{len(self.vectors)} whole vectors ({counts.vectors:,})', f'{counts.weights:,} single weights']
        if self.structured_config:
            modules = sum(map(len, self.structured.values()))
            found.insert(0, f'{modules} {self.structured_config["type"]} modules ({counts.structured:,})')
        return f'{counts.total:,} parameters of {self.architecture.backbone} train: {", ".join(found)}'

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan to a safetensors file whose metadata can be read; the file appears whole or not at all."""
        tensors = {}
        for name, indices in self.weights.items():
            small = torch.Size(self.architecture.shapes[name]).numel() <= torch.iinfo(torch.int32).max
            tensors[f'weights/{name}'] = indices.to(torch.int32 if small else torch.int64).contiguous()
        fields = dict(
            architecture=asdict(self.architecture),
            structured_config=self.structured_config,
            structured=self.structured,
            vectors=self.vectors,
            counts=self._stated(),
            info={key: value for key, value in self.info.items() if key != 'file'},
        )
        write(path, KIND, tensors, fields)

    def _stated(self) -> dict[str, int]:
        return {**asdict(self.counts), 'total': self.counts.total}

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Plan':
        """Read a plan.

        Raises:
            MissingFileError: if there is no such file.
            PlanError: if it is damaged, or no plan.
        """
        tensors, fields = container.read(path, KIND)
        try:
            plan = cls(
                architecture=Architecture.from_fields(fields['architecture']),
                structured_config=fields['structured_config'],
                structured={block: tuple(sites) for block, sites in fields['structured'].items()},
                vectors=tuple((name, rows and tuple(rows)) for name, rows in fields['vectors']),
                weights={name.removeprefix('weights/'): t.long() for name, t in tensors.items()},
                info={**fields['info'], 'file': str(path)},
            )
            stated, counts = fields['counts'], plan._stated()
            if not all(name.startswith('weights/') for name in tensors):
                raise ValueError('it holds other tensors than indices of weights')
        except Exception as error:  # a file can put anything in the place of anything
            raise PlanError(f'{path} is damaged, or of a later mona_mm: {error}.') from error
        if stated != counts:
            raise PlanError(f'{path} is damaged: it states {stated} parameters and holds {plan.counts}.')
        return plan


def widths(architecture: Architecture, block: str, site: str) -> tuple[int, int]:
    """``(in_channels, out_channels)`` of a linear site; at a stream site the channels, twice."""
    if site in STREAM_GROUPS:
        channels = architecture.matrices[block, STREAM_GROUPS[site][-1]].shape[0]
        return channels, channels
    out, *rest = architecture.matrices[block, site].shape
    return torch.Size(rest).numel(), out


_WIDTH = {'LoRA': 'rank', 'Adapter': 'bottleneck', 'Mona': 'bottleneck'}
_DEFAULT_WIDTH = {'LoRA': 8, 'Adapter': 8, 'Mona': 64}


def structured_module(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The config of a structured module with its width filled in: ``rank`` of LoRA, else ``bottleneck``.

    Raises:
        ConfigError: if there is no such module, or its width is not a whole number of at least 1.
    """
    if config is None:
        return None
    kind = type_name(config.get('type')) if isinstance(config, Mapping) else ''
    kind = kind.removeprefix('Structured')
    if kind not in _WIDTH:
        raise ConfigError(
            f"structured={show(config)}: the structured module is dict(type='LoRA', rank=8), dict(type='Adapter', "
            "bottleneck=8), dict(type='Mona', bottleneck=64), or None."
        )
    width = config.get(_WIDTH[kind], _DEFAULT_WIDTH[kind])
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= LARGEST:
        raise ConfigError(f'structured: {_WIDTH[kind]}={show(width)} of {kind} must be a whole number of at least 1.')
    return {**config, 'type': kind, _WIDTH[kind]: width}


def module_cost(config: Mapping[str, Any], architecture: Architecture, block: str, site: str) -> int:
    """Parameters of the structured module at a site of a block, counted in one built without memory.

    Raises:
        ConfigError: if the module cannot be built with these options.
        UnknownOptionError: if it has no such option.
    """
    is_called = site in STREAM_GROUPS or architecture.matrices[block, site].is_called
    return _cost(json.dumps(dict(config), sort_keys=True), *widths(architecture, block, site), site, is_called)


@cache
def _cost(config: str, in_channels: int, out_channels: int, site: str, is_called: bool) -> int:
    widths = (in_channels,) if site in STREAM_GROUPS else (in_channels, out_channels)
    with meta_device():
        module = build_structured(json.loads(config), widths, site, is_called)
    return sum(p.numel() for p in module.parameters())


def base_digest(backbone: nn.Module, architecture: Architecture) -> str:
    """The digest of the base's weights in the selection, from their fingerprint."""
    return fingerprint({name: backbone.get_parameter(name) for name in architecture.shapes})['all']


def write(
    path: str | os.PathLike,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    allow_nonfinite: bool = False,
) -> None:
    """:func:`mona_mm.checkpoint.container.write` of a plan or a sensitivity.

    Raises:
        PlanError: if its header would be longer than is read, or it holds values that are not finite.
    """
    try:
        container.write(path, kind, tensors, fields, allow_nonfinite=allow_nonfinite)
    except HeaderTooLongError as error:
        raise PlanError(f'{path} is not written: {error}.') from None
