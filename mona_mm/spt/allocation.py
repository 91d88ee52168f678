"""From sensitivities and a budget to a plan."""

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

RULES = ('budget', 'published')
LORA = MappingProxyType({'type': 'LoRA', 'rank': 8})
_UNITS = {'': 1.0, 'k': 1e3, 'm': 1e6}
# The published sweep: its step and length, and what it counts for the class token, whatever the width.
_SWEEP_STEP, _SWEEP_LENGTH, _SWEEP_TOKEN = 0.02, 80, 768


def parse_budget(budget: str | int, backbone_parameters: int) -> int:
    """A budget as a number of parameters.

    Args:
        budget: ``'0.4M'``, ``'400k'``, ``'0.5%'`` of the backbone's parameters, or a whole number.
        backbone_parameters: of the base.

    Raises:
        ConfigError: if it is none of these, below 1, or above the backbone.
    """
    match = re.fullmatch(r'\s*(\d+\.?\d*|\.\d+)\s*([kKmM%]?)\s*', str(budget))
    if match is None or isinstance(budget, bool | float):
        raise ConfigError(
            f"budget={budget!r} must be a number of parameters such as '0.4M', '400k' or 400000, or a share of the "
            "backbone's such as '0.5%'."
        )
    number, unit = float(match[1]), match[2].lower()
    # The hair is for 0.29M, which in binary is a little less than 290000.
    count = math.floor((number * backbone_parameters / 100 if unit == '%' else number * _UNITS[unit]) + 1e-6)
    if count > backbone_parameters:
        raise ConfigError(
            f'budget={budget!r} is above the backbone, which has {backbone_parameters:,} parameters; to train all of '
            "it, use trainable='all' without a plan."
        )
    return count


def check_rule(rule: str, alpha: float, beta: float) -> None:
    """Check the arguments of :func:`allocate` that need no sensitivity.

    Raises:
        ConfigError: if one cannot be.
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
    weights as soon as it has (parameters of the module) / ``alpha`` of the weights taken; a vector trains whole as
    soon as it has 1 / ``beta`` of its own length. With Mona as the structured module the attention's matrices
    (q, k, v, proj) of a block are one such group, for a module at ``post_attn``, and the FFN's (fc1, fc2) another, for
    ``post_ffn``. Linear layers that a host reads by their weight alone get no Adapter; their weights train singly.

    ``rule='budget'`` takes weights until the budget is full: a module or vector whose turn comes and that does not fit
    in what is left stays single weights, and weights that never had a gradient are not taken. The number of trained
    parameters, class token included, never exceeds the budget.

    ``rule='published'`` repeats the published sweep: the ceil(0.02 i 10^6) most sensitive weights are taken, for i = 1
    to 79, 768 parameters are counted for a class token, and the i whose total is nearest to the budget is kept, of
    equal ones the largest. Its total may exceed the budget, and on a ViT of another width than 768 the number that is
    compared with the budget is not the number of parameters that train, which is ``Plan.counts``.

    Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.2, and its
    published code.

    Args:
        sensitivity: of the weights of a base.
        budget: see :func:`parse_budget`.
        structured: ``dict(type='LoRA', rank=8)`` (the default), ``dict(type='Adapter', bottleneck=8)`` or
            ``dict(type='Mona', bottleneck=64)``; None for single weights and vectors alone.
        rule: ``'budget'`` or ``'published'``.
        alpha: of the structured modules.
        beta: of the vectors.
        structured_vectors: whether vectors may train whole.
        structured_only: whether single weights are left out.

    Raises:
        ConfigError: an unknown rule or structured module, or a budget that is no number, below the smallest possible
            plan or above the backbone.
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
    """What may be trained as a whole: the matrices behind a structured module, or one vector.

    ``need``: how many of its weights have to be among those taken.
    """

    members: tuple[int, ...]
    cost: int
    need: int
    module: tuple[str, str] | None  # block and site


def _candidates(
    architecture: Architecture, config: dict[str, Any] | None, alpha: float, beta: float, vectors: bool
) -> list[_Candidate]:
    index = {(part.block, part.op): i for i, part in enumerate(architecture.parts) if part.kind == 'matrix'}
    found = []
    if config is not None:
        groups = STREAM_GROUPS if config['type'] == 'Mona' else {site: (site,) for _, site in index}
        for block in architecture.blocks:
            for site, members in groups.items():
                if any((block, s) not in index for s in members):
                    continue
                if config['type'] == 'Adapter' and not architecture.matrices[block, site].is_called:
                    continue  # it reads the output of a module that there is none of
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
    """The sensitivities of all parts in one array, and the groups that the rules count in.

    Args:
        sensitivity: of the weights.
        candidates: group ``i`` holds the weights of candidate ``i``, the last group the weights of none.
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
        """The values of a part, a view."""
        return self.values[self.starts[part] : self.starts[part + 1]]

    def part_of(self, positions: np.ndarray) -> np.ndarray:
        """The parts in which these positions of :attr:`values` lie."""
        return np.searchsorted(self.starts, positions, side='right') - 1

    def top(self, count: int) -> np.ndarray:
        """The positions of the ``count`` largest values, ascending; of equal ones the first are taken."""
        count = min(count, len(self.values))
        if count == 0:
            return np.empty(0, np.int64)
        cut = len(self.values) - count
        least = np.partition(self.values, cut)[cut]
        above = np.flatnonzero(self.values > least)
        equal = np.flatnonzero(self.values == least)[: count - len(above)]
        return np.sort(np.concatenate((above, equal)))


def _sweep(order: _Order, budget: int, structured_only: bool) -> tuple[list[int], np.ndarray]:
    """The published rule: the chosen candidates, and the positions of the single weights."""
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
    """The rule of ours: the chosen candidates, and the positions of the single weights.

    Between two turns (a candidate reaching what it needs) only single weights are added, so it is enough to look at
    the state of every group at every turn.
    """
    groups = [_ascending(order, np.flatnonzero(order.group == i)) for i in range(len(order.candidates) + 1)]
    turns = [(groups[i][-c.need], i) for i, c in enumerate(order.candidates) if c.need <= len(groups[i])]
    turns = sorted((t for t in turns if t[0] > 0), key=lambda turn: (-turn[0], turn[1]))
    levels = np.array([level for level, _ in turns], np.float32)
    # How many weights of each group are at or above each level.
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
