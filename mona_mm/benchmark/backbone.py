"""Time and memory of a training step, and of inference, of a Swin: every method, the stock host and full tuning.

A step is forward, backward and AdamW. The ways, beside the methods by their published names:

===================  ==================================================================================================
``stock``            mmdet's backbone, all of it trained
``full``             the same on the fast path: what the methods are compared with
``published_mona``   mmdet's blocks and the operations of Mona's published code, one by one
===================  ==================================================================================================

Inference is a forward without gradients, in eval mode: of all ways, so that the overhead of what a method leaves in the
backbone shows. LoRA that has been merged into its weights is ``stock``.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mona_mm.backbone import PeftBackbone
from mona_mm.benchmark.module import PublishedMona, rates
from mona_mm.benchmark.timing import median, seconds, wait, with_spread
from mona_mm.freeze import METHOD_RULES
from mona_mm.meta import meta_device
from mona_mm.methods.folded_mona import fold_mona
from mona_mm.sites import method_modules

ARCHS: dict[str, dict[str, Any]] = {
    't': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7),
    'b': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=7),
    'l': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=7),
}
"""The Swins of the published settings, by size."""

PEFT = dict(mona='Mona', adapter='Adapter', adaptformer='AdaptFormer', lora='LoRA', lorand='LoRand')
METHODS = (*PEFT, *METHOD_RULES)
REFERENCES = ('stock', 'full', 'published_mona')
"""Measured in every run."""

FOLDED = 'mona_folded'
"""Measured under inference, where Mona is: what of it does not depend on the input computed once."""


@dataclass(frozen=True)
class Row:
    """One way. Times in milliseconds, sizes in MiB, spreads as (first, third) quartile.

    ``forward`` is a training forward and ``step`` a training step; under ``inference`` ``step`` is None and ``forward``
    one in eval mode. Ratios are to ``full`` in the same round, under ``inference`` to ``stock``. ``kept`` is what the
    forward keeps for the backward pass beside the parameters; ``state`` parameters, gradients and AdamW's two moments;
    ``memory`` their sum, on CUDA the most that a step had allocated. ``floor`` is the time that the operations of the
    step, or the bytes that must move, would take at this machine's measured rates, whichever is longer.
    """

    suite: str
    arch: str
    size: tuple[int, int]
    batch: int
    dtype: str
    way: str
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


def build_backbone(way: str, base: dict[str, Any], fast: bool | None = None) -> nn.Module:
    """The backbone of a way; ``fast`` overrides whether it takes the fast path."""
    if way == 'stock':
        return MODELS.build(base)
    if way == FOLDED:
        model = build_backbone('mona', base, fast)
        fold_mona(model)
        return model
    if way == 'published_mona':
        model = PeftBackbone(base, dict(type='Mona'), fast=False)
        for module in method_modules(model):
            module.forward = PublishedMona(module).forward
        return model
    fast = fast is not False
    if way in PEFT:
        return PeftBackbone(base, dict(type=PEFT[way]), fast=fast)
    return PeftBackbone(base, trainable=way, fast=fast)


class Case:
    """A model that is tuned in one way, and what one step of it is.

    Args:
        model: to be trained.
        outputs: its forward, to the tensors that the backward starts from.
        device: where.
        dtype: float32, or the autocast's type.
    """

    def __init__(
        self, model: nn.Module, outputs: Callable[[nn.Module], Sequence[Tensor]], device: str, dtype: torch.dtype
    ) -> None:
        self.model = model.to(device)
        self.model.train()
        self.outputs = outputs
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
        self.device = device

    def forward(self) -> list[Tensor]:
        with self.autocast:
            return list(self.outputs(self.model))

    def infer(self) -> None:
        with torch.no_grad(), self.autocast:
            self.outputs(self.model)

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """From what :meth:`forward` returned, and the optimiser's step."""
        outputs = [out for out in outputs if out.requires_grad]
        if self.optimizer is None:
            return
        torch.autograd.backward(outputs, [torch.full_like(out, 1e-3) for out in outputs])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward(self.forward())

    def seconds(self, inference: bool, clock: Callable[[], float]) -> tuple[float, float]:
        """Of the forward and of the rest of the step; under ``inference`` of a forward without gradients, and 0."""
        if inference:
            return seconds(self.infer, self.device, clock), 0.0
        outputs: list[Tensor] = []
        forward = seconds(lambda: outputs.extend(self.forward()), self.device, clock)
        return forward, seconds(lambda: self.backward(outputs), self.device, clock)

    def kept(self) -> int:
        """Bytes of every storage that the forward keeps for the backward pass, parameters aside."""
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = self.forward()
        for p in self.model.parameters():
            storages.pop(p.untyped_storage().data_ptr(), None)
        del outputs
        return sum(storages.values())

    def state(self) -> int:
        """Bytes of parameters and buffers, gradients and AdamW's moments."""
        every = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.nbytes for t in every) + 3 * self.trained()

    def trained(self) -> int:
        """Bytes of what trains."""
        return sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def peak(self) -> int | None:
        """Bytes that a step has allocated at most; None but on CUDA."""
        if torch.device(self.device).type != 'cuda':
            return None
        self.step()
        wait(self.device)
        others = torch.cuda.memory_allocated(self.device) - self.state() + self.trained()  # gradients are freed
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        wait(self.device)
        return torch.cuda.max_memory_allocated(self.device) - others


