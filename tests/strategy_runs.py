"""A small model and its training on one process or several, for the tests of strategies."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import HOSTS
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from suite import METHOD_CONFIGS, plan_for
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from mona_mm import PeftBackbone
from mona_mm.hosts import find_host
from mona_mm.models import CPUSyncBatchNorm
from mona_mm.nn.sharded import has_whole, whole
from mona_mm.strategies import DDPStrategy, FSDP2Strategy, FSDPStrategy
from mona_mm.strategies.sharded import sharded_parameters

BACKBONES = {
    'swin': dict(
        type='mmdet.SwinTransformer', embed_dims=24, depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)
    ),
    'vit': HOSTS['mmpretrain-vit'],
}
WIDTHS = dict(swin=72, vit=32)
STRATEGIES = dict(ddp=DDPStrategy, fsdp=FSDPStrategy, fsdp2=FSDP2Strategy)
TUNINGS = {
    **{name: dict(peft=config) for name, config in METHOD_CONFIGS.items()},
    'bitfit': dict(trainable='bitfit'),
    'norm-tuning': dict(trainable='norm_tuning'),
    'partial-1': dict(trainable='partial_1'),
    'fixed': dict(trainable='fixed'),
    'full': dict(trainable='full'),
    'spt-lora': dict(type='LoRA', rank=2),
    'lora-bfloat16': dict(peft=METHOD_CONFIGS['lora'], frozen_dtype='bfloat16'),
}
OPTIMIZERS = dict(
    sgd=lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    adamw=lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05),
)
BATCH = 4


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Args:
        host: a key of :data:`BACKBONES`.
        tuning: a key of :data:`TUNINGS`.
        strategy: a key of :data:`STRATEGIES`; not looked at by one process.
        optimizer: a key of :data:`OPTIMIZERS`.
        checkpointed: whether activations are computed again in the backward pass.
        accumulated: the number of batches of which the gradients are added up for a step.
        dtype: the dtype of the model, ``'float32'`` or ``'float64'``.
        norm: whether the head has a synchronised batch normalisation.
    """

    host: str
    tuning: str
    strategy: str = 'ddp'
    optimizer: str = 'sgd'
    checkpointed: bool = False
    accumulated: int = 1
    dtype: str = 'float32'
    norm: bool = False


class Net(BaseModel):
    """A backbone, a linear head of the means of its outputs, and the mean square of its error."""

    def __init__(self, backbone: nn.Module, width: int, norm: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = CPUSyncBatchNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 5)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = 'tensor'):
        means = [out.mean((2, 3)) if out.dim() == 4 else out.mean(1) for out in self.backbone(inputs)]
        scores = self.head(self.norm(torch.cat(means, 1)))
        return dict(loss=(scores - targets).square().mean()) if mode == 'loss' else scores


