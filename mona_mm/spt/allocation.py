"""The choice of what SPT trains: a plan made from sensitivities and a budget."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from mona_mm.errors import ConfigError
from mona_mm.spt.parts import Architecture
from mona_mm.spt.plan import STREAM_GROUPS, Plan, module_cost, structured_module
from mona_mm.spt.sensitivity import Sensitivity
from mona_mm.spt.structured import stream_sites

RULES = ('budget', 'published')
LORA = MappingProxyType({'type': 'LoRA', 'rank': 8})
_UNITS = {'': 1.0, 'k': 1e3, 'm': 1e6}
# The step and the length of the published sweep, and the parameters that it counts for a class token of any width.
_SWEEP_STEP, _SWEEP_LENGTH, _SWEEP_TOKEN = 0.02, 80, 768


def parse_budget(budget: str | int, backbone_parameters: int) -> int:
    """Convert a budget to a number of parameters.

    Args:
        budget: ``'0.4M'``, ``'400k'``, ``'0.5%'`` of the backbone's parameters, or a whole number.
        backbone_parameters: the number of parameters of the base.

    Raises:
        ConfigError: if the budget has none of these forms, or is above the backbone's number of parameters.
    """
    match = re.fullmatch(r'\s*(\d+\.?\d*|\.\d+)\s*([kKmM%]?)\s*', str(budget))
    if match is None or isinstance(budget, bool | float):
        raise ConfigError(
            f"budget={budget!r} must be a number of parameters such as '0.4M', '400k' or 400000, or a share of the "
            "backbone's such as '0.5%'."
        )
    number, unit = float(match[1]), match[2].lower()
    # The small addition is for numbers such as 0.29M, which in binary floating point is a little less than 290000.
    count = math.floor((number * backbone_parameters / 100 if unit == '%' else number * _UNITS[unit]) + 1e-6)
    if count > backbone_parameters:
        raise ConfigError(
            f'budget={budget!r} is above the backbone, which has {backbone_parameters:,} parameters; to train all of '
            "it, use trainable='all' without a plan."
        )
    return count


def check_rule(rule: str, alpha: float, beta: float) -> None:
    """Check the arguments of :func:`allocate` that can be checked without a sensitivity.

    Raises:
        ConfigError: if the rule is unknown, or ``alpha`` or ``beta`` is not a number above 0.
    """
    if rule not in RULES:
        raise ConfigError(f'rule={rule!r} must be one of {", ".join(map(repr, RULES))}.')
    for name, value in (('alpha', alpha), ('beta', beta)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f'{name}={value!r} must be a number above 0.')


def allocate(
    sensitivity: Sensitivity,
    budget: str | int,
    structured: Mapping[str, Any] | None = LORA,
    *,
    rule: str = 'budget',
    alpha: float = 10.0,
    beta: float = 5.0,
    structured_vectors: bool = True,
    structured_only: bool = False,
) -> Plan:
    r"""Decide which structured modules, whole vectors and single weights train.

    Weights are taken in the order of their sensitivity. A matrix gets a structured module in place of its single
    weights as soon as the number of its weights that are taken reaches (parameters of the module) / ``alpha``. A vector
    trains as a whole as soon as 1 / ``beta`` of its values are taken. If the structured module is Mona, the attention's
    matrices of a block (q, k, v, proj) count as one group, for a module at ``post_attn``, and the FFN's (fc1, fc2) as
    another, for ``post_ffn``. Adapter+ is at ``post_ffn`` alone, once in a block: the FFN's matrices are its group, and
    the weights of the attention train singly. A linear layer that the host does not call, because it only reads the
    weight, gets no Adapter; its weights train singly.

    ``rule='budget'`` takes weights until the budget is used up. A module or vector that does not fit in the rest of the
    budget when its turn comes is left as single weights, and weights that never had a gradient are not taken. The
    number of trained parameters, class token included, never exceeds the budget.

    ``rule='published'`` repeats the published sweep. For i = 1 to 79 it takes the ceil(0.02 i 10^6) most sensitive
    weights and counts 768 parameters for a class token; it keeps the i whose total is nearest to the budget, and the
    largest i if several are equally near. The total may exceed the budget. On a ViT of a width other than 768, the
    number that is compared with the budget differs from the number of parameters that train, which is ``Plan.counts``.

    Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and its
    published code.

    Args:
        sensitivity: the sensitivity of the weights of a base.
        budget: the budget, in a form that :func:`parse_budget` accepts.
        structured: ``dict(type='LoRA', rank=8)`` (the default), or with another type: ``'DoRA'``, ``'Adapter'``,
            ``dict(type='Mona', bottleneck=64)`` or ``dict(type='AdapterPlus', bottleneck=8)``; None to train only
            single weights and vectors.
        rule: ``'budget'`` or ``'published'``.
        alpha: the divisor of the threshold of structured modules, above 0.
        beta: the divisor of the threshold of vectors, above 0.
        structured_vectors: whether vectors may train as a whole.
        structured_only: whether single weights are left out.

    Raises:
        ConfigError: if the rule or the structured module is unknown, ``alpha`` or ``beta`` is not above 0, or the
            budget is not a number, is below the smallest possible plan or is above the backbone.
    """
    check_rule(rule, alpha, beta)
    config = structured_module(structured)
    architecture = sensitivity.architecture
    count = parse_budget(budget, architecture.parameters)
    candidates = _candidates(architecture, config, alpha, beta, structured_vectors)
    order = _Order(sensitivity, candidates)
    if rule == 'published':
        chosen, weights = _sweep(order, count, structured_only)
    else:
        token = architecture.class_token
        fixed = math.prod(architecture.shapes[token]) if token else 0
        chosen, weights = _fill(order, count, fixed, structured_only)
        if not chosen and not len(weights):
            least = fixed + (min((c.cost for c in candidates), default=1) if structured_only else 1)
            raise ConfigError(
                f'budget={budget!r} is below the smallest possible plan for this {architecture.backbone}, which has '
                f'{least:,} parameters{f" ({fixed:,} of them the class token)" if fixed else ""}.'
            )
    options = dict(
        budget=str(budget),
        budget_parameters=count,
        rule=rule,
        alpha=alpha,
        beta=beta,
        structured_vectors=structured_vectors,
        structured_only=structured_only,
    )
    return _plan(architecture, config, [candidates[i] for i in chosen], order, weights, {**sensitivity.info, **options})


@dataclass(frozen=True)
class _Candidate:
    """A candidate for training as a whole: the matrices that a structured module tunes, or one vector.

    Args:
        members: the indices of its parts in ``Architecture.parts``.
        cost: the number of parameters that it trains.
        need: the number of its weights that must be among those taken.
        module: the block and the site of the structured module; None for a vector.
    """

    members: tuple[int, ...]
    cost: int
    need: int
    module: tuple[str, str] | None


def _candidates(
    architecture: Architecture, config: dict[str, Any] | None, alpha: float, beta: float, vectors: bool
) -> list[_Candidate]:
    index = {(part.block, part.op): i for i, part in enumerate(architecture.parts) if part.kind == 'matrix'}
    found = []
    if config is not None:
        in_stream = stream_sites(config)
        groups = {site: STREAM_GROUPS[site] for site in in_stream} or {site: (site,) for _, site in index}
        for block in architecture.blocks:
            for site, members in groups.items():
                if any((block, s) not in index for s in members):
                    continue
                if config['type'] == 'Adapter' and not architecture.matrices[block, site].is_called:
                    continue  # an Adapter reads the output of the linear layer, and this layer is never called
                cost = module_cost(config, architecture, block, site)
                found.append(
                    _Candidate(
                        tuple(index[block, s] for s in members), cost, math.ceil(cost / alpha), module=(block, site)
                    )
                )
    if vectors:
        for i, part in enumerate(architecture.parts):
            if part.kind == 'vector':
                found.append(_Candidate((i,), part.numel, math.ceil(part.numel / beta), module=None))
    return found


class _Order:
    """The sensitivities of all parts in one array, and the groups in which the rules count weights.

    Group ``i`` holds the weights of candidate ``i``; the last group holds the weights that belong to no candidate.

    Args:
        sensitivity: the sensitivity of the weights.
        candidates: the candidates for training as a whole.
    """

    def __init__(self, sensitivity: Sensitivity, candidates: list[_Candidate]) -> None:
        self.candidates = candidates
        self.parts = sensitivity.architecture.parts
        self.starts = np.cumsum([0, *(part.numel for part in self.parts)])
        self.values = np.empty(self.starts[-1], np.float32)
        for i, part in enumerate(self.parts):
            self.of(i)[:] = part.of(sensitivity.squares[part.name]).flatten().numpy()
        if not (self.values.min(initial=0) >= 0 and np.isfinite(self.values.max(initial=0))):
            raise ConfigError('The sensitivity is no sum of squares: it holds a negative number, or one not finite.')
        self.group = np.full(len(self.parts), len(candidates))
        for i, candidate in enumerate(candidates):
            self.group[list(candidate.members)] = i

    def of(self, part: int) -> np.ndarray:
        """The values of a part, as a view of :attr:`values`."""
        return self.values[self.starts[part] : self.starts[part + 1]]

    def part_of(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the parts in which these positions of :attr:`values` lie."""
        return np.searchsorted(self.starts, positions, side='right') - 1

    def top(self, count: int) -> np.ndarray:
        """The positions of the ``count`` largest values, in ascending order; the first of equal values are taken."""
        count = min(count, len(self.values))
        if count == 0:
            return np.empty(0, np.int64)
        cut = len(self.values) - count
        least = np.partition(self.values, cut)[cut]
        above = np.flatnonzero(self.values > least)
        equal = np.flatnonzero(self.values == least)[: count - len(above)]
        return np.sort(np.concatenate((above, equal)))


