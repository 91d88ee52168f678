"""Methods whose published start perturbs the features can begin as the identity, and train from there."""

import pytest
import torch

from mona_mm.methods import Adapter, CoLin, LoRand, Mona

METHODS = {'Mona': Mona, 'Adapter': Adapter, 'LoRand': LoRand, 'CoLin': CoLin}


@pytest.mark.parametrize('name', METHODS)
def test_begins_as_the_identity_and_trains(name):
    """The module returns its input, exactly. Its up projection alone has a gradient then; after one step of it all
    parameters do, so nothing stays at its start."""
    torch.manual_seed(0)
    module, x = METHODS[name](32, zero_init=True).eval(), torch.randn(2, 12, 32)
    assert torch.equal(module(x, (3, 4)), x)
    target = torch.randn_like(x)

    def gradients():
        module.zero_grad()
        (module(x, (3, 4)) * target).sum().backward()
        return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}

    assert all(n.startswith('up.') for n in gradients())
    with torch.no_grad():
        for p in module.up.parameters():
            p -= 0.1 * p.grad
    assert gradients() == {n for n, _ in module.named_parameters()}
    module.reset_parameters()
    assert torch.equal(module(x, (3, 4)), x)


@pytest.mark.parametrize('name', METHODS)
def test_published_start_is_the_default(name):
    """Without the option the module does not begin as the identity, and draws what it drew before the option."""
    x, draws = torch.randn(1, 12, 32), []
    for options in ({}, dict(zero_init=False)):
        torch.manual_seed(0)
        module = METHODS[name](32, **options).eval()
        draws.append(list(module.parameters()))
        assert not torch.equal(module(x, (3, 4)), x)
    assert all(map(torch.equal, *draws))