def all_ways(methods: Sequence[str], inference: bool) -> list[str]:
    """The references and the methods asked for, in one order."""
    ways = [*REFERENCES, *(m for m in METHODS if m in methods and m not in REFERENCES)]
    return [*ways, FOLDED] if inference and 'mona' in ways else ways


def run(
    device: str = 'cpu',
    repeats: int = 9,
    archs: Sequence[str] = ('t', 'b'),
    sizes: Sequence[tuple[int, int]] = ((224, 224), (512, 512)),
    methods: Sequence[str] = METHODS,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    inference: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    bases: dict[str, dict[str, Any]] = ARCHS,
) -> Iterator[Row]:
    """Measure every way on every Swin at every size; rows come as they are measured.

    The ways take turns, round by round in another order, so that what else the machine does meets all of them; a ratio
    is of two times of one round.

    Args:
        device: where.
        repeats: rounds, after one that is not counted.
        archs: names in ``bases``.
        sizes: ``(height, width)`` of the images.
        methods: of :data:`METHODS`, beside the :data:`REFERENCES`.
        batch: images.
        dtype: float32, or the autocast's type.
        inference: measure inference in place of training.
        clock: in seconds. ``time.thread_time`` with one thread leaves out what other processes take of a busy machine.
        bases: arguments of mmdet's Swin.
    """
    speed = rates(device, dtype, clock)
    for arch in archs:
        base = dict(type='mmdet.SwinTransformer', drop_path_rate=0.2, **bases[arch])
        ways = all_ways(methods, inference)
        cases = {way: Case(build_backbone(way, base), None, device, dtype) for way in ways}
        for size in sizes:
            images = torch.randn(batch, 3, *size, device=device)
            for case in cases.values():
                case.outputs = lambda model, images=images: model(images)
            operations = {way: count_operations(way, base, (batch, 3, *size), inference) for way in ways}
            label = ('backbone', arch, tuple(size), batch, str(dtype).removeprefix('torch.'))
            yield from measure(cases, label, operations, speed, repeats, inference, clock)
        del cases, case  # before the next one's are built