def _sweep(order: _Order, budget: int, structured_only: bool) -> tuple[list[int], np.ndarray]:
    """Apply the published rule, and return the chosen candidates and the positions of the single weights."""
    taken = [math.ceil(i * _SWEEP_STEP * 1e6) for i in range(1, _SWEEP_LENGTH)]
    top = order.top(taken[-1])
    top = top[np.argsort(-order.values[top], kind='stable')]
    group = order.group[order.part_of(top)]
    cost = np.array([c.cost for c in order.candidates] + [0])
    need = np.array([c.need for c in order.candidates] + [np.inf])
    counts, start, best = np.zeros(len(cost), np.int64), 0, None
    for tau in taken:
        counts += np.bincount(group[start:tau], minlength=len(cost))
        start = tau
        chosen = counts >= need
        total = cost[chosen].sum() + _SWEEP_TOKEN + (0 if structured_only else counts[~chosen].sum())
        distance = abs(int(total) - budget)
        if best is None or distance <= best[0]:
            best = distance, tau, chosen
    _, tau, chosen = best
    weights = top[:0] if structured_only else top[:tau][~chosen[group[:tau]]]
    return list(np.flatnonzero(chosen)), weights


def _fill(order: _Order, budget: int, fixed: int, structured_only: bool) -> tuple[list[int], np.ndarray]:
    """Apply the budget rule, and return the chosen candidates and the positions of the single weights.

    A turn is the point at which a candidate reaches the number of weights that it needs. Only single weights are added
    between two turns, so it is enough to look at the state of every group at every turn.
    """
    groups = [_ascending(order, np.flatnonzero(order.group == i)) for i in range(len(order.candidates) + 1)]
    turns = [(groups[i][-c.need], i) for i, c in enumerate(order.candidates) if c.need <= len(groups[i])]
    turns = sorted((t for t in turns if t[0] > 0), key=lambda turn: (-turn[0], turn[1]))
    levels = np.array([level for level, _ in turns], np.float32)
    # The numbers of weights of each group (rows) that are at or above each level (columns).
    counts = np.stack([len(values) - np.searchsorted(values, levels) for values in groups])
    single = np.full(len(groups), not structured_only)
    spent, chosen = fixed, []
    for turn, (_, i) in enumerate(turns):
        others = counts[:, turn][single].sum() - (counts[i, turn] if single[i] else 0)
        if spent + others + order.candidates[i].cost <= budget:
            chosen.append(i)
            spent += order.candidates[i].cost
            single[i] = False
        elif not structured_only and spent + others + counts[i, turn] > budget:
            break
    left = budget - spent
    if structured_only or left <= 0:
        return chosen, np.empty(0, np.int64)
    for i in chosen:
        for member in order.candidates[i].members:
            order.of(member)[:] = 0
    return chosen, order.top(min(left, np.count_nonzero(order.values)))


