"""The time and memory of a training step and of inference of a detector, with every method, stock, and fully tuned.

The detectors are those of the shipped configs, and the images and boxes are random. The variants and figures are those
of :mod:`mona_mm.benchmark.backbone`. The neck and the heads train in all variants.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mona_mm.benchmark.backbone import (
    Case,
    Row,
    build_backbone,
    build_cases,
    choose_variants,
    count_operations,
    measure,
)
from mona_mm.benchmark.module import rates
from mona_mm.config.load import adapt_to_device, load_config

CONFIGS = {
    't': '_base_/voc_retinanet_swin_t.py',
    'b': '_base_/coco_cascade_mask_rcnn_swin_b.py',
    'l': '_base_/voc_retinanet_swin_l.py',
}
"""The config of the detector of each Swin, as a path in ``configs/``."""


def run(
    configs: str,
    device: str = 'cpu',
    repeats: int = 9,
    archs: Sequence[str] = ('t',),
    sizes: Sequence[tuple[int, int]] = ((512, 512),),
    methods: Sequence[str] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    inference: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Measure every variant on every detector at every size.

    The other arguments and the rows are those of :func:`mona_mm.benchmark.backbone.run`.

    Args:
        configs: the folder of the shipped configs, or of others with the paths in :data:`CONFIGS`.
    """
    variants = choose_variants(methods, inference)
    speed = rates(device, dtype, clock)
    for arch in archs:
        cfg = load_config(f'{configs}/{CONFIGS[arch]}')
        adapt_to_device(cfg)
        init_default_scope('mmdet')
        cases = build_cases(variants, partial(build_detector, cfg=cfg), device, dtype)
        for size in sizes:
            data = _data(cfg, size, batch)
            for case in cases.values():
                case.outputs = partial(_outputs, data=data)
            base, shape = cfg.model.backbone, (batch, 3, *size)
            stock = Case(build_detector('stock', cfg), partial(_outputs, data=data), device, dtype)
            stock.model.train(not inference)
            with FlopCounterMode(display=False) as counter:  # which knows only the operations of the plain forms
                stock.infer() if inference else sum(stock.forward()).backward()
            del stock
            rest = counter.get_total_flops() - count_operations('stock', base, shape, inference)
            operations = {variant: rest + count_operations(variant, base, shape, inference) for variant in variants}
            label = ('detector', arch, tuple(size), batch, str(dtype).removeprefix('torch.'))
            yield from measure(cases, label, operations, speed, repeats, inference, clock)
        del cases, case  # they are freed before the next ones are built


def build_detector(variant: str, cfg: Config) -> nn.Module:
    """The config's detector with the backbone of a variant."""
    model = MODELS.build(cfg.model)
    model.backbone = build_backbone(variant, cfg.model.backbone)
    return model


def _data(cfg: Config, size: tuple[int, int], batch: int) -> dict:
    from mmdet.testing import demo_mm_inputs  # here, because it takes a second to import

    masks = 'mask' in str(cfg.model.get('roi_head', {}))
    return demo_mm_inputs(batch, [[3, *size]] * batch, num_items=[8] * batch, num_classes=20, with_mask=masks)


def _outputs(model: nn.Module, data: dict) -> list[Tensor]:
    data = model.data_preprocessor(data, model.training)
    inputs = data['inputs'], data['data_samples']  # passed by position: the names of the parameters differ
    if not model.training:
        model.predict(*inputs, rescale=False)
        return []
    return [model.parse_losses(model.loss(*inputs))[0]]
