"""The plan of SPT, which lists the parts of a backbone that train, and its file."""

import inspect
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
from mona_mm.options import widths as width_options
from mona_mm.spt.parts import Architecture
from mona_mm.spt.structured import STRUCTURED, build_structured, stream_sites
from mona_mm.type_names import type_name

KIND = Kind(
    name='plan',
    format='mona_mm.spt.plan/2',
    error=PlanError,
    renewal='Make it anew with tools/spt_sensitivity.py.',
    hint='Published plans (.pth) are read by mona_mm.spt.load_published_plan.',
)
# The matrices of the branch before a module in the stream, which the module replaces in the selection.
STREAM_GROUPS = {'post_attn': ('q', 'k', 'v', 'proj'), 'post_ffn': ('fc1', 'fc2')}

VectorName = tuple[str, tuple[int, int] | None]


@dataclass(frozen=True)
class Counts:
    """The numbers of parameters that a plan trains: in structured modules, in whole vectors (with the class token), and
    as single weights."""

    structured: int
    vectors: int
    weights: int

    @property
    def total(self) -> int:
        return self.structured + self.vectors + self.weights


@dataclass(frozen=True)
class Plan:
    """The modules, vectors and single weights of a base that train.

    Args:
        architecture: the architecture of the base.
        structured_config: the config of the structured module, ``dict(type='LoRA', rank=8)``, with its options.
        structured: the sites that get a structured module, by path of a block.
        vectors: the parameters that train as a whole, each with a range of rows, or None for all rows. They include the
            class token if the host has one.
        weights: the flat indices of the single weights that train, int64 and ascending, by name of a parameter.
        info: a readable record of the plan's origin: config and its fingerprint, data, seed, budget, rule and options.
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
            raise PlanError(f'This is not a valid plan for a {self.architecture.backbone}: {problem}.')

    def _problem(self) -> str:
        """Describe the first contradiction to the architecture or within the plan; empty if there is none."""
        parts = {(part.name, part.rows) for part in self.architecture.parts}
        parts.add((self.architecture.class_token, None))
        for vector in self.vectors:
            if vector not in parts:
                return f'it has no vector {vector[0]} with rows {vector[1]}'
        if len(set(self.vectors)) < len(self.vectors):
            return 'a vector is named twice'
        if self.structured and self.structured_config is None:
            return 'it has sites but no structured module'
        in_stream = self.structured_config and stream_sites(self.structured_config)
        for block, sites in self.structured.items():
            for site in sites:
                is_possible = site in in_stream if in_stream else site not in STREAM_GROUPS
                if not is_possible or not self._members(block, site):
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
                return f'the indices in {name} of shape {shape} are not ascending, or lie outside of it'
        for name, rows in self.vectors:
            indices = self.weights.get(name)
            if indices is not None and (rows is None or ((indices >= rows[0]) & (indices < rows[1])).any()):
                return f'{name} trains as a whole, and has single weights as well'
        return ''

    def _members(self, block: str, site: str) -> list:
        matrices = self.architecture.matrices
        return [matrices[block, s] for s in STREAM_GROUPS.get(site, (site,)) if (block, s) in matrices]

    @cached_property
    def counts(self) -> Counts:
        """The numbers of parameters that train, counted from the contents of the plan."""
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
        """Check that the plan fits the architecture of a backbone.

        Raises:
            PlanError: if the parameters to select from have other names or shapes there; it names the first ones.
            UnsupportedHostError: if the backbone is not a supported host.
        """
        difference = self.architecture.difference(Architecture.of(backbone))
        if difference:
            raise PlanError(
                f'The plan ({self._origin()}) is for a {self.architecture.backbone} of another architecture than this '
                f'{type(backbone).__name__}: {difference}. Make a plan for this config with tools/spt_sensitivity.py.'
            )

    def check_weights(self, backbone: nn.Module) -> None:
        """Check that the plan was made for the weights of the base, which are loaded and not yet trained.

        A plan whose sensitivity was not measured on pretrained weights, or not by mona_mm, is not checked.

        Raises:
            PlanError: if the plan was made for other weights.
        """
        digest = self.info.get('base_digest')
        if digest and digest != base_digest(backbone, self.architecture):
            raise PlanError(
                f'The plan ({self._origin()}) was made for other weights than this {type(backbone).__name__} has, '
                f'those of {self.info.get("pretrained")}. Load that file, or make a plan for these weights with '
                'tools/spt_sensitivity.py.'
            )

    def _origin(self) -> str:
        return ', '.join(str(self.info[key]) for key in ('file', 'config', 'budget') if self.info.get(key))

    def describe(self) -> str:
        """Describe the parameters that train, in one line."""
        counts = self.counts
        found = [f'{len(self.vectors)} whole vectors ({counts.vectors:,})', f'{counts.weights:,} single weights']
        if self.structured_config:
            modules = sum(map(len, self.structured.values()))
            found.insert(0, f'{modules} {self.structured_config["type"]} modules ({counts.structured:,})')
        return f'{counts.total:,} parameters of {self.architecture.backbone} train: {", ".join(found)}'

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan to a safetensors file with readable metadata, completely or not at all."""
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
            PlanError: if it is damaged, or is not a plan.
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
        except Exception as error:  # the fields of a file may hold values of any type
            raise PlanError(f'{path} is damaged, or of a later version of mona_mm: {error}.') from error
        if stated != counts:
            raise PlanError(f'{path} is damaged: it states {stated} parameters and holds {plan.counts}.')
        return plan