def _ascending(order: _Order, members: np.ndarray) -> np.ndarray:
    values = np.concatenate([order.of(i) for i in members] or [np.empty(0, np.float32)])
    values.sort()
    return values


def _plan(
    architecture: Architecture,
    config: dict[str, Any] | None,
    chosen: list[_Candidate],
    order: _Order,
    weights: np.ndarray,
    info: dict[str, Any],
) -> Plan:
    structured: dict[str, tuple[str, ...]] = {}
    for candidate in chosen:
        if candidate.module:
            block, site = candidate.module
            structured[block] = (*structured.get(block, ()), site)
    whole = sorted(candidate.members[0] for candidate in chosen if not candidate.module)
    vectors = [(architecture.parts[i].name, architecture.parts[i].rows) for i in whole]
    if architecture.class_token:
        vectors.insert(0, (architecture.class_token, None))
    single: dict[str, list[np.ndarray]] = {}
    weights = np.sort(weights)
    cuts = np.searchsorted(weights, order.starts)
    for i, part in enumerate(architecture.parts):
        if cuts[i] < cuts[i + 1]:
            inside = weights[cuts[i] : cuts[i + 1]] - order.starts[i] + part.offset
            single.setdefault(part.name, []).append(inside)
    return Plan(
        architecture=architecture,
        structured_config=config,
        structured=structured,
        vectors=tuple(vectors),
        weights={name: torch.from_numpy(np.sort(np.concatenate(found))) for name, found in single.items()},
        info=info,
    )