def measure(
    cases: dict[str, Case],
    label: tuple,
    operations: dict[str, float],
    speed: tuple[float, float],
    repeats: int,
    inference: bool,
    clock: Callable[[], float],
) -> Iterator[Row]:
    """Rows of the cases, by way.

    Args:
        cases: with the references among them.
        label: the first fields of a :class:`Row`.
        operations: floating-point operations of a step, by way.
        speed: what :func:`mona_mm.benchmark.module.rates` measured.
        repeats: rounds that are counted.
        inference: whether inference is measured.
        clock: in seconds.
    """
    forwards: dict[str, list[float]] = {way: [] for way in cases}
    steps: dict[str, list[float]] = {way: [] for way in cases}
    order = random.Random(0)
    for case in cases.values():
        case.model.train(not inference)
    for round_ in range(repeats + 1):
        for way in order.sample(list(cases), len(cases)):
            forward, backward = cases[way].seconds(inference, clock)
            if round_:
                forwards[way].append(forward)
                steps[way].append(forward + backward)
    kept = {way: 0 if inference else case.kept() for way, case in cases.items()}
    memory = {}
    for way, case in cases.items():
        peak = None if inference else case.peak()
        memory[way] = peak or kept[way] + (case.state() - 3 * case.trained() * inference)
    reference = 'stock' if inference else 'full'
    for way, case in cases.items():
        every, trained = case.state() - 3 * case.trained(), case.trained()
        # Kept activations written and read; parameters read in both passes; of what trains the gradient written and
        # read, two moments read and written, the parameter written.
        moved = every if inference else 2 * kept[way] + 2 * every + 7 * trained
        forward = _times(forwards[way], forwards[reference])
        step = (None,) * 4 if inference else _times(steps[way], steps[reference])
        yield Row(
            *label,
            way,
            *forward,
            *step,
            kept=kept[way] / 2**20,
            state=(every if inference else case.state()) / 2**20,
            memory=memory[way] / 2**20,
            memory_ratio=memory[way] / memory[reference],
            floor=1e3 * max(operations[way] / speed[0], moved / speed[1]),
        )


def count_operations(way: str, base: dict[str, Any], shape: tuple[int, ...], inference: bool = False) -> float:
    """Floating-point operations of the products and convolutions of a step; nothing is computed.

    Of the plain forms, whose operations torch's counter knows.
    """
    with meta_device():
        model = build_backbone('mona' if way == FOLDED else way, base, fast=False)
        model.train(not inference)  # some hosts' returns None
        images = torch.empty(shape)
    with FlopCounterMode(display=False) as counter:
        outputs = [out for out in model(images) if out.requires_grad and not inference]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return float(counter.get_total_flops())


def _times(seconds: list[float], others: list[float]) -> tuple[float, tuple[float, float], float, tuple[float, float]]:
    """In milliseconds and as ratios, each as median and spread."""
    return *median([1e3 * t for t in seconds]), *median([t / o for t, o in zip(seconds, others, strict=True)])


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown. Ratios below 1 are faster or smaller than the reference."""
    inference = rows[0].step is None
    what = 'forward, ms' if inference else 'forward, ms | step, ms'
    lines = [
        f'| backbone | image | batch | type | way | {what} | ratio | memory, MiB | ratio | times the floor |',
        '|' + '---|' * (10 if inference else 11),
    ]
    for r in rows:
        name = f'Swin-{r.arch.upper()} | {r.size[0]}x{r.size[1]} | {r.batch} | {r.dtype} | {r.way}'
        times = with_spread(r.forward, r.forward_spread)
        ratio, time_ = with_spread(r.forward_ratio, r.forward_ratio_spread), r.forward
        if not inference:
            times += f' | {with_spread(r.step, r.step_spread)}'
            ratio, time_ = with_spread(r.step_ratio, r.step_ratio_spread), r.step
        floor = f'{time_ / r.floor:.1f} of {r.floor:,.0f} ms'
        lines.append(f'| {name} | {times} | {ratio} | {r.memory:,.0f} | {r.memory_ratio:.2f} | {floor} |')
    return '\n'.join(lines)


def targets(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and what was, for every backbone and size: a sentence each."""
    sentences = []
    by = {(r.suite, r.arch, r.size, r.way): r for r in rows if r.step is not None}
    for suite, arch, size in dict.fromkeys((key[:3]) for key in by):
        found = {way: by.get((suite, arch, size, way)) for way in (*REFERENCES, 'mona', 'adapter', 'fixed')}
        checks = [
            ('mona', 'adapter', 1.10, 1.10),
            ('mona', 'full', 0.75, 0.50),
            ('full', 'stock', 1.00, None),
        ]
        for way, other, time_limit, memory_limit in checks:
            a, b = found[way], found[other]
            if a is None or b is None:
                continue
            parts = [f'{a.step_ratio / b.step_ratio:.2f} of the time (target {time_limit:.2f})']
            if memory_limit:
                parts.append(f'{a.memory / b.memory:.2f} of the memory (target {memory_limit:.2f})')
            place = f'Swin-{arch.upper()} {size[0]}x{size[1]}'
            sentences.append(f'{suite}, {place}: {way} takes {" and ".join(parts)} of {other}.')
    return sentences
