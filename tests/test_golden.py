"""The published code's outputs and gradients, method by method, through the public conversion of its names.

Both were computed in float64 from the same weights and inputs, so that they are equal on every processor; the module of
LoRand, which was computed in float32, within the rounding of its file.
"""

import json

import pytest
import torch
from conftest import GOLDEN, golden, golden_swin_config, part
from helpers import assert_near

from mona_mm import PeftBackbone, count_trainable
from mona_mm.checkpoint import convert_state_dict
from mona_mm.methods import LoRand

PEFT = {
    'mona': dict(peft=dict(type='Mona')),
    'adapter': dict(peft=dict(type='Adapter')),
    'adaptformer': dict(peft=dict(type='AdaptFormer')),
    'lora': dict(peft=dict(type='LoRA')),
    'bitfit': dict(trainable='bias'),
    'norm_tuning': dict(trainable='norm'),
    'partial_1': dict(trainable='last_block'),
    'fixed': dict(trainable='none'),
}


@pytest.mark.parametrize('method', ['mona', 'adapter', 'adaptformer', 'lora'])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_parity(library, method):
    """Outputs, input gradient and every parameter gradient of the published code, each within 1e-11 of its largest."""
    tensors, metadata = golden(f'swin_{method}', torch.float64)
    base = dict(type=f'{library}.SwinTransformer', **golden_swin_config(metadata))
    model = PeftBackbone(base=base, **PEFT[method])
    model.load_state_dict(convert_state_dict(part(tensors, 'state/')), strict=True)
    model.double().eval()
    x = tensors['input'].requires_grad_()
    outs = model(x)
    assert_near(outs, [tensors[f'output/{i}'] for i in range(len(outs))], 1e-11)
    sum((out * tensors[f'cotangent/{i}']).sum() for i, out in enumerate(outs)).backward()
    assert_near(x.grad, tensors['grad_input'], 1e-11)
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_near(actual, convert_state_dict(part(tensors, 'grad/')), 1e-11)
    assert count_trainable(model).trainable == int(metadata['trainable'])


def test_lorand_module_parity():
    """One published LoRand module: output, input gradient and gradients of every factor and bias."""
    tensors, metadata = golden('lorand_module', torch.float64)
    module = LoRand(int(metadata['channels']), inner=int(metadata['inner']), branches=int(metadata['branches']))
    block = 'layers.0.blocks.0.my_module_1.'
    prefix = 'stages.0.blocks.0.peft.attn_out.'

    def ours(group):
        published = {f'{block}{name}': t for name, t in part(tensors, f'{group}/').items()}
        return part(convert_state_dict(published), prefix)

    module.load_state_dict(ours('state'), strict=True)
    module.double()
    x = tensors['input'].requires_grad_()
    out = module(x, (5, 6))
    assert_near(out, tensors['output'])
    out.backward(tensors['cotangent'])
    assert_near(x.grad, tensors['grad_input'])
    assert_near({name: p.grad for name, p in module.named_parameters()}, ours('grad'))


@pytest.mark.parametrize('method', PEFT)
def test_trainable_names(method):
    """Exactly the published set of trainable parameters, name by name, and their number."""
    published = json.loads((GOLDEN / 'trainable_names.json').read_text())[method]
    swin = dict(embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4])
    model = PeftBackbone(base=dict(type='mmdet.SwinTransformer', **swin), **PEFT[method])
    # Values are of no interest, shapes little: two rows, so that a fused tensor can be cut into its slices.
    expected = convert_state_dict({name: torch.zeros(2, 4) for name in published['trainable_with_gradient']})
    assert set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert count_trainable(model).trainable == published['trainable_params']
