"""The time and memory of a training step and of inference of a backbone with every method, stock, and fully tuned.

The backbones are mmdet's Swins and mmpretrain's plain vision transformers: ViT-B/16 and DINOv2-S and -B.

A step is forward, backward and AdamW. In addition to the methods, by their published names, the variants are:

===================  ==================================================================================================
``stock``            the library's backbone, all of which trains
``full``             the same backbone on the fast path, with which the methods are compared
``published_mona``   the library's blocks with the operations of Mona's published code, one by one
``spt``              SPT with LoRA of rank 8 on every q and v, and as many single weights of every fc1 as a LoRA has
===================  ==================================================================================================

Inference is a forward without gradients, in eval mode. It is measured for all the variants above, which shows the
overhead of the modules that a method leaves in the backbone, and for the deployed forms of three of them:

===================  ==================================================================================================
``mona_folded``      Mona with everything that does not depend on the input computed once
``lora_merged``      the library's backbone with LoRA merged into its weights
``spt_merged``       the same with the structured LoRA and the single weights of ``spt``
===================  ==================================================================================================
"""

import os.path as osp
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mona_mm.backbone import PeftBackbone
from mona_mm.benchmark.module import PublishedMona, rates
from mona_mm.benchmark.timing import (
    cells,
    heading,
    kept_bytes,
    return_freed_memory,
    seconds,
    take_turns,
    times,
    times_floor,
    wait,
    with_spread,
)
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.errors import ConfigError
from mona_mm.frozen.rules import METHOD_RULES
from mona_mm.hosts import method_modules
from mona_mm.methods import deploy
from mona_mm.methods.lora import LoRA
from mona_mm.nn.meta import meta_device
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture
from mona_mm.spt.sparse import SparseDelta

SWINS: dict[str, dict[str, Any]] = {
    't': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7),
    'b': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=7),
    'l': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=7),
}
"""The Swins of the published settings, by size: arguments of mmdet's class."""

_VIT = dict(type='mmpretrain.VisionTransformer', out_type='featmap')
_DINOV2 = dict(**_VIT, img_size=518, patch_size=14, layer_scale_init_value=1e-5)
VITS: dict[str, dict[str, Any]] = {
    'vit_b': dict(**_VIT, arch='b', img_size=224, patch_size=16),
    'dinov2_s': dict(**_DINOV2, arch='dinov2-small'),
    'dinov2_b': dict(**_DINOV2, arch='dinov2-base'),
}
"""Plain vision transformers: arguments of mmpretrain's class."""

ARCHS = {**SWINS, **VITS}
"""The backbones, by the names that the command line takes."""

LABELS = dict(t='Swin-T', b='Swin-B', l='Swin-L', vit_b='ViT-B/16', dinov2_s='DINOv2-S', dinov2_b='DINOv2-B')
"""The names of the backbones in tables and pictures."""

PEFT = dict(mona='Mona', adapter='Adapter', adaptformer='AdaptFormer', lora='LoRA', lorand='LoRand')
DEPLOYED = dict(mona_folded='mona', lora_merged='lora', spt_merged='spt')
"""The variants that exist only for inference, each with the variant whose deployed form it is."""

VARIANTS = ('stock', 'full', 'published_mona', *PEFT, 'spt', *(m for m in METHOD_RULES if m != 'full'), *DEPLOYED)


