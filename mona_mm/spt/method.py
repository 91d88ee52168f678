"""SPT: structured modules, whole vectors and single weights where the task is sensitive."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.hosts import Host, Site, Sites
from mona_mm.methods.base import NOT_OPTIONS, Method, check_size, check_widths
from mona_mm.options import Count, Positive, check_options, checked
from mona_mm.registry import METHODS
from mona_mm.spt.parts import Architecture
from mona_mm.spt.plan import Plan, structured_module
from mona_mm.spt.sparse import attach_sparse
from mona_mm.spt.structured import STRUCTURED, build_structured


@METHODS.register_module()
class SPT(Method):
    """Sensitivity-aware tuning: train what a plan says.

    Structured modules of one kind at the sites of the plan (LoRA in parallel to a linear layer, Adapter on its output,
    Mona behind a residual add), the plan's vectors and single weights, and the class token where the host has one.

    Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and its
    published code.

    Args:
        plan: file of a :class:`mona_mm.spt.Plan`. ``tools/train.py`` makes it where there is none. Or structured
            modules alone, whatever the architecture: the sites by path of a block, with ``structured`` said.
        structured: the structured module, ``dict(type='LoRA', rank=8)``, ``dict(type='Adapter', bottleneck=8)``,
            ``dict(type='Mona', bottleneck=64)`` or None, with its other options: for LoRA and Adapter ``dropout=0.1``
            (never at ``proj``), ``drop_path=0.1`` (neither where a host's linear is reached through its weight) and
            ``init='zero'`` (``'trunc_normal'`` as published), for Mona those of :class:`mona_mm.methods.Mona`.
        budget: with the arguments below, how ``tools/train.py`` makes the plan: see :func:`mona_mm.spt.allocate` and,
            for ``num_batches`` and ``per_sample``, :func:`mona_mm.spt.compute_sensitivity`.

    Raises:
        MissingFileError: if there is no plan.
        PlanError: if the file is damaged or, when attached, the plan is for another architecture or other weights.
        ConfigError: if ``structured`` is not what the plan was made for.
    """

    @checked
    def __init__(
        self,
        plan: str | PathLike | Mapping[str, Sequence[str]] | None = None,
        structured: Mapping[str, Any] | None = None,
        budget: str | int | None = None,
        num_batches: Count = 16,
        per_sample: bool = False,
        rule: Literal['budget', 'published'] = 'budget',
        alpha: Positive = 10.0,
        beta: Positive = 5.0,
        structured_vectors: bool = True,
        structured_only: bool = False,
    ) -> None:
        if plan is None:
            raise MissingFileError(
                'SPT needs a plan, and this config names none. tools/train.py makes it; without training, '
                'tools/spt_sensitivity.py CONFIG --budget 0.5% --out FILE does, and peft=dict(plan=FILE) takes it.'
            )
        check_structured(structured)
        if isinstance(plan, Mapping):
            self.plan, self.structured = None, structured_module(structured)
            self._sites = {block: tuple(sites) for block, sites in plan.items()}
            return
        self.plan = Plan.load(plan)
        self.structured = self.plan.structured_config
        if structured is not None:
            structured = {**structured, 'type': structured_module(structured)['type']}
            made_for = {key: structured.get(key, value) for key, value in (self.structured or {}).items()}
            if self.structured is None or made_for != self.structured:
                raise ConfigError(
                    f'SPT: structured={dict(structured)} is not what the plan {plan} was made for, {self.structured}.'
                )
            self.structured = dict(structured) | made_for

    @property
    def trainable(self) -> tuple[str, ...]:
        """The plan's whole vectors."""
        return tuple(name for name, rows in self.plan.vectors if rows is None)

    def attach(self, backbone: nn.Module) -> None:
        """Put structured modules and the deltas of single weights into a backbone of the plan's architecture."""
        if self.plan is None:
            self.plan = Plan(Architecture.of(backbone), self.structured, self._sites, (), {})
        self.plan.check(backbone)
        super().attach(backbone)
        for name, indices in self._single_weights(backbone).items():
            path, _, parameter = name.rpartition('.')
            attach_sparse(backbone.get_submodule(path), indices, parameter)

    def _single_weights(self, backbone: nn.Module) -> dict[str, torch.Tensor]:
        """Flat indices by parameter: the plan's single weights, and the vectors that are part of a fused one."""
        weights = {name: [indices] for name, indices in self.plan.weights.items()}
        for name, rows in self.plan.vectors:
            if rows is not None:
                width = backbone.get_parameter(name)[0].numel()
                weights.setdefault(name, []).append(torch.arange(rows[0] * width, rows[1] * width))
        return {name: torch.cat(parts).unique() for name, parts in weights.items()}

    def check_base(self, backbone: nn.Module) -> None:
        """Refuse weights that the plan was not made for."""
        self.plan.check_weights(backbone)

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """See :meth:`mona_mm.methods.base.Method.modules`.

        Raises:
            ConfigError: if the modules would be wider inside than the widest of what they tune, or far larger.
        """
        chosen = {path: {name: sites[path][name] for name in names} for path, names in self.plan.structured.items()}
        if any(chosen.values()):
            name, options = f'SPT: structured {self.structured["type"]}', dict(self.structured)
            check_widths(name, STRUCTURED[options['type']], options, chosen)
            check_size(name, sites, chosen, self._module)
        return {path: {name: self._module(name, site) for name, site in of.items()} for path, of in chosen.items()}

    def _module(self, name: str, site: Site) -> nn.Module:
        return build_structured(self.structured, site.widths, name, site.is_called)


def check_structured(structured: Mapping[str, Any] | None) -> None:
    """Check the options of a structured module.

    Raises:
        ConfigError: if it is of no known kind, or a value cannot be.
        UnknownOptionError: if it has no such option.
    """
    if structured is None:
        return
    options = structured_module(structured)
    kind = options.pop('type')
    check_options(f'structured {kind}', STRUCTURED[kind], options, given=NOT_OPTIONS)
