"""Measure how sensitive a task's loss is to every weight of a backbone, by squared gradients summed over batches."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import set_random_seed
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from mona_mm.checkpoint import container
from mona_mm.checkpoint.container import Kind
from mona_mm.checkpoint.pretrained import pretrained_file
from mona_mm.errors import ConfigError, PlanError, SensitivityError
from mona_mm.hosts import method_modules
from mona_mm.nn.replaced import replaced
from mona_mm.spt.parts import Architecture
from mona_mm.spt.plan import base_digest, write

KIND = Kind(
    name='sensitivity',
    format='mona_mm.spt.sensitivity/2',
    error=PlanError,
    renewal='Measure it anew with tools/spt_sensitivity.py.',
)
_IGNORED = 255  # the label of pixels without one


@dataclass(frozen=True)
class Sensitivity:
    """Sums of squared gradients of a base's weights.

    Args:
        architecture: the architecture of the base.
        squares: the sums by name of a parameter, float32 on the CPU, in the parameter's shape.
        info: a readable record of the measurement: config and its fingerprint, data, batches, seed, pretrained weights.
    """

    architecture: Architecture
    squares: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write the sensitivity to a safetensors file, from which plans for any budget can be made."""
        write(path, KIND, self.squares, dict(architecture=asdict(self.architecture), info=self.info))

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Sensitivity':
        """Read a file that :meth:`save` has written.

        Raises:
            MissingFileError: if there is no such file.
            PlanError: if it is damaged, or is not a sensitivity.
        """
        squares, fields = container.read(path, KIND)
        try:
            architecture, info = Architecture.from_fields(fields['architecture']), fields['info']
            shapes = {part.name: architecture.shapes[part.name] for part in architecture.parts}
        except Exception as error:  # the fields of a file may hold values of any type
            raise PlanError(f'{path} is damaged, or of a later version of mona_mm: {error}.') from error
        if shapes != {name: tuple(t.shape) for name, t in squares.items()}:
            raise PlanError(f'{path} is damaged: its tensors do not fit its own architecture.')
        return cls(architecture, squares, info)


def compute_sensitivity(
    model: BaseModel,
    data_loader: Iterable[dict[str, Any]],
    num_batches: int = 16,
    per_sample: bool = False,
    *,
    seed: int = 0,
    progress: bool = True,
    info: dict[str, Any] | None = None,
) -> Sensitivity:
    """Run a model's own losses over batches and sum the squared gradients of its backbone's weights.

    The sensitivity of a weight is the sum over batches of the squared gradient of the batch's loss, in train mode, as
    in the published code. Dropout and DropPath in a batch depend only on ``seed`` and the number of the batch. The sums
    take the memory of one copy of the backbone; every gradient is freed as soon as it is added.

    With several processes, process ``i`` modulo their number runs batch number ``i``, and the sums of all processes are
    added. Each process computes its losses as if it were alone, so the result equals that of one process on the same
    batches.

    Args:
        model: a detector, segmentor or classifier with a supported ``backbone`` that carries no method. It may have any
            of its parameters frozen, which is restored afterwards. Statistics of BatchNorms in the heads change.
        data_loader: the labelled batches of this process, in the form that the model's data preprocessor accepts. No
            more than its share of ``num_batches`` is fetched; a shorter loader ends the run earlier.
        num_batches: the number of batches of all processes together.
        per_sample: square the gradient of each sample's loss, in place of each batch's.
        seed: the seed for dropout and DropPath.
        progress: show a progress bar.
        info: further entries for the ``info`` of the result.

    Raises:
        UnsupportedHostError: if the backbone is not a supported host.
        ConfigError: if ``num_batches`` is below 1, the backbone carries a method, or the losses need more than one
            sample under ``per_sample``.
        SensitivityError: if no image is labelled, or a loss or gradient is not finite; the error names the batch.
    """
    if not isinstance(num_batches, int) or num_batches < 1:
        raise ConfigError(f'num_batches={num_batches!r} must be a whole number of at least 1.')
    backbone = model.backbone
    if method_modules(backbone):
        raise ConfigError('The sensitivity is that of the base: build the backbone with peft=None.')
    architecture = Architecture.of(backbone)
    info = {**(info or {}), 'seed': seed, 'per_sample': per_sample}
    pretrained = pretrained_file(backbone)
    if pretrained:
        info.update(pretrained=pretrained['file'], base_digest=base_digest(backbone, architecture))

    selected = {part.name for part in architecture.parts}
    device = next(model.parameters()).device
    squares = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in backbone.named_parameters() if name in selected
    }
    run, labelled = _sum_squares(model, data_loader, squares, num_batches, per_sample, seed, progress)
    state = torch.tensor([run, labelled], dtype=torch.int64, device=device)
    all_reduce(state)
    if not state[1]:
        raise SensitivityError(NO_LABELS.format(f'in {int(state[0])} batches'))
    for total in squares.values():
        all_reduce(total)
    _check_squares(squares, num_batches, architecture.backbone)
    info['num_batches'] = int(state[0])
    if info['num_batches'] < num_batches:
        print_log(f'The data ended after {info["num_batches"]} of {num_batches} batches.', logger='current')
    return Sensitivity(architecture, {name: total.cpu() for name, total in squares.items()}, info)


