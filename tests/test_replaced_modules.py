"""Modules that are replaced after a method has been attached, as converters of BatchNorm do, still reach the method."""

import copy

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError

MSCAN = dict(type='mmseg.MSCAN', embed_dims=[8] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)  # its blocks' norms are hooked
MONA = dict(type='Mona', bottleneck=4)
CONVERTERS = {
    'to BatchNorm': ('SyncBN', revert_sync_batchnorm),
    'to SyncBatchNorm': ('BN', nn.SyncBatchNorm.convert_sync_batchnorm),
}


def backbone(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return PeftBackbone(base=dict(MSCAN, norm_cfg=dict(type=norm)), peft=MONA)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)  # for DropPath as well
    return model(torch.randn(2, 3, 64, 64))


def norms(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize('converter', CONVERTERS)
@pytest.mark.parametrize('training', [False, True])
def test_the_method_acts_behind_a_converted_norm(converter, training):
    norm, convert = CONVERTERS[converter]
    model = backbone(norm)
    expected = copy.deepcopy(model).train(training)  # without a group of processes both kinds compute the same
    if not training:
        model.eval()
    before = norms(model)
    convert(model)
    assert norms(model).isdisjoint(before)
    if training:
        model.train()  # as every epoch begins
    for out, want in zip(outputs(model), outputs(expected), strict=True):
        assert torch.equal(out, want)
    if training:
        for name, buffer in expected.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        sum(out.sum() for out in outputs(model)).backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if '.peft.' in name)


def test_a_replaced_module_in_training_is_an_error():
    """Computing the block again would update the statistics of its norms twice."""
    model = backbone('SyncBN').train()
    revert_sync_batchnorm(model)
    with pytest.raises(ConfigError, match=r'was replaced .* Call the train\(\) or eval\(\)'):
        outputs(model)
    outputs(model.train())