def widths(architecture: Architecture, block: str, site: str) -> tuple[int, int]:
    """The widths ``(in_channels, out_channels)`` of a linear site; the stream's channels, twice, for a stream site."""
    if site in STREAM_GROUPS:
        channels = architecture.matrices[block, STREAM_GROUPS[site][-1]].shape[0]
        return channels, channels
    out_channels, *in_shape = architecture.matrices[block, site].shape
    return torch.Size(in_shape).numel(), out_channels


_WIDTH = {type_: width_options(cls)[0] for type_, cls in STRUCTURED.items()}
_DEFAULT_WIDTH = {type_: inspect.signature(cls).parameters[_WIDTH[type_]].default for type_, cls in STRUCTURED.items()}


def structured_module(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The config of a structured module with its width filled in: ``rank`` for LoRA and DoRA, else ``bottleneck``.

    Raises:
        ConfigError: if there is no such module, or its width is not a whole number of at least 1.
    """
    if config is None:
        return None
    type_ = type_name(config.get('type')) if isinstance(config, Mapping) else ''
    type_ = type_.removeprefix('Structured')
    if type_ not in _WIDTH:
        accepted = ', '.join(f"dict(type='{name}', {_WIDTH[name]}={_DEFAULT_WIDTH[name]})" for name in _WIDTH)
        raise ConfigError(f'structured={show(config)} must be {accepted}, or None.')
    width = config.get(_WIDTH[type_], _DEFAULT_WIDTH[type_])
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= LARGEST:
        raise ConfigError(f'structured: {_WIDTH[type_]}={show(width)} of {type_} must be a whole number of at least 1.')
    return {**config, 'type': type_, _WIDTH[type_]: width}


def module_cost(config: Mapping[str, Any], architecture: Architecture, block: str, site: str) -> int:
    """The number of parameters of the structured module at a site of a block, counted on the meta device.

    Raises:
        ConfigError: if the module cannot be built with these options.
        UnknownOptionError: if the module does not have an option.
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
    """The digest of the weights of the base from which SPT selects."""
    return fingerprint({name: backbone.get_parameter(name) for name in architecture.shapes})['all']


def write(
    path: str | os.PathLike,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Write a plan or a sensitivity by :func:`mona_mm.checkpoint.container.write`.

    Raises:
        PlanError: if its header would be too long, or it holds values that are not finite.
    """
    try:
        container.write(path, kind, tensors, fields, allow_nonfinite=allow_nonfinite)
    except HeaderTooLongError as error:
        raise PlanError(f'{path} is not written: {error}.') from None
