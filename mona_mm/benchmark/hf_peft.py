"""LoRA of mona_mm and of Hugging Face's PEFT beside each other, on the same network with the same weights.

All have the rank and scale of :data:`OPTIONS`, without dropout, and nothing else trains. The variants are:

============  =========================================================================================================
``hf_peft``   ``peft.get_peft_model`` on the stock backbone, beside whole layers (``target_modules``)
``layers``    :func:`mona_mm.PeftModel`, beside the same layers: the same function, with the same parameters
``backbone``  :func:`mona_mm.PeftBackbone`, the usual way to have LoRA in a backbone: beside the slices of ``qkv``, in
              the faster forms of the host
============  =========================================================================================================

In the placement ``attention`` these are ``qkv`` of every block, or its slices q and v; in ``all`` they are ``qkv``,
``proj``, ``fc1`` and ``fc2``, or the slices q, k and v and the same others.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mona_mm.backbone import PeftBackbone
from mona_mm.benchmark.backbone import ARCHS, LABELS, Case, base_config
from mona_mm.benchmark.timing import cells, heading, return_freed_memory, take_turns, times, with_spread
from mona_mm.checkpoint.delta import load_delta, save_delta
from mona_mm.errors import ConfigError
from mona_mm.peft_model import PeftModel

OPTIONS = dict(rank=8, alpha=8)
"""The options of LoRA in all variants."""

DEFAULT_ARCHS = ('vit_b', 'dinov2_s', 't')
VARIANTS = ('hf_peft', 'layers', 'backbone')

PLACEMENTS: dict[str, tuple[str, list[str]]] = {
    'attention': (r'.*\.qkv', ['q', 'v']),
    'all': (
        r'.*\.(qkv|attn\.proj|w_msa\.proj|ffn\.layers\.0\.0|ffn\.layers\.1)',
        ['q', 'k', 'v', 'proj', 'fc1', 'fc2'],
    ),
}
"""The layers with LoRA: a regular expression for their paths, and the sites of a backbone."""


@dataclass(frozen=True)
class Row:
    """The figures of one variant.

    Times are in milliseconds, memory in MiB and the file in KiB; a spread is the first and the third quartile. Ratios
    are to ``hf_peft`` in the same round.

    Args:
        forward: the time of a training forward.
        step: the time of a forward, backward and a step of AdamW.
        kept: the memory that the forward keeps for the backward pass, without the parameters.
        memory: ``kept`` and the parameters, buffers, gradients and AdamW's two moments; on CUDA, the most memory
            allocated during a step.
        parameters: the number of values that train.
        file: the size of the files that have to be kept of a tuned model.
        load: the time to read them into a model that has the base and the modules already.
        difference: the largest difference of the output of a model that has just been built from that of ``hf_peft``,
            relative to its largest value.
    """

    arch: str
    size: tuple[int, int]
    batch: int
    dtype: str
    placement: str
    variant: str
    forward: float
    forward_spread: tuple[float, float]
    forward_ratio: float
    forward_ratio_spread: tuple[float, float]
    step: float
    step_spread: tuple[float, float]
    step_ratio: float
    step_ratio_spread: tuple[float, float]
    kept: float
    memory: float
    memory_ratio: float
    parameters: int
    file: float
    file_ratio: float
    load: float
    load_spread: tuple[float, float]
    load_ratio: float
    load_ratio_spread: tuple[float, float]
    difference: float


def import_peft() -> ModuleType:
    """Import Hugging Face's PEFT.

    Raises:
        ConfigError: if it cannot be imported.
    """
    try:
        import peft  # here, because it is an extra, which takes seconds to import
    except ImportError as error:
        raise ConfigError(
            f"--against hf-peft needs Hugging Face's PEFT ({error}): pip install -r requirements/extras.txt"
        ) from None
    return peft


def run(
    device: str = 'cpu',
    repeats: int = 9,
    archs: Sequence[str] = DEFAULT_ARCHS,
    sizes: Sequence[tuple[int, int]] = ((224, 224),),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
    bases: Mapping[str, dict[str, Any]] = ARCHS,
    placements: Sequence[str] = tuple(PLACEMENTS),
) -> Iterator[Row]:
    """Measure the variants on every backbone, size and placement, and yield the rows as soon as they are measured.

    The arguments are those of :func:`mona_mm.benchmark.backbone.run`.

    Raises:
        ConfigError: if Hugging Face's PEFT cannot be imported.
    """
    peft = import_peft()
    for arch in archs:
        base = base_config(bases[arch])
        torch.manual_seed(0)
        stock = MODELS.build(base)
        with _quiet():
            stock.init_weights()
        state = stock.state_dict()
        for placement in placements:
            with _quiet():
                models = {name: build(name, base, state, placement, peft) for name in VARIANTS}
            cases = {name: Case(model, None, device, dtype) for name, model in models.items()}
            for size in sizes:
                images = torch.randn(batch, 3, *size, device=device)
                for case in cases.values():
                    case.outputs = partial(_outputs, images=images)
                label = (arch, tuple(size), batch, str(dtype).removeprefix('torch.'), placement)
                yield from _rows(cases, label, repeats, clock, peft)
            del models, cases, case  # they are freed before the next ones are built


def build(
    variant: str, base: dict[str, Any], state: Mapping[str, Tensor], placement: str, peft: ModuleType | None = None
) -> nn.Module:
    """Build a backbone with the LoRA of a variant.

    Args:
        variant: one of :data:`VARIANTS`.
        base: the config of the stock backbone.
        state: its weights.
        placement: one of :data:`PLACEMENTS`.
        peft: Hugging Face's PEFT, for the variant ``hf_peft``.
    """
    pattern, sites = PLACEMENTS[placement]
    if variant == 'hf_peft':
        stock = MODELS.build(base)
        stock.load_state_dict(state)
        options = dict(r=OPTIONS['rank'], lora_alpha=OPTIONS['alpha'], lora_dropout=0.0)
        return peft.get_peft_model(stock, peft.LoraConfig(target_modules=pattern, **options))
    if variant == 'layers':
        model = PeftModel(base, [dict(path=f're:{pattern}', type='LoRA', **OPTIONS)])
    else:
        model = PeftBackbone(base, dict(type='LoRA', sites=sites, **OPTIONS))
    model.init_weights()
    model.load_state_dict(state, strict=False)
    return model


def _outputs(model: nn.Module, images: Tensor) -> Sequence[Tensor]:
    return model(images)


def save(model: nn.Module, folder: Path) -> int:
    """Save what a tuned model has beside its base, and return the bytes of the files that loading needs."""
    if hasattr(model, 'save_pretrained'):
        model.save_pretrained(str(folder))
        return sum((folder / name).stat().st_size for name in ('adapter_model.safetensors', 'adapter_config.json'))
    file = folder / 'lora.delta.safetensors'
    save_delta(model, file)
    return file.stat().st_size


def load(model: nn.Module, folder: Path, peft: ModuleType) -> None:
    """Load what :func:`save` has written into the same model."""
    if hasattr(model, 'save_pretrained'):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device='cpu'))
    else:
        load_delta(model, folder / 'lora.delta.safetensors')


@torch.no_grad()
def _difference(cases: Mapping[str, Case]) -> dict[str, float]:
    """The largest relative difference of each output from that of ``hf_peft``, in eval mode."""
    outputs = {}
    for name, case in cases.items():
        case.model.eval()
        outputs[name] = [out.float() for out in case.forward()]
        case.model.train()
    pairs = {name: zip(found, outputs['hf_peft'], strict=True) for name, found in outputs.items()}
    return {name: max(((a - b).abs().max() / b.abs().max()).item() for a, b in two) for name, two in pairs.items()}


def _rows(
    cases: Mapping[str, Case], label: tuple, repeats: int, clock: Callable[[], float], peft: ModuleType
) -> Iterator[Row]:
    return_freed_memory()
    differences = _difference(cases)
    taken = take_turns({name: partial(case.seconds, False, clock) for name, case in cases.items()}, repeats)
    forwards = {name: [forward for forward, _ in rounds] for name, rounds in taken.items()}
    steps = {name: [forward + backward for forward, backward in rounds] for name, rounds in taken.items()}
    kept = {name: case.kept() for name, case in cases.items()}
    memory = {name: case.peak() or kept[name] + case.state() for name, case in cases.items()}
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        folders = {name: Path(temporary, name) for name in cases}
        for folder in folders.values():
            folder.mkdir()
        files = {name: save(case.model, folders[name]) for name, case in cases.items()}
        loads = {name: partial(_seconds_to_load, cases[name].model, folders[name], peft, clock) for name in cases}
        loaded = take_turns(loads, repeats)
    for name, case in cases.items():
        load_time = times(loaded[name], loaded['hf_peft'])
        yield Row(
            *label,
            name,
            *times(forwards[name], forwards['hf_peft']),
            *times(steps[name], steps['hf_peft']),
            kept=kept[name] / 2**20,
            memory=memory[name] / 2**20,
            memory_ratio=memory[name] / memory['hf_peft'],
            parameters=sum(p.numel() for p in case.model.parameters() if p.requires_grad),
            file=files[name] / 2**10,
            file_ratio=files[name] / files['hf_peft'],
            load=load_time[0],
            load_spread=load_time[1],
            load_ratio=load_time[2],
            load_ratio_spread=load_time[3],
            difference=differences[name],
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the lines that each initialised parameter and each loaded delta write to the log."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _seconds_to_load(model: nn.Module, folder: Path, peft: ModuleType, clock: Callable[[], float]) -> float:
    start = clock()
    load(model, folder, peft)
    return clock() - start


def header(row: Row) -> str:
    """The head of the table in Markdown; a ratio below 1 means faster or smaller than Hugging Face's PEFT."""
    columns = ['backbone', 'image', 'batch', 'type', 'LoRA', 'variant', 'forward, ms', 'ratio', 'step, ms', 'ratio']
    columns += ['memory, MiB', 'ratio', 'parameters', 'file, KiB', 'ratio', 'load, ms', 'ratio', 'difference']
    return heading(columns)


def line(row: Row) -> str:
    """The line of a row in the table in Markdown."""
    return cells(
        (
            LABELS[row.arch],
            f'{row.size[0]}x{row.size[1]}',
            f'{row.batch}',
            row.dtype,
            row.placement,
            row.variant,
            with_spread(row.forward, row.forward_spread),
            with_spread(row.forward_ratio, row.forward_ratio_spread),
            with_spread(row.step, row.step_spread),
            with_spread(row.step_ratio, row.step_ratio_spread),
            f'{row.memory:,.0f}',
            f'{row.memory_ratio:.2f}',
            f'{row.parameters:,}',
            f'{row.file:,.0f}',
            f'{row.file_ratio:.2f}',
            with_spread(row.load, row.load_spread),
            with_spread(row.load_ratio, row.load_ratio_spread),
            f'{row.difference:.0e}',
        )
    )
