"""The SPT method: structured modules, whole vectors and single weights where the task is sensitive."""

from collections.abc import Mapping, Sequence
from functools import partial
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
    """Sensitivity-aware tuning, which trains what a plan lists.

    A plan lists the sites that get a structured module, all of one type (LoRA in parallel to a linear layer, DoRA on
    its weight, Adapter on its output, Mona behind a residual add, or Adapter+ behind the FFN's), whole vectors, single
    weights, and the class token if the host has one.

    Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and its
    published code.

    Args:
        plan: the file of a :class:`mona_mm.spt.Plan`, which ``tools/train.py`` makes if there is none. To train only
            structured modules on any architecture, it is instead a dict of their sites by path of a block, which
            needs ``structured``.
        structured: the structured module, ``dict(type='LoRA', rank=8)``, ``dict(type='DoRA', rank=8)``,
            ``dict(type='Adapter', bottleneck=8)``, ``dict(type='Mona', bottleneck=64)``,
            ``dict(type='AdapterPlus', bottleneck=8)`` or None. The other options of those beside linear layers are
            ``dropout=0.1`` (never applied at ``proj``), ``drop_path=0.1`` and ``init='zero'`` (``'trunc_normal'`` as
            published; LoRA and DoRA also take ``'principal'``, ``'minor'`` and ``use_rslora``); neither dropout nor
            drop path applies to a linear layer that the host does not call because it only reads the weight. The other
            options of Mona and Adapter+ are those of :class:`mona_mm.methods.Mona` and
            :class:`mona_mm.methods.AdapterPlus`.
        budget: the budget for which ``tools/train.py`` makes the plan. The arguments below it are also for making the
            plan: :func:`mona_mm.spt.compute_sensitivity` describes ``num_batches`` and ``per_sample``, and
            :func:`mona_mm.spt.allocate` the others.

    Raises:
        MissingFileError: if there is no plan.
        PlanError: if the file is damaged; when the method is attached, if the plan is for another architecture or other
            weights.
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
        check_structured(structured)
        if plan is None:
            raise MissingFileError(
                'SPT needs a plan, and this config names none. tools/train.py makes it; without training, '
                'tools/spt_sensitivity.py CONFIG --budget 0.5% --out FILE does, and peft=dict(plan=FILE) takes it.'
            )
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
        """The names of the vectors of the plan that train as a whole, apart from those inside a fused parameter."""
        return tuple(name for name, rows in self.plan.vectors if rows is None)

    def prepare(self, backbone: nn.Module) -> None:
        """Check that a backbone has the plan's architecture."""
        if self.plan is None:
            self.plan = Plan(Architecture.of(backbone), self.structured, self._sites, (), {})
        self.plan.check(backbone)

    def complete(self, backbone: nn.Module) -> None:
        """Add the deltas of single weights to a backbone."""
        for name, indices in self._single_weights(backbone).items():
            path, _, parameter = name.rpartition('.')
            attach_sparse(backbone.get_submodule(path), indices, parameter)

    def _single_weights(self, backbone: nn.Module) -> dict[str, torch.Tensor]:
        """The flat indices, by parameter, of the plan's single weights and of its vectors inside a fused parameter."""
        weights = {name: [indices] for name, indices in self.plan.weights.items()}
        for name, rows in self.plan.vectors:
            if rows is not None:
                width = backbone.get_parameter(name)[0].numel()
                weights.setdefault(name, []).append(torch.arange(rows[0] * width, rows[1] * width))
        return {name: torch.cat(parts).unique() for name, parts in weights.items()}

    def check_base(self, backbone: nn.Module) -> None:
        """Check that the weights of a backbone are those for which the plan was made.

        Raises:
            PlanError: if they are not.
        """
        self.plan.check_weights(backbone)

    def modules(self, host: Host, sites: Sites) -> dict[str, dict[str, nn.Module]]:
        """Build the structured modules, as :meth:`mona_mm.methods.base.Method.modules` describes.

        Raises:
            ConfigError: if the modules would be wider inside than the widest layer or stream that they tune, would have
                far more parameters than these, or are at a site that a block lacks.
        """
        lacking = [
            f'{path}.{name}'
            for path, names in self.plan.structured.items()
            for name in names
            if name not in sites[path]
        ]
        if lacking:
            raise ConfigError(
                f'SPT: the plan has a {self.structured["type"]} at {lacking[0]}, and that block has no such site. Make '
                "the plan with structured=dict(type='LoRA', rank=8), whose modules are beside the linear layers."
            )
        chosen = {path: {name: sites[path][name] for name in names} for path, names in self.plan.structured.items()}
        if any(chosen.values()):
            name, options = f'SPT: structured {self.structured["type"]}', dict(self.structured)
            check_widths(name, STRUCTURED[options['type']], [options], chosen)
            modules = [item for sites_of_block in chosen.values() for item in sites_of_block.items()]
            check_size(name, sites, [(item, partial(self._module, *item)) for item in modules])
        return {path: {name: self._module(name, sites[path][name]) for name in names} for path, names in chosen.items()}

    def _module(self, name: str, site: Site) -> nn.Module:
        return build_structured(self.structured, site.widths, name, site.is_called)


def check_spt(peft: dict[str, Any]) -> None:
    """Check an SPT config's options and those of its structured module.

    Raises:
        UnknownOptionError: if an option does not exist.
        ConfigError: if a value is not accepted.
    """
    check_options('SPT', SPT, {key: value for key, value in peft.items() if key not in ('type', 'name')})
    check_structured(peft.get('structured'))


def check_structured(structured: Mapping[str, Any] | None) -> None:
    """Check the options of a structured module.

    Raises:
        ConfigError: if its type is unknown, or the value of an option is not accepted.
        UnknownOptionError: if the module has no such option.
    """
    if structured is None:
        return
    options = structured_module(structured)
    module_type = options.pop('type')
    check_options(f'structured {module_type}', STRUCTURED[module_type], options, given=NOT_OPTIONS)