def _sum_squares(
    model: BaseModel,
    data_loader: Iterable[dict[str, Any]],
    squares: Mapping[str, Tensor],
    num_batches: int,
    per_sample: bool,
    seed: int,
    progress: bool,
) -> tuple[int, bool]:
    """Add the squared gradients of this process's batches to ``squares``.

    Returns:
        The number of batches, and whether any image in them is labelled.

    Raises:
        SensitivityError: in all processes, if a batch of any of them is unusable.
    """
    rank, processes = get_dist_info()
    share = len(range(rank, num_batches, processes))
    run, labelled, error = 0, False, None
    with ExitStack() as stack:
        stack.enter_context(_everything_trains(model))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        for name, parameter in model.backbone.named_parameters():
            hook = partial(_add_square, squares.get(name))
            stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        bar = ProgressBar(share, file=sys.stdout) if progress and rank == 0 and share else None
        for number, batch in zip(range(rank, num_batches, processes), first_batches(data_loader, share), strict=False):
            try:
                with alone():
                    labelled |= _run(model, batch, number, per_sample, seed)
            except SensitivityError as problem:
                error = str(problem)
                break
            run += 1
            if bar is not None:
                bar.update()
        if bar is not None:
            print(flush=True)
    _raise_everywhere(error)
    return run, labelled


def _check_squares(squares: Mapping[str, Tensor], num_batches: int, backbone: str) -> None:
    wrong = [name for name, total in squares.items() if not total.isfinite().all()]
    if wrong:
        raise SensitivityError(
            f'The gradient of {wrong[0]} ({len(wrong)} parameters in all) is not finite in one of the {num_batches} '
            'batches, though every loss is.'
        )
    if not any(total.any() for total in squares.values()):
        raise SensitivityError(
            f'The gradient of every weight of the {backbone} is zero, so no weight is more sensitive than another. No '
            'gradient passes through a head whose last layer is initialised with zeros, as mmpretrain does for a ViT: '
            "give it another init_cfg, such as dict(type='TruncNormal', layer='Linear', std=0.02)."
        )


NO_LABELS = (
    'There is no labelled image {}, so there is no loss to measure a sensitivity with. Check the annotations of '
    "the training's (or the sensitivity_dataloader's) data set, its classes and its pipeline."
)


def first_batches(batches: Iterable, count: int) -> Iterator:
    """Yield the first ``count`` batches, without fetching one more as zip does."""
    iterator = iter(batches)
    for _ in range(count):
        try:
            yield next(iterator)
        except StopIteration:
            return


