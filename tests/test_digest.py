"""The digest of a tensor: which changes it notices, that it is the same everywhere, and what a fingerprint tells."""

import pytest
import torch
from conftest import needs_gpu

from mona_mm.nn import digest as module
from mona_mm.nn.digest import differing, digest, digests, fingerprint

ROW = module._ROW
ARANGE = 13134392910837446776
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(*shape, generator=generator) > 0.5
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def test_the_definition():
    """Python's own whole numbers, by the formula in the docstring, give the same; so does the code off the CPU."""
    tensor = values(5 * ROW + 7)  # two rows and a half, and half a word
    words = [int.from_bytes(piece, 'little') for piece in split(tensor.numpy().tobytes() + bytes(4), 8)]
    lower, upper = (keys.tolist() for keys in module._keys(torch.device('cpu'), 0))
    assert all(1 <= key <= 2**32 for key in lower) and all(2**31 < key <= 3 * 2**31 for key in upper)
    total = 0
    for j, row in enumerate(split(words, ROW)):
        halves = ((word & 0xFFFFFFFF, (word >> 32) - (word >> 63 << 32)) for word in row)
        r = sum((low + lower[i]) * (up + upper[i]) for i, (low, up) in enumerate(halves))
        total += (2 * j + 1) * 0x9E3779B97F4A7C15 * r
    expected = module._mixed((total ^ module._shape_number(tuple(tensor.shape))) % 2**64)
    assert digest(tensor) == expected
    pieces = tensor.view(torch.uint8)[: 2 * ROW * 8].view(torch.int64).view(2, ROW)
    keys = module._keys(torch.device('cpu'), 0)
    assert torch.equal(module._row_sums(pieces, *keys), module._row_sums_by_numpy(pieces, *keys))


def split(values, length: int) -> list:
    return [values[i : i + length] for i in range(0, len(values), length)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64], ids=str)
def test_every_single_bit(dtype):
    """In the first row, a full one and the last, short one, with an end that is no whole word: none gives the same."""
    tensor = values(2 * ROW * 8 // dtype.itemsize + 3, dtype=dtype)
    octets = tensor.view(torch.uint8)
    seen = {digest(tensor)}
    places = [0, 5, ROW * 8 - 1, ROW * 8, len(octets) - 1, len(octets) - 4]
    for place in places:
        for bit in range(8):
            octets[place] ^= 1 << bit
            seen.add(digest(tensor))
            octets[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(places) and digest(tensor) in seen


def test_values_that_changed_places():
    """Neighbours in one word, in two words, in two rows, and whole rows; values with few bits and their negatives."""
    for tensor in (values(4 * ROW), values(4 * ROW).bfloat16().float(), values(4 * ROW).sign()):
        seen = {digest(tensor)}
        pairs = [(0, 1), (1, 2), (0, 2), (3, 9), (5, 2 * ROW + 5), (1, 4 * ROW - 1)]
        pairs = [(i, next(k for k in range(j, 4 * ROW) if tensor[k] != tensor[i])) for i, j in pairs[:-1]] + pairs[-1:]
        pairs = {(i, j) for i, j in pairs if tensor[i] != tensor[j]}
        assert len(pairs) > 3
        for i, j in pairs:
            other = tensor.clone()
            other[i], other[j] = tensor[j], tensor[i]
            seen.add(digest(other))
        seen.add(digest(tensor.view(2, -1).flip(0).flatten()))
        assert len(seen) == len(pairs) + 2


def test_many_small_changes_spread_over_all_bits():
    """Of 4,000 tensors that differ in high bits alone, no two share even 32 bits, and two bytes are evenly spread."""
    tensor = torch.zeros(64)
    found = []
    for i in range(4000):
        tensor[i % 64] = float(i // 64 + 1)
        found.append(digest(tensor))
    assert len({each & 0xFFFFFFFF for each in found}) == len({each >> 32 for each in found}) == 4000
    assert len({each & 0xFFFF for each in found}) > 3700  # of 65,536, at random 3,880


def test_shape_seed_and_view():
    """The shape counts, a seed gives another digest, and memory layout, offset and gradients do not matter."""
    tensor = values(6, 4)
    assert digest(tensor) != digest(tensor.view(4, 6)) != digest(tensor.flatten())
    assert digest(tensor) != digest(tensor, seed=1)
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 3)) and digest(torch.zeros(())) != digest(torch.zeros(1))
    assert digest(tensor.t()) == digest(tensor.t().contiguous()) == digest(tensor.t().clone().requires_grad_())
    larger = values(50)
    assert digest(larger[3:]) == digest(larger[3:].clone())


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_the_same_for_all_time_and_everywhere(dtype, device):
    """On every device; and it is what it was, since files hold it."""
    tensor = values(3 * ROW + 5, dtype=dtype)
    assert digest(tensor.to(device)) == digest(tensor)
    mixed = digests({'a': tensor.to(device), 'b': tensor, 'c': tensor[:1].to(device)})
    assert mixed == {'a': digest(tensor), 'b': digest(tensor), 'c': digest(tensor[:1])}
    assert digest(torch.arange(10.0)) == ARANGE


def test_a_fingerprint_is_of_values():
    """Half precision has the fingerprint of the same values in float32; one that differs is named, and so are all that
    a fingerprint of two bytes each cannot tell apart."""
    frozen = {f'{i}.weight': values(9, i + 2).bfloat16() for i in range(5)} | {'n': torch.tensor(3)}
    known = fingerprint(frozen)
    floats = {name: t.float() if t.is_floating_point() else t for name, t in frozen.items()}
    assert fingerprint(floats) == known and not differing(known, floats)
    floats['3.weight'][2, 2] += 1
    assert differing(known, floats) == ['3.weight']
    with pytest.raises(ValueError, match='6 tensors.* 5'):
        differing(known, {name: t for name, t in floats.items() if name != 'n'})
