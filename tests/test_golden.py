"""The published code's outputs and gradients, method by method, through the public conversion of its names."""

import json

import pytest
import torch
from conftest import golden, golden_swin_config, part, shared

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


def close(actual, expected, name=None):
    # The relative part is for the LoRand module's gradients, which are near 1000: float32 itself is coarser there.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-6, msg=name)


@pytest.mark.parametrize('method', ['mona', 'adapter', 'adaptformer', 'lora'])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_parity(library, method):
    """Outputs, input gradient and every parameter gradient of the published code, within 1e-4."""
    tensors, metadata = golden(f'swin_{method}')
    base = dict(type=f'{library}.SwinTransformer', **golden_swin_config(metadata))
    model = PeftBackbone(base=base, **PEFT[method])
    model.load_state_dict(convert_state_dict(part(tensors, 'state/')), strict=True)
    model.eval()
    x = tensors['input'].requires_grad_()
    outs = model(x)
    for i, out in enumerate(outs):
        close(out, tensors[f'output/{i}'])
    sum((out * tensors[f'cotangent/{i}']).sum() for i, out in enumerate(outs)).backward()
    close(x.grad, tensors['grad_input'])
    expected = convert_state_dict(part(tensors, 'grad/'))
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient, name)
    assert count_trainable(model).trainable == int(metadata['trainable'])


def test_lorand_module_parity():
    """One published LoRand module: output, input gradient and gradients of every factor and bias."""
    tensors, metadata = golden('lorand_module')
    module = LoRand(int(metadata['channels']), inner=int(metadata['inner']), branches=int(metadata['branches']))
    block = 'layers.0.blocks.0.my_module_1.'
    prefix = 'stages.0.blocks.0.peft.attn_out.'

    def ours(group):
        published = {f'{block}{name}': t for name, t in part(tensors, f'{group}/').items()}
        return part(convert_state_dict(published), prefix)

    module.load_state_dict(ours('state'), strict=True)
    x = tensors['input'].requires_grad_()
    out = module(x, (5, 6))
    close(out, tensors['output'])
    out.backward(tensors['cotangent'])
    close(x.grad, tensors['grad_input'])
    for name, gradient in ours('grad').items():
        close(module.get_parameter(name).grad, gradient, name)


@pytest.mark.parametrize('method', PEFT)
def test_trainable_names(method):
    """Exactly the published set of trainable parameters, name by name, and their number."""
    published = json.loads(shared('golden/trainable_names.json').read_text())[method]
    _, metadata = golden('swin_mona')
    model = PeftBackbone(base=dict(type='mmdet.SwinTransformer', **golden_swin_config(metadata)), **PEFT[method])
    # Values are of no interest, shapes little: two rows, so that a fused tensor can be cut into its slices.
    expected = convert_state_dict({name: torch.zeros(2, 4) for name in published['trainable_with_gradient']})
    assert set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert count_trainable(model).trainable == published['trainable_params']
