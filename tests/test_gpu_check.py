"""tools/gpu_check.py: its plan, its time limits, its report, and the pack that a machine without a network installs."""

import gzip
import importlib.util
import json
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from documented_commands import Command, faults
from helpers import assert_equal
from safetensors.torch import load_file, save_file


@pytest.fixture
def check(monkeypatch):
    """The tool as a module, with little patience."""
    spec = importlib.util.spec_from_file_location('gpu_check', ROOT / 'tools/gpu_check.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'gpu_check', module)
    spec.loader.exec_module(module)
    module.GRACE = 0.3
    return module


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, '-S', '-c', code, *map(str, arguments))


def test_limits(check):
    """A step has its share of what is left, after the grace, and the last one all of it; and what is enough for it, at
    the cost of those behind it."""
    assert check.step_limit(100.3, [1, 3]) == pytest.approx(25)
    assert check.step_limit(75.3, [3]) == pytest.approx(75)
    assert check.step_limit(100.3, [1, 3], enough=60) == pytest.approx(60)
    assert check.step_limit(40.3, [1, 3], enough=60) == pytest.approx(40)
    assert check.step_limit(-1, [1]) == check.step_limit(9, []) == 0


def test_steps(check, tmp_path):
    """Whatever a step does, those behind it run, and the report holds what each has left: it is there before a step
    begins, a failure is no end, and a step that hangs is ended at its limit with all that it has started."""
    report = check.Report(tmp_path)
    report.content = dict(steps=[])
    file = tmp_path / check.REPORT
    running = 'import json, sys; json.dump([s["status"] for s in json.load(open(sys.argv[1]))["steps"]], '
    running += 'open(sys.argv[2], "w"))'
    hanging = (
        'import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '
        'signal.signal(signal.SIGINT, signal.SIG_IGN); '
        'child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]); '
        'open(sys.argv[1], "w").write(str([child.pid])); print("hangs", flush=True); time.sleep(60)'
    )
    junit = '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
    junit += '<failure message="assert 1"/></testcase><testcase name="d"><skipped/></testcase></testsuite></testsuites>'
    tests = 'import sys; open(sys.argv[1], "w").write(sys.argv[2]); print(sys.argv[3]); sys.exit(3)'
    steps = [
        check.Step('first', 1, python(running, file, tmp_path / 'a.json'), tmp_path / 'a.json'),
        check.Step('out', 1, (), skip='nothing to do'),
        check.Step('hanging', 1, python(hanging, tmp_path / 'b.json'), tmp_path / 'b.json'),
        check.Step('tests', 9, python(tests, tmp_path / 'c.xml', junit, check.MINUTES), junit=tmp_path / 'c.xml'),
    ]
    check.run_steps(steps, report, time.monotonic() + 16, {})
    first, out, hanging, failed = json.loads(file.read_text())['steps']
    assert (first['status'], first['result']) == ('done', ['running'])
    assert out == dict(name='out', status='left out', why='nothing to do')
    assert hanging['status'] == 'stopped at its limit' and hanging['seconds'] == pytest.approx(hanging['limit'], abs=2)
    assert hanging['tail'] == 'hangs\n' and ' '.join(hanging['command'].split()[:2]) in report.log.read_text()
    child = Path(f'/proc/{hanging["result"][0]}/status')
    assert not child.exists() or 'Z (zombie)' in child.read_text()
    assert (failed['status'], failed['rc']) == ('failed', 3)
    assert failed['tests'] == dict(passed=1, failed=1, skipped=1, failures={'a::c': 'assert 1'})
    assert float(failed['tail']) == pytest.approx(0.85 * failed['limit'] / 60, abs=0.01)
    assert check.summary([first, out, hanging, failed]) == '1 done, 1 left out, 1 stopped at its limit, 1 failed'
    late = check.Step('late', 1, steps[0].command, enough=60)
    check.run_steps([late], report, time.monotonic() + 15, {})
    assert json.loads(file.read_text())['steps'][-1] == dict(
        name='late', status='left out', why='too little time was left'
    )


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_plan(check, tmp_path, device):
    """The tests come first and the cells last; bfloat16 before float32; every option exists; and what the machine or
    the pack lacks is left out by name."""
    machine = dict(gpu_memory_gib=80, versions=dict(peft='0'))
    (tmp_path / 'weights').touch()
    material = dict(weights=tmp_path / 'weights', data=tmp_path, sets=['nuclei'])
    steps = check.plan_steps(device, machine, material, tmp_path)
    names = [step.name for step in steps]
    assert names[0] == 'tests' and names[1] == 'module_bf16' and names[-1] == 'cells' and len(set(names)) == len(names)
    precisions = [name[-4:] for name in names[1:-1]]
    assert precisions == sorted(precisions) and set(precisions) == {'bf16', 'fp32'}
    assert {'backbone_dinov2_s_fp32', 'hf_peft_fp32', 'detector_fp32'} <= set(names)
    assert ('backbone_dinov2_b_bf16' in names) == (device == 'cuda')
    for step in steps:
        assert not step.skip
        if step.name != 'tests':
            options = [word for word in step.command[1:] if word != check.MINUTES]
            assert faults(Command('', shlex.join(['python', *options]), ())) == []
            assert step.command[step.command.index('--device') + 1] == device
    lacking = check.plan_steps(device, dict(versions={}), dict(weights=None, data=tmp_path, sets=[]), tmp_path)
    assert {step.name for step in lacking if step.skip} == {*(name for name in names if 'hf_peft' in name), 'cells'}


