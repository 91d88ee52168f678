"""The benchmark measures what it says, on backbones too small to tell anything else."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import ROOT
from helpers import assert_equal, assert_near
from mmengine.registry import MODELS
from torch import nn

from mona_mm.benchmark import backbone, hf_peft, plain
from mona_mm.benchmark.backbone import (
    DEPLOYED,
    VARIANTS,
    Case,
    build_backbone,
    build_cases,
    choose_variants,
    count_operations,
)
from mona_mm.benchmark.plot import plot_cost
from mona_mm.benchmark.records import read_records, write_record
from mona_mm.commands.cli import run
from mona_mm.errors import ConfigError, MissingFileError

TINY = dict(t=dict(embed_dims=64, depths=(1, 2), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1), window_size=7))
BASE = dict(type='mmdet.SwinTransformer', **TINY['t'])


def rows(**options):
    arguments = dict(repeats=2, archs='t', sizes=[(64, 64), (64, 96)], bases=TINY) | options
    with mock.patch.object(backbone, 'rates', return_value=(1e11, 1e10)):  # measuring them takes longest
        return list(backbone.run(**arguments))


@pytest.fixture(scope='module')
def measured():
    return rows(methods=['stock', 'mona', 'adapter', 'fixed', 'partial_1'], repeats=1)


def table(measured):
    lines = [backbone.header(measured[0]), *map(backbone.line, measured)]
    return '\n'.join(lines).splitlines()


def test_ways_asked_for_are_measured(measured):
    """Exactly these and the reference, at every size; ratios are to it; what trains less needs less memory."""
    asked = ['stock', 'full', 'mona', 'adapter', 'fixed', 'partial_1']
    assert [(row.size, row.variant) for row in measured] == [
        (size, variant) for size in ((64, 64), (64, 96)) for variant in asked
    ]
    variants = {row.variant: row for row in measured if row.size == (64, 96)}
    assert variants['full'].step_ratio == variants['full'].memory_ratio == 1
    for row in measured:
        assert 0 < row.forward <= row.step
        assert row.step_spread[0] <= row.step <= row.step_spread[1]
        assert row.memory == pytest.approx(row.kept + row.state)
        assert row.floor > 0
    assert variants['fixed'].kept == 0
    assert variants['fixed'].state < variants['adapter'].state < variants['full'].state
    assert 0 < variants['partial_1'].kept < variants['full'].kept
    assert variants['fixed'].floor < variants['adapter'].floor < variants['full'].floor


def test_which_variants():
    """All by default; those asked for and no other reference than the ratios need; deployed forms do not train."""
    assert choose_variants(None, True) == list(VARIANTS)
    assert choose_variants(None, False) == [variant for variant in VARIANTS if variant not in DEPLOYED]
    assert choose_variants(['mona'], False) == ['full', 'mona']
    assert choose_variants(['mona', 'full', 'adapter'], False) == ['full', 'mona', 'adapter']
    assert choose_variants(['lora_merged', 'lora'], True) == ['stock', 'lora', 'lora_merged']
    with pytest.raises(ConfigError, match='lora_merged: a deployed form does not train; add --inference'):
        choose_variants(['mona', 'lora_merged'], False)


def test_table_targets_and_picture(drawn_charts, measured, tmp_path):
    """A line of the table for every row, three sentences for every size, and a PNG of several Swins and batches."""
    lines = table(measured)
    assert len(lines) == 2 + len(measured)
    assert {line.count('|') for line in lines} == {12}
    assert 'ratio to full' in lines[0]
    sentences = backbone.targets(measured)
    assert len(sentences) == 6
    assert 'mona takes' in sentences[0] and 'target 1.10' in sentences[0]
    others = [replace(row, arch='l', batch=batch) for row in measured for batch in (1, 2)]
    plot_cost([*measured, *others], str(tmp_path / 'new' / 'cost.png'))
    assert (tmp_path / 'new' / 'cost.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.slow
def test_inference():
    """Forwards alone, without gradients, against the stock backbone; nothing is kept, and merged forms are of its size
    and operations."""
    measured = rows(inference=True, sizes=[(64, 64)], repeats=1)
    variants = {row.variant: row for row in measured}
    assert list(variants) == list(VARIANTS)
    assert variants['stock'].forward_ratio == 1
    assert all(row.step is None and row.kept == 0 for row in measured)
    assert variants['mona'].memory > variants['mona_folded'].memory > variants['stock'].memory
    for variant in ('lora_merged', 'spt_merged'):
        assert variants[variant].memory == variants['stock'].memory < variants[DEPLOYED[variant]].memory
        assert variants[variant].floor == variants['stock'].floor
    lines = table(measured)
    assert len(lines) == 2 + len(VARIANTS)
    assert 'ratio to stock' in lines[0]
    assert any('lora_merged takes' in sentence for sentence in backbone.targets(measured))


def test_records(measured, tmp_path):
    """What is written is read; of two files' rows all are there, and of what both measured the later file's."""
    for i, part in enumerate((measured[:7], [replace(measured[6], step=123.0), *measured[7:]])):
        write_record(str(tmp_path / f'{i}.json'), dict(threads=str(i)), dict(backbone=part))
    first, second = (str(tmp_path / f'{i}.json') for i in (0, 1))
    assert read_records([first]) == ([dict(threads='0')], dict(backbone=measured[:7]))
    expected = [*measured[:6], replace(measured[6], step=123.0), *measured[7:]]
    assert read_records([first, second]) == ([dict(threads='0'), dict(threads='1')], dict(backbone=expected))
    with pytest.raises(MissingFileError, match='there is no such file'):
        read_records([str(tmp_path / 'none.json')])
    for text in ('{', '[]', '{"backbone": []}', '{"machine": {}, "other": [1]}', '{"machine": {}, "backbone": [{}]}'):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(ConfigError, match='bad.json was not written by --json of this version'):
            read_records([str(tmp_path / 'bad.json')])


def losses(case, x):
    case.outputs = lambda model: model(x)
    case.model.eval()
    loss = sum(out.square().mean() for out in case.forward())
    gradients = torch.autograd.grad(loss, [p for p in case.model.parameters() if p.requires_grad], allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def test_shared_weights_change_nothing():
    """Cases that share what is equal give the losses and gradients of cases that share nothing, merged forms with other
    weights included; the frozen base is there once, and steps of full tuning do not reach it."""
    variants = ['full', 'mona', 'adapter', 'lora', 'spt', 'partial_1']
    x = torch.randn(1, 3, 64, 64)
    build = partial(build_backbone, base=BASE)
    shared = build_cases([*variants, 'stock', 'lora_merged'], build, 'cpu', torch.float32)
    for variant, case in shared.items():
        torch.manual_seed(0)
        alone = Case(build(variant), None, 'cpu', torch.float32)
        names = [name for name, _ in alone.model.named_parameters()]
        assert [name for name, _ in case.model.named_parameters()] == names
        assert case.state() == alone.state()
        if variant != 'lora_merged':  # its own weights are drawn anew
            for a, b in zip(losses(case, x), losses(alone, x), strict=True):
                assert_equal(a, b)
    pointers = {variant: {p.data_ptr() for p in case.model.parameters()} for variant, case in shared.items()}
    assert pointers['full'] == pointers['stock']
    frozen = {p.data_ptr() for p in shared['mona'].model.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in shared['adapter'].model.parameters() if not p.requires_grad}
    assert not frozen & pointers['full']
    assert 0 < len(pointers['lora_merged'] - pointers['stock']) < len(pointers['stock'])
    merged, lora = shared['lora_merged'].model.stages[0].blocks[0], shared['lora'].model.stages[0].blocks[0]
    assert not torch.equal(merged.attn.w_msa.qkv.weight, lora.attn.w_msa.qkv.weight)
    before = losses(shared['mona'], x)[0]
    full = losses(shared['full'], x)[0]
    for _ in range(3):
        shared['full'].step()
    assert losses(shared['mona'], x)[0] == before
    assert losses(shared['full'], x)[0] != full
    moments = {p: state['exp_avg'] for p, state in shared['full'].optimizer.state.items() if state}
    shared['stock'].step()
    after = shared['stock'].optimizer.state
    assert after.keys() == moments.keys()
    assert all(after[p]['exp_avg'] is moment for p, moment in moments.items())  # AdamW's moments are there once


def test_merged_forms_compute_what_they_merge():
    """The merged form has the tuned one's outputs and no module of a method."""
    x = torch.randn(1, 3, 64, 96)
    for variant in ('lora_merged', 'spt_merged'):
        torch.manual_seed(0)
        merged = build_backbone(variant, BASE)
        stock = build_backbone('stock', BASE)
        assert list(merged.state_dict()) == list(stock.state_dict())
        torch.manual_seed(0)
        tuned = build_backbone(DEPLOYED[variant], BASE)
        backbone.randomise(tuned)
        merged.eval(), tuned.eval()
        for a, b in zip(merged(x), tuned(x), strict=True):
            assert_near(a, b)