def build(case: Case, folder: Path) -> Net:
    """The model of a case, the same in every process, without randomness in training."""
    host, tuning = dict(BACKBONES[case.host], drop_path_rate=0.0), TUNINGS[case.tuning]
    if case.tuning.startswith('spt'):
        plan = folder / f'plan-{os.getpid()}.safetensors'
        plan_for(host, tuning).save(plan)
        tuning = dict(peft=dict(type='SPT', plan=str(plan), structured=tuning))
    torch.manual_seed(0)
    backbone = PeftBackbone(base=host, **tuning)
    backbone.init_weights()
    if case.checkpointed:
        turn_on_activation_checkpointing(backbone, list(find_host(backbone).blocks(backbone)))
    model = Net(backbone, WIDTHS[case.host], case.norm)
    if case.dtype == 'float64':
        model = model.double()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # off zero, where some begin
                p.add_(torch.randn(p.shape, generator=numbers).to(p.dtype) * 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
    return model


def wrapped(model: nn.Module, strategy: str) -> nn.Module:
    """A model as a strategy wraps it in its ``prepare``, without the rest of a run."""
    made = object.__new__(STRATEGIES[strategy])
    made.model_wrapper, made.sync_bn, made.find_unused_parameters = None, None, False
    made.logger, made._world_size = MMLogger.get_current_instance(), distributed.get_world_size()
    return made._wrap_model(model)


def batch(step: int, dtype: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The share of one process in the batch of a step."""
    numbers = torch.Generator().manual_seed(100 + step)
    tensors = dict(
        inputs=torch.randn(BATCH, 3, 64, 64, generator=numbers), targets=torch.randn(BATCH, 5, generator=numbers)
    )
    return {name: tensor[rank::world].to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def trained(case: Case, folder: Path, steps: int = 10) -> dict[str, Tensor] | None:
    """The tensors that change in training after so many steps of the optimizer, on the main process."""
    model, rank, world = build(case, folder), 0, 1
    if distributed.is_initialized():
        model, rank, world = wrapped(model, case.strategy), distributed.get_rank(), distributed.get_world_size()
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    optim_wrapper = OptimWrapper(optimizer, accumulative_counts=case.accumulated)
    optim_wrapper.initialize_count_status(model, 0, steps * case.accumulated)
    model.train()
    for step in range(steps * case.accumulated):
        model.train_step(batch(step, case.dtype, rank, world), optim_wrapper)
    keep = has_whole(model)
    with whole(model) as inside:
        if not keep:
            return None
        moved = {name: p for name, p in inside.named_parameters() if p.requires_grad}
        moved |= {name: b for name, b in inside.named_buffers() if name.startswith('norm.')}
        return {name: tensor.detach().clone() for name, tensor in moved.items()}


@dataclass(frozen=True)
class Sent:
    """The bytes of the tensors that one step exchanges, beside those of what trains and of what is sharded."""

    averaged: int
    gathered: int
    scattered: int
    trained: int
    sharded: int


def sent_in_a_step(case: Case, folder: Path) -> Sent:
    """Count what one step exchanges: where torch hands it to the process group."""
    model = build(case, folder)
    trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    sharded = 0 if case.strategy == 'ddp' else sum(p.nbytes for p in sharded_parameters(model))
    model = wrapped(model, case.strategy)
    averaged: list[int] = []
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(averaged, _count_bucket)
    optim_wrapper = OptimWrapper(OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad]))
    model.train()
    with _counted('all_gather_into_tensor', 'all_gather') as gathered, _counted('reduce_scatter_tensor') as scattered:
        model.train_step(batch(0, case.dtype, distributed.get_rank(), distributed.get_world_size()), optim_wrapper)
    return Sent(sum(averaged), sum(gathered), sum(scattered), trained_bytes, sharded)


def _count_bucket(counts: list[int], bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    counts.append(bucket.buffer().nbytes)
    return allreduce_hook(distributed.group.WORLD, bucket)


@contextmanager
def _counted(*names: str) -> Iterator[list[int]]:
    """A context that counts the bytes of the whole tensors in calls of functions of torch.distributed."""
    counts: list[int] = []

    def counting(function: Callable) -> Callable:
        def call(*args, **kwargs):
            given = [each if isinstance(each, list) else [each] for each in (*args, *kwargs.values())]
            counts.append(max(sum(t.nbytes for t in each if isinstance(t, Tensor)) for each in given))
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(distributed, name) for name in names}
    for name, function in originals.items():
        setattr(distributed, name, counting(function))
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(distributed, name, function)


def count_sent(cases: list[Case], folder: str) -> None:
    """Count what a step of every case exchanges, in this process, one of several, and let the main one write it."""
    distributed.init_process_group('gloo')
    found = {case: sent_in_a_step(case, Path(folder)) for case in cases}
    if distributed.get_rank() == 0:
        with open(f'{folder}/sent.pickle', 'wb') as file:
            pickle.dump(found, file)
    distributed.destroy_process_group()


def train_cases(cases: list[Case], folder: str, steps: int) -> None:
    """Train every case in this process, one of several, and let the main one write ``NUMBER.pt``."""
    distributed.init_process_group('gloo')
    for number, case in enumerate(cases):
        tensors = trained(case, Path(folder), steps)
        if distributed.get_rank() == 0:
            torch.save(tensors, f'{folder}/{number}.pt')
    distributed.destroy_process_group()


class Pictures(Dataset):
    """Eight images, each with its targets."""

    metainfo = dict(classes=('disc', 'square'))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = torch.Generator().manual_seed(index)
        inputs, targets = torch.randn(3, 64, 64, generator=numbers), torch.randn(5, generator=numbers)
        return dict(inputs=inputs.double(), targets=targets.double())


def run(
    case: Case, folder: Path, epochs: int, name: str, base: str, checkpoints: str = 'whole', **settings: Any
) -> nn.Module:
    """Train by mmengine's runner, with the hooks of the shipped configs: by the Runner in one process, by a
    FlexibleRunner in several.

    Args:
        case: what is trained.
        folder: where the plans are.
        epochs: the number of epochs, of two steps each.
        name: the name of the work dir in the folder.
        base: the pretrained base of the backbone.
        checkpoints: whether those of sharded weights are ``'whole'`` or ``'sharded'``.
        settings: further arguments of the runner.
    """
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    model = build(case, folder)
    model.backbone.load_state_dict(torch.load(base), strict=False)
    arguments = dict(
        model=model,
        work_dir=str(folder / name),
        train_dataloader=dict(
            batch_size=BATCH // world,
            num_workers=0,
            dataset=Pictures(),
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            constructor='mona_mm.PeftOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            accumulative_counts=case.accumulated,
            paramwise_cfg=dict(norm_decay_mult=0.0, layer_decay_rate=0.9),
        ),
        param_scheduler=[dict(type='LinearLR', by_epoch=False, begin=0, end=4)],
        default_hooks=dict(checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1)),
        custom_hooks=[
            dict(type=f'mona_mm.{hook}')
            for hook in ('ParamFreezeHook', 'LoadCheckHook', 'DeltaCheckpointHook', 'IterationSeedHook')
        ],
        randomness=dict(seed=0),
        experiment_name=f'{name}-{os.getpid()}',
        **settings,
    )
    if world == 1:
        runner = Runner(**arguments)
    else:
        strategy = dict(type=f'mona_mm.{STRATEGIES[case.strategy].__name__}')
        if case.strategy != 'ddp':
            strategy['checkpoints'] = checkpoints
        runner = FlexibleRunner(
            **arguments, strategy=strategy, launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='gloo'))
        )
    with quiet():
        runner.train()
    return runner.model


def run_and_resume(cases: list[Case], folder: str, base: str, deltas: bool = True) -> None:
    """Train two epochs by every case; once more, the second resumed from the first of the next case; and, if there are
    deltas, an epoch from that of the next case."""
    distributed.init_process_group('gloo')
    for number, case in enumerate(cases):
        run(case, Path(folder), 2, f'{number}-whole', base)
    for number, case in enumerate(cases):
        other = (number + 1) % len(cases)
        checkpoint = f'{folder}/{other}-whole/epoch_1.pth'
        run(case, Path(folder), 2, f'{number}-resumed', base, load_from=checkpoint, resume=True)
        if deltas:
            delta = f'{folder}/{other}-whole/epoch_2.delta.safetensors'
            run(case, Path(folder), 1, f'{number}-from-delta', base, load_from=delta)
    distributed.destroy_process_group()


def run_in_parts(cases: list[Case], folder: str, base: str) -> None:
    """Train two epochs by every case with sharded checkpoints, and the second of them again, resumed; and let the main
    process write what both end with."""
    distributed.init_process_group('gloo')
    for number, case in enumerate(cases):
        models = [run(case, Path(folder), 2, f'{number}-whole', base, 'sharded')]
        options = dict(load_from=f'{folder}/{number}-whole/epoch_1.pth', resume=True)
        models.append(run(case, Path(folder), 2, f'{number}-resumed', base, 'sharded', **options))
        for name, model in zip(('whole', 'resumed'), models, strict=True):
            with whole(model) as inside:
                if distributed.get_rank() == 0:
                    torch.save(inside.state_dict(), f'{folder}/{number}-{name}.pt')
    distributed.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which a model does not log how each of its parameters was initialised, and keeps its values."""
    with patch('mmengine.model.base_module.BaseModule.init_weights', lambda self: None):
        yield
