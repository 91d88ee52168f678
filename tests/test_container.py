"""The one container: readable in any viewer, whole or refused, and earlier formats named with what wrote them."""

import base64
import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from mona_mm.checkpoint import container
from mona_mm.checkpoint.container import HeaderTooLongError, Kind
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.errors import CheckpointMismatchError, MissingFileError, PlanError, SensitivityError
from mona_mm.spt import Plan
from mona_mm.spt.sensitivity import Sensitivity
from mona_mm.version import __version__

KIND = Kind('thing', 'mona_mm.thing/3', SensitivityError, renewal='Make it anew.')
TENSORS = {'a.weight': torch.arange(6.0).view(2, 3), 'b': torch.tensor(3), 'none': torch.zeros(0, 2)}
FIELDS = dict(text='x = 1\ny = "2"', numbers=[1, 2.5, None, True], nested=dict(a=dict(b=[[]])), numpy=np.arange(2))


@pytest.fixture
def file(tmp_path):
    container.write(tmp_path / 'a.safetensors', KIND, TENSORS, FIELDS)
    return tmp_path / 'a.safetensors'


def test_round_trip(file):
    """Tensors and fields come back; views of one memory, too."""
    tensors, fields = container.read(file, KIND)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    assert fields == {**FIELDS, 'numpy': [0, 1]}
    container.write(file, KIND, {'a': TENSORS['a.weight'], 'row': TENSORS['a.weight'][1]}, {})
    assert torch.equal(container.read(file, KIND)[0]['row'], torch.tensor([3.0, 4.0, 5.0]))


def test_any_viewer_can_read_it(file):
    """safetensors itself shows the tensors under their names, and each field as JSON."""
    with safe_open(file, 'pt') as opened:
        metadata, names = opened.metadata(), set(opened.keys())
        assert torch.equal(opened.get_tensor('a.weight'), TENSORS['a.weight'])
    assert names == TENSORS.keys()
    assert metadata['format'] == 'mona_mm.thing/3' and metadata['mona_mm_version'] == __version__
    assert {name: json.loads(metadata[name]) for name in FIELDS} == {**FIELDS, 'numpy': [0, 1]}


def test_every_flipped_bit_is_noticed(file):
    """In the length, the header and the values: none is read."""
    data = bytearray(file.read_bytes())
    for i in range(len(data)):
        data[i] ^= 1 << i % 8
        file.write_bytes(data)
        with pytest.raises(SensitivityError, match=r'a\.safetensors cannot be read as a thing'):
            container.read(file, KIND)
        data[i] ^= 1 << i % 8


def test_a_field_that_looks_like_the_place_of_the_digest(tmp_path):
    """The digest is put in its own place."""
    text = f'"digest":"{"0" * 64}"'
    container.write(tmp_path / 'a.safetensors', KIND, {}, dict(a=text, digest2='0' * 64))
    assert container.read(tmp_path / 'a.safetensors', KIND)[1]['a'] == text


def test_values_that_are_not_finite(tmp_path):
    """They are refused on both sides, and nothing is written, unless they are meant."""
    tensors, file = {'a': torch.tensor([1.0, torch.nan])}, tmp_path / 'a.safetensors'
    with pytest.raises(SensitivityError, match='is not written: a holds 1 of 2'):
        container.write(file, KIND, tensors, {})
    assert not file.exists()
    container.write(file, KIND, tensors, {}, allow_nonfinite=True)
    with pytest.raises(SensitivityError, match='a holds 1 of 2'):
        container.read(file, KIND)
    assert container.read(file, KIND, allow_nonfinite=True)[0]['a'][1].isnan()


@pytest.mark.parametrize('value', ['x' * 2**20, json.loads('[' * 40 + ']' * 40)], ids=['long', 'deep'])
def test_what_would_not_be_read_is_not_written(value, tmp_path):
    with pytest.raises(HeaderTooLongError):
        container.write(tmp_path / 'a.safetensors', KIND, {}, dict(a=value))
    assert not [*tmp_path.iterdir()]


def test_what_is_no_such_file(file, tmp_path):
    """Each in one line of the kind's own error."""
    with pytest.raises(MissingFileError, match='There is no thing'):
        container.read(tmp_path / 'nowhere', KIND)
    other = Kind('plan', 'mona_mm.plan/1', PlanError, renewal='')
    with pytest.raises(PlanError, match=r"its format is 'mona_mm\.thing/3' and not 'mona_mm\.plan/1'"):
        container.read(file, other)
    safetensors.torch.save_file(TENSORS, tmp_path / 'b.safetensors')
    for content in ((tmp_path / 'b.safetensors').read_bytes(), b'', b'PK\x03\x04' + bytes(99)):
        file.write_bytes(content)
        with pytest.raises(SensitivityError, match='safetensors file of mona_mm') as caught:
            container.read(file, KIND)
        assert '\n' not in str(caught.value) and caught.value.__cause__ is not None


def old_delta(path, version) -> None:
    """As the first format had it: the header compressed, and many tensors packed in one."""
    text = json.dumps(dict(methods={}, versions=version))
    header = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    metadata = dict(format='mona_mm.delta/1', method='', header=header, digest='0' * 64)
    safetensors.torch.save_file({'torch.float32': torch.ones(3)}, path, metadata)


@pytest.mark.parametrize(
    ('version', 'named'),
    [(dict(mona_mm='0.1.0'), 'mona_mm 0.1.0'), ({}, 'another version'), (dict(mona_mm='a\nb'), 'another version')],
)
def test_deltas_of_the_first_format(version, named, tmp_path):
    """They are refused with their format, the version that wrote them, and what to do."""
    old_delta(tmp_path / 'a.delta.safetensors', version)
    with pytest.raises(CheckpointMismatchError) as caught:
        read_delta(tmp_path / 'a.delta.safetensors')
    words = str(caught.value)
    assert f"'mona_mm.delta/1', written by {named}" in words
    assert 'tools/delta.py extract' in words and '\n' not in words


def test_a_bomb_in_the_header_of_the_first_format(tmp_path):
    """Only a mebibyte of it is unpacked."""
    packed = base64.b85encode(zlib.compress(b' ' * 2**28, 9)).decode()
    metadata = dict(format='mona_mm.delta/1', method='', header=packed, digest='0' * 64)
    safetensors.torch.save_file({'a': torch.ones(3)}, tmp_path / 'a.delta.safetensors', metadata)
    with pytest.raises(CheckpointMismatchError, match='written by another version'):
        read_delta(tmp_path / 'a.delta.safetensors')


@pytest.mark.parametrize(('read', 'kind'), [(Plan.load, 'plan'), (Sensitivity.load, 'sensitivity')])
def test_plans_of_the_first_format(read, kind, tmp_path):
    metadata = {'format': f'mona_mm.spt.{kind}/1', 'mona_mm_version': '0.0.9', 'checksum': '0' * 64}
    safetensors.torch.save_file({'a': torch.ones(3)}, tmp_path / 'a.safetensors', metadata)
    with pytest.raises(PlanError, match=rf"'mona_mm\.spt\.{kind}/1', written by mona_mm 0\.0\.9.*spt_sensitivity"):
        read(tmp_path / 'a.safetensors')