def test_published_formula_is_mona():
    """What stands beside `mona` as the published formula computes the same."""
    torch.manual_seed(0)
    mona, published = build_backbone('mona', BASE), build_backbone('published_mona', BASE)
    published.load_state_dict(mona.state_dict())
    x = torch.randn(1, 3, 64, 96)
    for model in (mona, published):
        model.eval()
    for a, b in zip(mona(x), published(x), strict=True):
        assert_near(a, b)


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
    x.requires_grad_()  # now both layers keep their weights, which are no activations
    assert case.kept() == 4 * 7 * 20


def test_plain_vision_transformers():
    """They are measured as Swins are, against the library's own on the plain path, with a class token."""
    small = dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=128)
    bases = dict(dinov2_s=backbone.VITS['dinov2_s'] | dict(arch=small, img_size=28))
    methods = ['stock', 'mona', 'published_mona', 'spt']
    measured = rows(archs=['dinov2_s'], sizes=[(28, 42)], bases=bases, methods=methods, repeats=1)
    assert [row.variant for row in measured] == ['stock', 'full', 'published_mona', 'mona', 'spt']
    assert all(row.floor > 0 and row.step > row.forward > 0 for row in measured)
    assert '| DINOv2-S | 28x42 |' in backbone.line(measured[0])
    sentences = backbone.targets(measured)
    assert ['(target 0.80) of stock' in s for s in sentences] == [True, False] and 'full takes' in sentences[1]


