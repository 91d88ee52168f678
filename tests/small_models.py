"""A small model around a Swin with every method and rule, its data, and what training makes of it."""

import torch
from conftest import SMALL_SWIN
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from suite import METHOD_CONFIGS
from torch import nn

from mona_mm.checkpoint.delta import changing

RULES = {rule: dict(trainable=rule) for rule in ('bitfit', 'norm_tuning', 'partial_1', 'fixed', 'full')}


IN_BFLOAT16 = {  # the frozen weights
    'lora-bfloat16': dict(peft=METHOD_CONFIGS['lora'], frozen_dtype='bfloat16'),
    'bitfit-bfloat16': dict(trainable='bitfit', frozen_dtype='bfloat16'),
}


METHODS = {**{name: dict(peft=peft) for name, peft in METHOD_CONFIGS.items()}, **RULES, **IN_BFLOAT16}


@MODELS.register_module()
class SmallModel(BaseModel):
    """A backbone and a head with a BatchNorm: what a detector's delta has to hold, in milliseconds."""

    def __init__(self, backbone, classes=5, width=16, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        with torch.no_grad():
            channels = self.backbone(torch.zeros(1, 3, 32, 32))[-1].shape[1]
        self.head = nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        out = self.head(self.backbone(x)[-1])
        return dict(loss=out.square().mean()) if mode == 'loss' else out


@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    METAINFO = metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)))


def small_config(base_file, method, **model) -> dict:
    base = dict(SMALL_SWIN, init_cfg=dict(type='Pretrained', checkpoint=str(base_file)))
    return dict(type='SmallModel', backbone=dict(type='mona_mm.PeftBackbone', base=base, **method), **model)


def build(base_file, method, **model) -> BaseModel:
    """As a Runner builds it for testing: nobody calls init_weights."""
    built = MODELS.build(small_config(base_file, method, **model))
    built.eval()
    return built


def trained(base_file, method, **model) -> BaseModel:
    """A model whose training has changed everything that it may change."""
    built = build(base_file, method, **model)
    built.init_weights()
    torch.manual_seed(sum(map(ord, str(method))))
    state = built.state_dict()
    with torch.no_grad():
        for name in changing(built):
            state[name].add_(torch.randn_like(state[name]) * 0.1 if state[name].is_floating_point() else 3)
            if name.endswith('running_var'):
                state[name].abs_()
    built.eval()
    return built


def predict(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)))
