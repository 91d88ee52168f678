"""The parameter names and the pickled plans of the published SPT code, for a ViT."""

import os
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from mona_mm.checkpoint.pretrained import reason
from mona_mm.compat.safe_globals import finished, weights_only
from mona_mm.errors import MissingFileError, PlanError
from mona_mm.spt.parts import Architecture, Part
from mona_mm.spt.plan import Plan, structured_module

_SITES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')  # the columns of the table of matrices in a file
_OPS = {
    **{site: f'attn.{site}' for site in ('q', 'k', 'v', 'proj')},
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2',
    'ln1': 'norm1',
    'ln2': 'norm2',
}
_KEYS = {'unstructured_name_shapes', 'unstructured_indexes', 'tuned_matrices', 'tuned_vectors', 'params'}


def published_names(architecture: Architecture) -> dict[str, Part]:
    """The parts of a ViT by their names in the published code (``blocks.0.attn.q.weight``, ``norm.bias``).

    Raises:
        PlanError: if the architecture is not that of a plain ViT.
    """
    names = {}
    for part in architecture.parts:
        end = part.name.rpartition('.')[2]
        if not part.block:
            names[f'norm.{end}'] = part
        elif part.op in _OPS:
            names[f'blocks.{architecture.blocks.index(part.block)}.{_OPS[part.op]}.{end}'] = part
    if architecture.backbone != 'VisionTransformer' or len(names) != len(architecture.parts):
        raise PlanError(f'Published plans are for a plain ViT, not for this {architecture.backbone}.')
    return names


def load_published_plan(path: str | os.PathLike, backbone: nn.Module, structured: dict) -> Plan:
    """Read a plan file of the published code (``param_req_0.4.pth``) without executing its pickle.

    The published code always trains the class token, so it is among the vectors of the plan. The published code counts
    the weights of LayerNorms but does not train them; in the plan they train.

    A file states a number of parameters, which is kept in ``info['stated_parameters']``. It can differ from the number
    that trains, which is ``Plan.counts``: the published code counts 768 for a class token of any width, and trains its
    Adapter on files that were selected for LoRA and state LoRA's number. ``info['stated_parameters_are']`` says how the
    stated number was counted.

    Args:
        path: the path of the pickle.
        backbone: an mmpretrain VisionTransformer of the plan's architecture, on any device, meta included.
        structured: the structured module to train, which the file does not name: ``dict(type='LoRA', rank=8)`` for a
            file for LoRA, ``dict(type='Adapter', bottleneck=8)`` for a file for Adapter or for LoRA of that rank.

    Raises:
        MissingFileError: if there is no such file.
        PlanError: if the file is damaged, holds anything but numbers, names and tensors, or does not fit the backbone
            or the structured module.
    """
    architecture = Architecture.of(backbone)
    names = published_names(architecture)
    published = _read(path)
    try:
        shapes: dict[str, tuple[int, ...]] = published['unstructured_name_shapes']
        for name, shape in shapes.items():
            if names[name].shape != tuple(shape):
                raise PlanError(f'{path}: {name} is {tuple(shape)} there and {names[name].shape} in this backbone.')
        vectors = [(names[name].name, names[name].rows) for name in published['tuned_vectors']]
        table = zip(architecture.blocks, published['tuned_matrices'], strict=True)
        tuned = {
            block: tuple(site for site, is_tuned in zip(_SITES, row, strict=True) if is_tuned) for block, row in table
        }
        weights = _resolve(published['unstructured_indexes'], [names[name] for name in shapes])
        stated = round(float(published['params']) * 1e6)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise PlanError(
            f'{path} is no published plan for this {architecture.backbone}: {type(error).__name__} {error}.'
        ) from error
    if not architecture.class_token:
        raise PlanError(f'{path}: published plans train a class token, which this {architecture.backbone} has none of.')
    vectors.insert(0, (architecture.class_token, None))
    plan = Plan(
        architecture=architecture,
        structured_config=structured_module(structured),
        structured={block: sites for block, sites in tuned.items() if sites},
        vectors=tuple(vectors),
        weights=weights,
        info=dict(config=f'published plan {os.path.basename(path)}', rule='published', file=str(path)),
    )
    counted = _counted(plan, stated)
    if not counted:
        raise PlanError(
            f'{path} states {stated:,} parameters; with {plan.structured_config} it has {plan.counts.total:,}. '
            'Is it for another structured module?'
        )
    plan.info.update(stated_parameters=stated, stated_parameters_are=counted)
    return plan


_TOKEN = 768  # the parameters that the published code counts for a class token of any width


def _counted(plan: Plan, stated: int) -> str:
    """Describe how a published file counted the parameters that it states; empty if no count of this plan matches."""
    width = prod(plan.architecture.shapes[plan.architecture.class_token])
    module = plan.structured_config
    selected_for = [module]
    if module and module['type'] == 'Adapter':
        selected_for.append(dict(type='LoRA', rank=module['bottleneck']))
    for config in selected_for:
        others = replace(plan, structured_config=config).counts.total - width
        for token in dict.fromkeys((_TOKEN, width)):
            if others + token == stated:
                modules = 'structured' if config is None else config['type']
                return f'those with {modules} modules and {token} for the class token'
    return ''


def _resolve(indices: Tensor, parts: list[Part]) -> dict[str, Tensor]:
    """Convert indices into the concatenation of all these parts to indices into their parameters, by name.

    Raises:
        ValueError: if an index lies outside of the parts.
    """
    indices = indices.sort().values
    bounds = torch.tensor([0, *(part.numel for part in parts)]).cumsum(0)
    if len(indices) and (indices[0] < 0 or indices[-1] >= bounds[-1]):
        raise ValueError(f'an index lies outside the {int(bounds[-1])} weights')
    cuts = torch.searchsorted(indices, bounds)
    found: dict[str, list[Tensor]] = {}
    for i, part in enumerate(parts):
        inside = indices[cuts[i] : cuts[i + 1]]
        if len(inside):
            found.setdefault(part.name, []).append(inside - bounds[i] + part.offset)
    return {name: torch.cat(pieces).sort().values for name, pieces in found.items()}


def _read(path: str | os.PathLike) -> dict:
    if not os.path.isfile(path):
        raise MissingFileError(f'There is no plan {path}.')
    try:
        with weights_only():
            published = finished(torch.load(path, map_location='cpu', weights_only=True))
    except Exception as error:  # a damaged file can make torch raise anything
        raise PlanError(
            f'{path} cannot be read as a published plan: it is damaged, something else, or holds more than numbers, '
            f'names and tensors ({reason(error)}).'
        ) from error
    if not isinstance(published, dict) or not published.keys() >= _KEYS:
        raise PlanError(f'{path} is no published plan: it does not hold {", ".join(sorted(_KEYS))}.')
    return published