@dataclass(frozen=True)
class Row:
    """The figures of one variant.

    Times are in milliseconds and sizes in MiB; a spread is the first and the third quartile. Ratios are to ``full`` in
    the same round, or to ``stock`` if inference is measured.

    Args:
        forward: the time of a training forward, or of a forward in eval mode if inference is measured.
        step: the time of a training step; None if inference is measured.
        kept: the memory that the forward keeps for the backward pass, without the parameters.
        state: the memory of the parameters, buffers, gradients and AdamW's two moments.
        memory: the sum of ``kept`` and ``state``; for training on CUDA, the most memory allocated during a step.
        floor: the time that the operations of the step or the necessary transfer of bytes would take at the measured
            rates of this machine, whichever is longer.
    """

    suite: str
    arch: str
    size: tuple[int, int]
    batch: int
    dtype: str
    variant: str
    forward: float
    forward_spread: tuple[float, float]
    forward_ratio: float
    forward_ratio_spread: tuple[float, float]
    step: float | None
    step_spread: tuple[float, float] | None
    step_ratio: float | None
    step_ratio_spread: tuple[float, float] | None
    kept: float
    state: float
    memory: float
    memory_ratio: float
    floor: float


def base_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The config of a stock backbone; arguments without a ``type`` are those of mmdet's Swin."""
    return dict(type='mmdet.SwinTransformer', drop_path_rate=0.2) | arguments


def build_backbone(variant: str, base: dict[str, Any], fast: bool | None = None) -> nn.Module:
    """Build the backbone of a variant; ``fast``, unless it is None, sets whether it takes the fast path."""
    if variant == 'stock':
        return MODELS.build(base)
    if variant == 'mona_folded':
        model = build_backbone('mona', base, fast)
        deploy(model)
        return model
    if variant in DEPLOYED:
        tuned = build_backbone(DEPLOYED[variant], base)
        randomise(tuned)
        model = build_backbone('stock', base)
        model.load_state_dict(merged_state_dict(tuned))
        return model
    if variant == 'published_mona':
        model = PeftBackbone(base, dict(type='Mona'), fast=False)
        for module in method_modules(model):
            module.forward = PublishedMona(module).forward
        return model
    fast = fast is not False
    if variant == 'spt':
        with tempfile.TemporaryDirectory() as folder:
            file = osp.join(folder, 'plan.safetensors')
            small_plan(base).save(file)
            return PeftBackbone(base, dict(type='SPT', plan=file), fast=fast)
    if variant in PEFT:
        return PeftBackbone(base, dict(type=PEFT[variant]), fast=fast)
    return PeftBackbone(base, trainable=variant, fast=fast)


def randomise(model: nn.Module) -> None:
    """Set LoRA modules and single weights, which start at zero, to random values, so that merging has an effect."""
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.up.weight, std=0.02)
        elif isinstance(module, SparseDelta):
            nn.init.normal_(module.values, std=0.02)


def small_plan(base: dict[str, Any]) -> Plan:
    """Make the plan of ``spt``: LoRA on every q and v, and as many single weights of every fc1 as a LoRA there has."""
    with meta_device():
        architecture = Architecture.of(build_backbone('stock', base))
    generator = torch.Generator('cpu').manual_seed(0)
    matrices = [architecture.matrices[block, 'fc1'] for block in architecture.blocks]
    weights = {
        part.name: torch.randperm(part.numel, generator=generator, device='cpu')[: 8 * sum(part.shape)].sort().values
        for part in matrices
    }
    lora = dict.fromkeys(architecture.blocks, ('q', 'v'))
    return Plan(architecture, dict(type='LoRA', rank=8), lora, (), weights)


class Shared:
    """The parameters that several models have in common, and AdamW's moments of those that train, held once in memory.

    Models share a parameter if it has the same name and the same values in them, and trains in all of them or in none,
    so that every model computes the same as without sharing. A step of one model therefore changes a shared parameter
    in all the models that train it, and in no other model.
    """

    def __init__(self) -> None:
        self.parameters: dict[tuple, nn.Parameter] = {}
        self.state: defaultdict[nn.Parameter, dict] = defaultdict(dict)

    def tie(self, model: nn.Module) -> None:
        """Replace the parameters of a model by equal ones of the models that were tied before it."""
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                key = path, name, parameter.requires_grad, parameter.shape
                other = self.parameters.setdefault(key, parameter)
                if other is not parameter and torch.equal(other, parameter):
                    setattr(module, name, other)