def test_tests_of_a_gpu_are_found(check, tmp_path):
    """The files of all tests that need a GPU are among those that are collected, and the mark skips them elsewhere."""
    files = {Path(word).name for word in check.test_step(tmp_path).command if word.startswith('tests/')}
    assert {'test_fast_mona.py', 'test_mmcv_ext.py', 'test_digest.py', 'test_hosts.py'} <= files


@pytest.mark.needs_gpu
def test_mark_of_a_gpu():
    assert torch.cuda.is_available()


def write_wheel(path: Path, module: str) -> None:
    name, version = path.name.split('-')[:2]
    info = f'{name}-{version}.dist-info'
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr(f'{module}.py', f'VALUE = {module!r}\n')
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')


def test_pack(check, monkeypatch, tmp_path):
    """What is packed is installed: packages that are lacking, by pip and from no index, weights in half precision, and
    the data sets that fit; what does not fit or is expected on the machine is named."""

    def download(folder, args):
        for name in ('lacking_here-1.0', 'pytest-0.1', 'numpy-0.1'):
            write_wheel(folder / f'{name}-py3-none-any.whl', name.split('-')[0])
        return sorted(folder.glob('*.whl'))

    monkeypatch.setattr(check, 'download', download)
    monkeypatch.setattr(check, 'WORK', tmp_path / 'work')
    weights = dict(a=torch.randn(5, 3), b=torch.arange(4))
    save_file(weights, tmp_path / 'weights.safetensors')
    for name, size in (('small', 1000), ('large', 2_000_000)):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / 'image').write_bytes(bytes(size))
    pack = tmp_path / 'pack'
    arguments = ['pack', '--pack', pack, '--data', tmp_path / 'data', '--data-sets', 'large', 'small', '--limit', '1']
    arguments += ['--weights', tmp_path / 'weights.safetensors']
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', *map(str, arguments)])
    assert check.main() == 0
    content = json.loads((pack / 'pack.json').read_text())
    assert content['packages'] == {'lacking-here': '1.0', 'pytest': '0.1'}
    assert content['expected_on_the_machine'] == ['numpy']
    assert (content['data'], content['data_left_out']) == (['small'], ['large'])

    monkeypatch.setattr(
        check, 'plan_steps', lambda *args: [check.Step('use', 1, python('import lacking_here as m; print(m.VALUE)'))]
    )
    monkeypatch.setattr(check, 'describe_step', lambda work: check.Step('machine', 1, python('print(1)')))
    monkeypatch.setattr(
        sys, 'argv', ['gpu_check.py', '--pack', str(pack), '--minutes', '2', '--out', str(tmp_path / 'out')]
    )
    assert check.main() == 0
    report = json.loads((tmp_path / 'out' / check.REPORT).read_text())
    install, _, use = report['steps']
    assert 'lacking_here' in install['command'] and 'pytest-0.1' not in install['command']
    assert use['tail'] == 'lacking_here\n' and report['device'] == 'cpu'
    material = check.unpack_material(pack, tmp_path / 'work')
    assert material['sets'] == ['small']
    assert_equal(load_file(material['weights']), dict(a=weights['a'].half(), b=weights['b']))
    with gzip.open(pack / 'dinov2_vits14.safetensors.gz') as file:
        assert file.read() == material['weights'].read_bytes()


def test_too_large_a_pack(check, monkeypatch, tmp_path, capsys):
    def download(folder, args):
        write_wheel(folder / 'one-1.0-py3-none-any.whl', 'one')
        return sorted(folder.glob('*.whl'))

    monkeypatch.setattr(check, 'download', download)
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', 'pack', '--pack', str(tmp_path / 'pack'), '--limit', '0.0001'])
    assert check.main() == 1
    assert '--limit 0.0001: packages and weights alone take' in capsys.readouterr().err


def test_nothing_but_python_is_needed(tmp_path):
    """Before anything is installed the tool answers, without site-packages; --minutes is asked for."""
    call = [sys.executable, '-S', '-I', str(ROOT / 'tools/gpu_check.py')]
    found = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (2, '--minutes N: give the time that the run may take, above 0.\n')
    described = tmp_path / 'machine.json'
    subprocess.run([*call, 'describe', '--out', str(described)], check=True, cwd=tmp_path)
    machine = json.loads(described.read_text())
    assert not machine['cuda_available'] and 'torch' in machine['cannot_be_imported']