@contextmanager
def _everything_trains(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in train mode and exactly the backbone's parameters require gradients.

    All of them do, and not only the selected ones, since a checkpointed block whose input requires no gradient gets
    none.
    """
    training = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in model.parameters()}
    model.train()
    try:
        model.requires_grad_(False)
        for p in model.backbone.parameters():
            p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for p, value in required.items():
            p.requires_grad_(value)
            p.grad = None
        for module, value in training.items():
            module.training = value


def _add_square(total: Tensor | None, parameter: nn.Parameter) -> None:
    if total is not None:
        gradient = parameter.grad.to(total.dtype)
        total.addcmul_(gradient, gradient)
    parameter.grad = None


@contextmanager
def alone() -> Iterator[None]:
    """A context in which torch reports that this process is the only one.

    Losses that average over processes would otherwise differ, or wait for a process that has finished. The code that
    communicates is in the libraries (the losses' ``reduce_mean``, torch's SyncBatchNorm, mmengine's samplers); it
    accepts no process group, and calls ``torch.distributed.is_initialized``, which is replaced here.
    """
    with replaced(torch.distributed, 'is_initialized', lambda: False):
        yield


def _run(model: BaseModel, batch: dict[str, Any], number: int, per_sample: bool, seed: int) -> bool:
    """Compute the losses and gradients of one batch, and return whether any of its images is labelled."""
    labels = [_is_labelled(sample) for sample in batch.get('data_samples') or []]
    if not labels or None in labels:
        raise SensitivityError(NO_LABELS.format(f'in batch {number}'))
    set_seed(seed, number)
    for piece in _samples(batch) if per_sample else [batch]:
        try:
            data = model.data_preprocessor(piece, True)
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        except ValueError as error:
            if per_sample and 'more than 1 value per channel' in str(error):
                raise ConfigError(
                    'per_sample=True cannot be used with this model: a BatchNorm in it needs more than one value per '
                    'channel in train mode. Use per_sample=False.'
                ) from error
            raise
        if not torch.isfinite(loss):
            raise SensitivityError(
                f'The loss of batch {number} is {loss.item()}{_image_paths(piece)}. A sensitivity needs finite losses: '
                'check the annotations of these images and the pretrained weights.'
            )
        loss.backward()
    return any(labels)


def _samples(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inputs = batch.get('inputs')
    if batch.keys() != {'inputs', 'data_samples'} or not isinstance(inputs, Tensor | Sequence):
        raise ConfigError(
            f'per_sample=True needs batches that are dicts of inputs and data_samples, not {list(batch)}.'
        )
    for i, sample in enumerate(batch['data_samples']):
        yield dict(inputs=inputs[i : i + 1], data_samples=[sample])


def _is_labelled(sample: Any) -> bool | None:
    """Whether an image has any label; None if it has no annotation fields at all."""
    known = None
    if 'gt_instances' in sample:
        known = len(sample.gt_instances) > 0
    for key in ('gt_sem_seg', 'gt_panoptic_seg'):
        if key in sample and next(iter(sample.get(key).values()), None) is not None:
            known = known or any(bool((v != _IGNORED).any()) for v in sample.get(key).values())
    for key in ('gt_label', 'gt_score'):
        if key in sample:
            known = known or sample.get(key).numel() > 0
    return known


def _image_paths(batch: dict[str, Any]) -> str:
    paths = [sample.get('img_path') for sample in batch['data_samples']]
    paths = [str(path) for path in paths if path]
    return f' ({", ".join(paths[:4])}{", ..." if len(paths) > 4 else ""})' if paths else ''


def _raise_everywhere(error: str | None) -> None:
    """Raise the first error of any process in all processes, since the others would wait for the failed one."""
    _, processes = get_dist_info()
    errors = [error]
    if processes > 1:
        errors = [None] * processes
        torch.distributed.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise SensitivityError(found)


def set_seed(seed: int, number: int) -> None:
    """Seed every random number generator of this process with a hash of the run's seed and a number."""
    set_random_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