class Case:
    """The model of one variant with its forward, its backward and its optimiser.

    Args:
        model: the model to train.
        outputs: a function that runs the forward of the model and returns the tensors from which the backward starts;
            None if it is set later.
        device: the device to run on.
        dtype: float32, or the type of the autocast.
        shared: the parameters that are shared with other cases, none of which has made a step yet.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[nn.Module], Sequence[Tensor]] | None,
        device: str,
        dtype: torch.dtype,
        shared: Shared | None = None,
    ) -> None:
        self.model = model.to(device)
        if shared:
            shared.tie(model)
        self.model.train()
        self.outputs = outputs
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
        if self.optimizer and shared:
            self.optimizer.state = shared.state
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
        self.device = device

    def forward(self) -> list[Tensor]:
        with self.autocast:
            return list(self.outputs(self.model))

    def infer(self) -> None:
        with torch.no_grad(), self.autocast:
            self.outputs(self.model)

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """Run the backward from the results of :meth:`forward`, and then a step of the optimiser."""
        outputs = [out for out in outputs if out.requires_grad]
        if self.optimizer is None:
            return
        torch.autograd.backward(outputs, [torch.full_like(out, 1e-3) for out in outputs])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward(self.forward())

    def seconds(self, inference: bool, clock: Callable[[], float]) -> tuple[float, float]:
        """Measure the seconds of the forward and of the rest of the step, which is 0 for ``inference``."""
        if inference:
            return seconds(self.infer, self.device, clock), 0.0
        outputs: list[Tensor] = []
        forward = seconds(lambda: outputs.extend(self.forward()), self.device, clock)
        return forward, seconds(lambda: self.backward(outputs), self.device, clock)

    def kept(self) -> int:
        """The number of bytes, without the parameters, that the forward keeps for the backward pass."""
        return kept_bytes(self.forward, self.model)

    def state(self) -> int:
        """The number of bytes of the parameters, buffers, gradients and AdamW's moments."""
        every = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.nbytes for t in every) + 3 * self.trained()

    def trained(self) -> int:
        """The number of bytes of the parameters that train."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def peak(self) -> int | None:
        """The largest number of bytes allocated during a step, without those of other models; None if not on CUDA."""
        if torch.device(self.device).type != 'cuda':
            return None
        self.step()
        wait(self.device)
        others = torch.cuda.memory_allocated(self.device) - self.state() + self.trained()  # the gradients are freed
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        wait(self.device)
        return torch.cuda.max_memory_allocated(self.device) - others


def choose_variants(methods: Sequence[str] | None, inference: bool) -> list[str]:
    """The variants for these methods and the :func:`reference`, in the order of :data:`VARIANTS`; None chooses all.

    Raises:
        ConfigError: if training is measured and a variant exists only for inference.
    """
    if methods is None:
        return [variant for variant in VARIANTS if inference or variant not in DEPLOYED]
    deployed = [variant for variant in methods if variant in DEPLOYED]
    if deployed and not inference:
        raise ConfigError(f'--methods {" ".join(deployed)}: a deployed form does not train; add --inference.')
    return [variant for variant in VARIANTS if variant in methods or variant == reference(inference)]


def reference(inference: bool) -> str:
    """The name of the variant to which the ratios are."""
    return 'stock' if inference else 'full'


def run(
    device: str = 'cpu',
    repeats: int = 9,
    archs: Sequence[str] = ('t', 'b'),
    sizes: Sequence[tuple[int, int]] = ((224, 224), (512, 512)),
    methods: Sequence[str] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    inference: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    bases: dict[str, dict[str, Any]] = ARCHS,
) -> Iterator[Row]:
    """Measure every variant on every backbone at every size, and yield the rows of a size as soon as it is measured.

    The variants take turns, as :func:`~mona_mm.benchmark.timing.take_turns` describes.

    Args:
        device: the device to measure on.
        repeats: the number of rounds, after one that is not counted.
        archs: the backbones, by their names in ``bases``.
        sizes: the sizes ``(height, width)`` of the images.
        methods: the variants to measure, from :data:`VARIANTS`, as for :func:`choose_variants`.
        batch: the number of images.
        dtype: float32, or the type of the autocast.
        inference: whether to measure inference instead of training.
        clock: a function that returns the time in seconds. On a busy machine, ``time.thread_time`` with one thread
            leaves out the time of other processes.
        bases: the arguments of the backbones by name; without a ``type`` they are those of mmdet's Swin.

    Raises:
        ConfigError: if training is measured and a variant exists only for inference.
    """
    variants = choose_variants(methods, inference)
    speed = rates(device, dtype, clock)
    for arch in archs:
        base = base_config(bases[arch])
        cases = build_cases(variants, partial(build_backbone, base=base), device, dtype)
        for size in sizes:
            images = torch.randn(batch, 3, *size, device=device)
            for case in cases.values():
                case.outputs = lambda model, images=images: model(images)
            operations = {
                variant: count_operations(variant, base, (batch, 3, *size), inference) for variant in variants
            }
            label = ('backbone', arch, tuple(size), batch, str(dtype).removeprefix('torch.'))
            yield from measure(cases, label, operations, speed, repeats, inference, clock)
        del cases, case  # they are freed before the next ones are built


def build_cases(
    variants: Sequence[str], build: Callable[[str], nn.Module], device: str, dtype: torch.dtype
) -> dict[str, Case]:
    """Build a case for every variant, from the same seed; they share the weights that are equal."""
    shared = Shared()
    cases = {}
    for variant in variants:
        torch.manual_seed(0)
        cases[variant] = Case(build(variant), None, device, dtype, shared)
    return cases


def measure(
    cases: dict[str, Case],
    label: tuple,
    operations: dict[str, float],
    speed: tuple[float, float],
    repeats: int,
    inference: bool,
    clock: Callable[[], float],
) -> Iterator[Row]:
    """Measure the cases and yield a row for each.

    Args:
        cases: the cases by variant, the :func:`reference` among them.
        label: the first fields of a :class:`Row`.
        operations: the floating-point operations of a step, by variant.
        speed: the rates that :func:`mona_mm.benchmark.module.rates` measured.
        repeats: the number of rounds that are counted.
        inference: whether inference is measured.
        clock: a function that returns the time in seconds.
    """
    for case in cases.values():
        case.model.train(not inference)
    return_freed_memory()  # the memory that building and other sizes took
    taken = take_turns({variant: partial(case.seconds, inference, clock) for variant, case in cases.items()}, repeats)
    forwards = {variant: [forward for forward, _ in rounds] for variant, rounds in taken.items()}
    steps = {variant: [forward + backward for forward, backward in rounds] for variant, rounds in taken.items()}
    kept = {variant: 0 if inference else case.kept() for variant, case in cases.items()}
    memory = {}
    for variant, case in cases.items():
        peak = None if inference else case.peak()
        memory[variant] = peak or kept[variant] + (case.state() - 3 * case.trained() * inference)
    other = reference(inference)
    for variant, case in cases.items():
        model_bytes, trained = case.state() - 3 * case.trained(), case.trained()
        # A step writes and reads the kept activations, and reads the parameters in both passes. For each parameter that
        # trains, it writes and reads the gradient, reads and writes two moments, and writes the parameter.
        moved = model_bytes if inference else 2 * kept[variant] + 2 * model_bytes + 7 * trained
        forward = times(forwards[variant], forwards[other])
        step = (None,) * 4 if inference else times(steps[variant], steps[other])
        yield Row(
            *label,
            variant,
            *forward,
            *step,
            kept=kept[variant] / 2**20,
            state=(model_bytes if inference else case.state()) / 2**20,
            memory=memory[variant] / 2**20,
            memory_ratio=memory[variant] / memory[other],
            floor=1e3 * max(operations[variant] / speed[0], moved / speed[1]),
        )


def count_operations(variant: str, base: dict[str, Any], shape: tuple[int, ...], inference: bool = False) -> float:
    """Count the floating-point operations of the products and convolutions of a step, without computing them.

    The plain forms are counted, because torch's counter knows only their operations.
    """
    plain = dict(mona_folded='mona', lora_merged='stock', spt_merged='stock').get(variant, variant)
    with meta_device():
        model = build_backbone(plain, base, fast=False)
        model.train(not inference)  # returns None in some hosts
        images = torch.empty(shape)
    with FlopCounterMode(display=False) as counter:
        outputs = [out for out in model(images) if out.requires_grad and not inference]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return float(counter.get_total_flops())


def header(row: Row) -> str:
    """The head of the table of such rows in Markdown; a ratio below 1 means faster or smaller than the reference."""
    inference = row.step is None
    ratio = f'ratio to {reference(inference)}'
    what = ['forward, ms'] if inference else ['forward, ms', 'step, ms']
    return heading(
        ('backbone', 'image', 'batch', 'type', 'variant', *what, ratio, 'times the floor', 'memory, MiB', ratio)
    )


def line(row: Row) -> str:
    """The line of a row in the table in Markdown."""
    values = [with_spread(row.forward, row.forward_spread)]
    time_, ratio, spread = row.forward, row.forward_ratio, row.forward_ratio_spread
    if row.step is not None:
        values.append(with_spread(row.step, row.step_spread))
        time_, ratio, spread = row.step, row.step_ratio, row.step_ratio_spread
    return cells(
        (
            LABELS[row.arch],
            f'{row.size[0]}x{row.size[1]}',
            f'{row.batch}',
            row.dtype,
            row.variant,
            *values,
            with_spread(ratio, spread),
            times_floor(time_, row.floor),
            f'{row.memory:,.0f}',
            f'{row.memory_ratio:.2f}',
        )
    )


def targets(rows: Sequence[Row]) -> list[str]:
    """Sentences that compare the results with the targets, for every backbone and size."""
    sentences = []
    found = {(r.suite, r.arch, r.size, r.batch, r.dtype, r.step is None, r.variant): r for r in rows}
    for group in dict.fromkeys(key[:-1] for key in found):
        suite, arch, size, batch, dtype, inference = group
        place = f'{suite}, {LABELS[arch]} {size[0]}x{size[1]}, batch {batch}, {dtype}'
        limits = _DEPLOYMENT if inference else _VIT_TARGETS if arch in VITS else _TARGETS
        for variant, other, time_limit, memory_limit in limits:
            a, b = found.get((*group, variant)), found.get((*group, other))
            if a is None or b is None:
                continue
            ratio = a.forward_ratio / b.forward_ratio if inference else a.step_ratio / b.step_ratio
            parts = [f'{ratio:.2f} of the time' + (f' (target {time_limit:.2f})' if time_limit else '')]
            if memory_limit:
                parts.append(f'{a.memory / b.memory:.2f} of the memory (target {memory_limit:.2f})')
            sentences.append(f'{place}: {variant} takes {" and ".join(parts)} of {other}.')
    return sentences


_VIT_TARGETS = (
    ('mona', 'stock', 0.80, None),
    ('full', 'stock', 1.00, None),
    ('lora', 'stock', 0.72, None),
    ('adapter', 'stock', 0.75, None),
)
_TARGETS = (('mona', 'adapter', 1.10, 1.10), ('mona', 'full', 0.75, 0.50), ('full', 'stock', 1.00, None))
_DEPLOYMENT = tuple((variant, 'stock', None, None) for variant in ('mona', 'mona_folded')) + tuple(
    (variant, 'stock', 1.00, None) for variant in ('lora_merged', 'spt_merged')
)
"""The variant, its reference, and the largest shares of the reference's time and memory that are the target, if any."""
