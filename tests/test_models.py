"""The simple feature pyramid: sizes, what it computes, and what it refuses."""

import pytest
import torch
from helpers import assert_near
from mmengine.registry import MODELS

from mona_mm.errors import ConfigError


def build(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS.build(dict(type='mona_mm.SimpleFeaturePyramid', in_channels=16, out_channels=8, **options))


def test_sizes():
    """From one map of a patch of 14: strides 3.5, 7, 14, 28, and what is subsampled beyond; odd sizes, too."""
    maps = build(num_outs=6)([torch.randn(2, 16, 12, 17)])
    sizes = [(48, 68), (24, 34), (12, 17), (6, 8), (3, 4), (2, 2)]
    assert [tuple(m.shape) for m in maps] == [(2, 8, *size) for size in sizes]
    assert torch.equal(maps[4], maps[3][..., ::2, ::2])


def test_one_map_each():
    """Several maps: the i-th makes the i-th scale."""
    neck = build(scales=(2, 1)).double()
    a, b = torch.randn(2, 1, 16, 4, 5, dtype=torch.float64)
    for expected, actual in zip((neck([a])[0], neck([b])[1]), neck([a, b]), strict=True):
        assert_near(actual, expected)


def test_places_stay_where_they_are():
    """A cell that differs changes what lies over it, and nothing beyond the reach of the convolutions."""
    neck = build(scales=(4, 1)).double().eval()
    x = torch.randn(1, 16, 9, 9, dtype=torch.float64)
    y = x.clone()
    y[..., 4, 4] += 1
    fine, coarse = ((a - b).abs().sum(1)[0] > 0 for a, b in zip(neck([x]), neck([y]), strict=True))
    assert fine[16:20, 16:20].all() and not fine[:15].any() and not fine[:, 21:].any()
    assert coarse[3:6, 3:6].all() and not coarse[:3].any() and not coarse[:, 6:].any()


@pytest.mark.parametrize(
    ('options', 'named'),
    [(dict(scales=(1, 2)), 'scales='), (dict(scales=(3,)), 'scales='), (dict(num_outs=2), 'num_outs=2')],
)
def test_what_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        build(**options)
    with pytest.raises(ConfigError, match='2 maps'):
        build()([torch.randn(1, 16, 4, 4)] * 2)
