"""A model, data and a score for runs of mmengine's Runner that take milliseconds."""

import logging
from pathlib import Path

import torch
from conftest import SMALL_SWIN
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mona_mm import PeftBackbone


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), float(index)))


class Toy(BaseModel):
    """A Swin, a head, a loss."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features[-1], 1)

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


class Score(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(score=len(results))


def stock_swin() -> nn.Module:
    return MODELS.build(SMALL_SWIN)


def mona_swin(**kwargs) -> nn.Module:
    return PeftBackbone(base=SMALL_SWIN, peft=dict(type='Mona', bottleneck=8), **kwargs)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def log_of(runner: Runner) -> str:
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.flush()
    return Path(runner.logger.handlers[-1].baseFilename).read_text()
