"""Operators on boxes and offsets that are not finite, as a diverging model has: zeros there, all else as without them.

torchvision's kernels read outside of the memory for them, which ends the process. The maps have odd sides, since with
even ones the wrong addresses can wrap around to right ones.
"""

import pytest
import torch
from mmcv.ops import DeformRoIPoolPack, RoIAlign, deform_conv2d, modulated_deform_conv2d

NOT_FINITE = [float('nan'), float('inf'), float('-inf')]


@pytest.mark.parametrize('value', NOT_FINITE)
@pytest.mark.parametrize('modulated', [False, True])
def test_deformable_convolution(value, modulated):
    """A tap at such a position is outside of the map, as in mmcv: it adds nothing, and its offset has no gradient."""
    torch.manual_seed(0)
    x, weight, mask = torch.randn(1, 4, 7, 7), torch.randn(4, 4, 3, 3), torch.rand(1, 9, 7, 7)
    results = []
    for place in (value, 1e4):
        offset = torch.full((1, 18, 7, 7), 0.3)
        offset[:, 4, 2] = place
        offset.requires_grad_()
        if modulated:
            y = modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)
        else:
            y = deform_conv2d(x, offset, weight, 1, 1, 1)
        y.square().sum().backward()
        assert not offset.grad[:, 4, 2].any() and offset.grad.isfinite().all()
        results += [y, offset.grad]
    assert results[0].any() and torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize('value', NOT_FINITE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('kind', ['avg', 'max', 'adaptive', 'deformable'])
def test_boxes(value, dtype, kind):
    """A box with such a coordinate gives zeros and no gradient, and the other box what it gives alone."""
    if kind == 'deformable' and dtype == torch.float16:
        pytest.skip('its offsets come from layers, which are in float32')
    torch.manual_seed(0)
    layer = (
        DeformRoIPoolPack((3, 3), 4, 8)
        if kind == 'deformable'
        else RoIAlign(3, 1.0, 0 if kind == 'adaptive' else 2, 'max' if kind == 'max' else 'avg')
    )
    good = torch.tensor([[0.0, 1, 1, 8, 8]], dtype=dtype)
    results = []
    for bad in ([], [[0, 2, value, 8, 8]], [[0, value, 2, value, value]]):
        x = torch.randn(1, 4, 17, 17, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y = layer(x, torch.cat((good, torch.tensor(bad, dtype=dtype).view(-1, 5))))
        y.float().square().sum().backward()
        results.append((y[:1], x.grad))
        assert not y[1:].any()
    assert results[0][0].any()
    for y, gradient in results[1:]:
        torch.testing.assert_close(y, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