def test_against_the_plain_forms(tmp_path):
    """A row for every method that has both forms, with their ratio; a row is read back as it was written, and the
    sentence counts those that are slower than they may be."""
    measured = list(plain.run(archs='t', sizes=[(64, 64)], repeats=1, methods=['full', 'mona', 'stock'], bases=TINY))
    assert [row.variant for row in measured] == ['full', 'mona']
    assert all(row.ratio == pytest.approx(row.step / row.plain) and row.plain_kept > 0 < row.kept for row in measured)
    lines = '\n'.join([plain.header(measured[0]), *map(plain.line, measured)]).splitlines()
    assert len({text.count('|') for text in lines}) == 1
    write_record(str(tmp_path / 'a.json'), {}, {'plain': measured})
    assert read_records([str(tmp_path / 'a.json')])[1] == {'plain': measured}
    fast, slow = (replace(measured[0], ratio=ratio) for ratio in (1.02, 1.04))
    (sentence,) = plain.targets([fast, slow])
    assert sentence.startswith('fast / plain: 2 cases, 1 above 1.03') and sentence.count('\n') == 1


def test_against_huggingface_peft(tmp_path):
    """Three variants for each placement: the same outputs, the same parameters beside the same layers; a row is read
    back as it was written, and what each has saved is loaded."""
    peft = pytest.importorskip('peft')
    measured = list(hf_peft.run(archs='t', sizes=[(64, 64)], repeats=1, bases=TINY))
    placed = [(row.placement, row.variant) for row in measured]
    assert placed == [(placement, v) for placement in ('attention', 'all') for v in hf_peft.VARIANTS]
    for theirs, layers, host in (measured[:3], measured[3:]):
        assert theirs.step_ratio == theirs.load_ratio == 1 and theirs.difference == 0
        assert layers.parameters == theirs.parameters <= host.parameters
        assert max(layers.difference, host.difference) < 1e-5
    lines = '\n'.join([hf_peft.header(measured[0]), *map(hf_peft.line, measured)]).splitlines()
    assert len({text.count('|') for text in lines}) == 1
    write_record(str(tmp_path / 'a.json'), {}, {'hf-peft': measured})
    assert read_records([str(tmp_path / 'a.json')])[1] == {'hf-peft': measured}

    state = MODELS.build(BASE).state_dict()
    for variant in hf_peft.VARIANTS:
        model, folder = hf_peft.build(variant, BASE, state, 'all', peft), tmp_path / variant
        folder.mkdir()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter)
        values = [parameter.detach().clone() for parameter in trained]
        assert hf_peft.save(model, folder) > 4 * sum(p.numel() for p in trained)
        for parameter in trained:
            nn.init.zeros_(parameter)
        hf_peft.load(model, folder, peft)
        assert_equal([parameter.detach() for parameter in trained], values)


