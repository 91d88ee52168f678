"""The benchmark measures what it says, on backbones too small to tell anything else."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from mona_mm.benchmark import backbone
from mona_mm.benchmark.backbone import Case, build_backbone, count_operations
from mona_mm.benchmark.plot import plot_cost

TINY = dict(t=dict(embed_dims=64, depths=(1, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1), window_size=7))
BASE = dict(type='mmdet.SwinTransformer', **TINY['t'])


def rows(**options):
    arguments = dict(repeats=2, archs='t', sizes=[(64, 64), (64, 96)], bases=TINY) | options
    return list(backbone.run(**arguments))


@pytest.fixture(scope='module')
def measured():
    return rows(methods=['mona', 'adapter', 'fixed', 'partial_1'], repeats=1)


def test_every_way_is_measured(measured):
    """References and methods at every size; ratios are to full tuning; what trains less needs less memory."""
    assert len(measured) == 2 * 7
    ways = {row.way: row for row in measured if row.size == (64, 96)}
    assert set(ways) == {*backbone.REFERENCES, 'mona', 'adapter', 'fixed', 'partial_1'}
    assert ways['full'].step_ratio == ways['full'].memory_ratio == 1
    for row in measured:
        assert 0 < row.forward <= row.step
        assert row.step_spread[0] <= row.step <= row.step_spread[1]
        assert row.memory == pytest.approx(row.kept + row.state)
        assert row.floor > 0
    assert ways['fixed'].kept == 0
    assert ways['fixed'].state < ways['adapter'].state < ways['full'].state
    assert 0 < ways['partial_1'].kept < ways['full'].kept
    assert ways['fixed'].floor < ways['adapter'].floor < ways['full'].floor


def test_table_targets_and_picture(measured, tmp_path):
    """A line of the table for every row, three sentences for every size, and a PNG."""
    assert len(backbone.table(measured).splitlines()) == 2 + len(measured)
    sentences = backbone.targets(measured)
    assert len(sentences) == 6
    assert 'mona takes' in sentences[0] and 'target 1.10' in sentences[0]
    plot_cost(measured, str(tmp_path / 'new' / 'cost.png'))
    assert (tmp_path / 'new' / 'cost.png').read_bytes()[:4] == b'\x89PNG'


def test_inference():
    """Forwards alone, without gradients, against the stock backbone; nothing is kept."""
    measured = rows(inference=True, methods=['mona'], sizes=[(64, 64)])
    ways = {row.way: row for row in measured}
    assert set(ways) == {*backbone.REFERENCES, 'mona', backbone.FOLDED}
    assert ways['stock'].forward_ratio == 1
    assert all(row.step is None and row.kept == 0 for row in measured)
    assert ways['mona'].memory > ways['stock'].memory
    assert len(backbone.table(measured).splitlines()) == 7


def test_published_formula_is_mona():
    """What stands beside `mona` as the published formula computes the same."""
    torch.manual_seed(0)
    ours, published = build_backbone('mona', BASE), build_backbone('published_mona', BASE)
    published.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    for model in (ours, published):
        model.eval()
    for a, b in zip(ours(x), published(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_operations_are_counted():
    """Full tuning multiplies three times for every once of a forward (but for the first layer's input), frozen linears
    twice and attention three times; and a forward is a little more than what its linears' shapes say."""
    shape = (1, 3, 64, 64)
    forward = count_operations('fixed', BASE, shape)
    assert count_operations('stock', BASE, shape, inference=True) == forward
    assert 2.8 < count_operations('full', BASE, shape) / forward < 3.0
    assert 1.6 < count_operations('norm_tuning', BASE, shape) / forward < 2.2
    linears = 2 * (1 * 256 * 12 * 64**2 + 2 * 64 * 12 * 128**2 + 64 * 256 * 128)
    assert 1 < forward / linears < 2  # windows are padded, 16 to 21 and 8 to 14


def test_memory_is_counted():
    """Parameters once, and of what trains gradient and two moments; every kept storage once."""
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 20, bias=False), torch.nn.ReLU(), torch.nn.Linear(20, 5, bias=False)
    )
    model[0].requires_grad_(False)
    x = torch.randn(7, 10)
    case = Case(model, lambda model: [model(x)], 'cpu', torch.float32)
    assert case.state() == 4 * (200 + 100 + 3 * 100)
    assert case.kept() == 4 * 7 * 20  # the second layer's input
    before = model[2].weight.clone()
    case.step()
    assert (model[2].weight != before).any()
    assert case.kept() == 4 * 7 * 20


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--sizes', '224by224'], '--sizes 224by224: a size is'),
        (['--sizes', '0'], '--sizes 0: a size is'),
        (['--repeats', '0'], '--repeats 0'),
        (['--suite', 'module', '--arch', 't'], 'module has the Swins b and l'),
        (['--processor-time'], 'give --threads 1'),
        (['--suite', 'spt', '--plot', 'x.png'], '--plot is of the suites'),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    """One line, and exit status 2."""
    monkeypatch.setattr('sys.argv', ['benchmark.py', *arguments, '--device', 'cpu'])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'tools/benchmark.py'), run_name='__main__')
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_tool(tmp_path):
    """Backbone and detector in one run: tables, figures as JSON, a picture."""
    file, picture = tmp_path / 'figures.json', tmp_path / 'cost.png'
    arguments = '--suite backbone detector --arch t --sizes 64 --methods mona --repeats 1 --device cpu --threads 1'
    command = [sys.executable, '-W', 'ignore', 'tools/benchmark.py', *arguments.split()]
    command += ['--json', str(file), '--plot', str(picture)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    assert set(record) == {'machine', 'backbone', 'detector'}
    for suite in ('backbone', 'detector'):
        assert [row['way'] for row in record[suite]] == [*backbone.REFERENCES, 'mona']
    assert picture.stat().st_size > 10_000
    assert 'mona takes' in result.stdout