def test_huggingface_peft_is_missed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ConfigError, match="needs Hugging Face's PEFT .*requirements/extras.txt"):
        hf_peft.import_peft()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--sizes 224by224', '--sizes 224by224: a size is'),
        ('--sizes 0', '--sizes 0: a size is'),
        ('--repeats 0', '--repeats 0 must'),
        ('--threads -1', '--threads -1 must'),
        ('--processor-time', 'give --threads 1'),
        ('--processor-time --threads 2', 'give --threads 1'),
        ('--suite spt --plot x.png', '--plot is of the suites backbone, detector'),
        ('--suite spt --sizes 224', '--sizes is of the suites module, backbone, detector, hf-peft'),
        ('--suite module --arch dinov2_s', '--arch dinov2_s is of the suite backbone and of --against'),
        ('--suite spt --against hf-peft', '--against measures no suite: leave out --suite'),
        ('--suite spt --precision bf16', '--precision is of the suites'),
        ('--suite module --methods mona', '--methods is of the suites'),
        ('--suite module --inference', '--inference is of the suites'),
        ('--counts 10', '--counts is of the suites spt'),
        ('--suite spt --counts 0', '--counts must be from 1 to'),
        ('--methods spt_merged', 'spt_merged: a deployed form does not train'),
        ('--plot cost.pdf', '--plot cost.pdf: the picture is a file whose name ends in .png'),
        ('--json tests', 'tests cannot be written: it is a folder'),
        ('--device gpu', '--device gpu: torch knows no such device'),
        ('--device cuda:99', '--device cuda:99: torch finds no such CUDA device'),
        ('--from-json none.json', '--from-json none.json: there is no such file'),
        ('--from-json a.json --repeats 3', '--from-json measures nothing: leave out --repeats'),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    """One line, and exit status 2."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('mona_mm.benchmark.module.rates', lambda *args: (1.0, 1.0))
    device = [] if '--device' in arguments or '--from-json' in arguments else ['--device', 'cpu']
    monkeypatch.setattr('sys.argv', ['benchmark.py', *arguments.split(), *device])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'tools/benchmark.py'), run_name='__main__')
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_killed_run_keeps_its_figures(drawn_charts, monkeypatch, tmp_path, capsys):
    """What was measured before a run ends is in the file, and a picture can be drawn of it."""

    def rows(size):
        common = ((1.0, 1.0), 1.0, (1.0, 1.0))
        values = dict(kept=1.0, state=1.0, memory=2.0, memory_ratio=1.0, floor=1.0)
        return backbone.Row(
            'backbone',
            't',
            size,
            1,
            'float32',
            'full',
            2.0,
            (2.0, 2.0),
            *common[1:],
            3.0,
            (3.0, 3.0),
            *common[1:],
            **values,
        )

    def stopped(**options):
        yield rows((64, 64))
        yield rows((128, 128))
        raise KeyboardInterrupt

    file, picture = tmp_path / 'figures.json', tmp_path / 'cost.png'
    monkeypatch.setattr(backbone, 'run', stopped)
    monkeypatch.setattr('mona_mm.benchmark.module.rates', lambda *args: (1.0, 1.0))
    tool = str(ROOT / 'tools/benchmark.py')
    monkeypatch.setattr('sys.argv', ['benchmark.py', '--device', 'cpu', '--json', str(file)])
    with pytest.raises(SystemExit, match='130'):
        runpy.run_path(tool, run_name='__main__')
    assert [row['size'] for row in json.loads(file.read_text())['backbone']] == [[64, 64], [128, 128]]
    monkeypatch.setattr('sys.argv', ['benchmark.py', '--from-json', str(file), '--plot', str(picture)])
    runpy.run_path(tool, run_name='__main__')
    assert picture.stat().st_size > 10_000
    assert '| Swin-T | 128x128 |' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('unbuffered', [pytest.param('', marks=pytest.mark.slow), '1'], ids=['buffered', 'unbuffered'])
def test_closed_pipe(unbuffered):
    """A tool whose reader has gone ends quietly; a broken pipe elsewhere is an error as before."""
    code = "import mona_mm.commands.cli; mona_mm.commands.cli.run(lambda: print('x' * 100_000))"
    env = {**os.environ, 'PYTHONUNBUFFERED': unbuffered, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait() == 1


def test_other_broken_pipes_are_errors(monkeypatch, tmp_path):
    """The pipe of a worker is not the reader's."""

    def fail():
        raise BrokenPipeError('of a worker')

    with (tmp_path / 'out').open('w') as out, pytest.raises(BrokenPipeError, match='of a worker'):
        monkeypatch.setattr('sys.stdout', out)
        run(fail)


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
        assert [row['variant'] for row in record[suite]] == ['full', 'mona']
    assert picture.stat().st_size > 10_000
    assert 'mona takes' in result.stdout
