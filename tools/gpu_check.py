"""Test and measure on a GPU, with nothing from a network: python tools/gpu_check.py --minutes 30 --out results

Everything runs by itself, the most important first: the machine, the tests that need a GPU, the benchmark's suites in
bfloat16 and float32, Hugging Face's PEFT beside them, and cells of the comparison. Each is a process with a time limit,
and DIR/gpu_check.json is written anew while they run, so that a run that is cut short leaves its results.

The machine needs Python with torch. Whatever else it lacks, `python tools/gpu_check.py pack` collects beforehand on a
machine with a network, in one folder to be copied along with the checkout. This file imports the standard library alone
because it runs before anything is installed. Without a GPU it does the same at small sizes on the CPU.
"""

import argparse
import gzip
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / 'work_dirs' / 'gpu_check'
"""The folder of unpacked packages and of the steps' own files."""

REPORT = 'gpu_check.json'
NEEDED = ('mmengine', 'mmcv-lite', 'mmdet', 'mmsegmentation', 'mmpretrain', 'setuptools<82', 'ftfy', 'regex')
NEEDED += ('safetensors', 'pytest', 'pytest-timeout')
"""The packages that `pack` downloads with all that they depend on: those of requirements.txt, and pytest."""

TAKEN_FOR_GRANTED = ('numpy', 'pillow', 'opencv-python', 'scipy', 'matplotlib', 'contourpy', 'fonttools', 'kiwisolver')
TAKEN_FOR_GRANTED += ('pyparsing', 'cycler', 'python-dateutil', 'tzdata')
"""What the machine is taken to have beside torch, since it is large: `pack --has` says otherwise."""

IMPORTED = ('torch', 'torchvision', 'triton', 'numpy', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
IMPORTED += ('scipy', 'matplotlib', 'pycocotools', 'pytest', 'peft', 'transformers', 'timm')
"""The modules whose versions the report holds, or the error that importing them raised."""

GRACE = 5.0
"""The seconds that a stopped step has for its last words."""

MINUTES = '{minutes}'
"""What stands in a command for the minutes that it may plan with: those of its step without a start and an end."""


@dataclass(frozen=True)
class Step:
    """One process of a run.

    Args:
        name: the name in the report and for ``--steps``.
        share: the share of the time, in proportion to the shares of the steps behind it.
        enough: the seconds that it should have even if nothing is left for those behind it.
        command: the command, in which :data:`MINUTES` may stand.
        result: the JSON file, or folder of JSON files, that the command writes; None if it writes none.
        junit: the XML file that pytest writes; None if the step is no test run.
        skip: why the step cannot run here; empty if it can.
    """

    name: str
    share: float
    command: tuple[str, ...]
    result: Path | None = None
    junit: Path | None = None
    skip: str = ''
    enough: float = 0.0


@dataclass
class Report:
    """The report of a run, and the file that holds it.

    Args:
        folder: the folder of the report and of the log.
        content: what the file says.
    """

    folder: Path
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The file with everything that the steps print."""
        return self.folder / 'gpu_check.log'

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f'{REPORT}.partial'
        partial.write_text(json.dumps(self.content, indent=1) + '\n', encoding='utf-8')
        partial.replace(self.folder / REPORT)


def main() -> int:
    args = make_parser().parse_args()
    if args.command == 'describe':
        Path(args.out).write_text(json.dumps(describe(), indent=1) + '\n', encoding='utf-8')
        return 0
    if args.command == 'pack':
        return pack(args)
    if args.minutes is None or args.minutes <= 0:
        print('--minutes N: give the time that the run may take, above 0.', file=sys.stderr)
        return 2
    return run(args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test and measure on a GPU, with nothing from a network')
    parser.add_argument('command', nargs='?', default='run', choices=('run', 'pack', 'describe'), help='default: run')
    parser.add_argument('--pack', dest='folder', type=Path, default=ROOT / 'gpu_pack', metavar='DIR', help='the pack')
    running = parser.add_argument_group('run')
    running.add_argument('--minutes', type=float, metavar='N', help='end within this time')
    running.add_argument('--out', default='gpu_check', metavar='DIR', help='for the report (default: %(default)s)')
    running.add_argument('--device', choices=('cuda', 'cpu'), help='default: cuda where there is one')
    running.add_argument('--steps', nargs='+', metavar='STEP', help='only those whose names begin so')
    packing = parser.add_argument_group('pack')
    packing.add_argument('--python', default='3.12', metavar='X.Y', help="the machine's (default: %(default)s)")
    packing.add_argument(
        '--has', nargs='*', default=list(TAKEN_FOR_GRANTED), metavar='NAME', help='packages that the machine has'
    )
    packing.add_argument('--extra', nargs='*', default=[], metavar='NAME', help='packages more, without what they need')
    packing.add_argument('--weights', metavar='FILE', help='DINOv2-S, as a safetensors file')
    packing.add_argument('--data', type=Path, metavar='DIR', help='folder of the data sets')
    packing.add_argument(
        '--data-sets',
        nargs='+',
        default=['camvid', 'nuclei', 'craters', 'BCCD'],
        metavar='NAME',
        help='taken while they fit (default: %(default)s)',
    )
    packing.add_argument('--limit', type=float, default=53, metavar='MIB', help='of the folder (default: %(default)s)')
    return parser


# Running --------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Install what the pack has, and run the steps; the status is 1 if any of them failed."""
    began = time.monotonic()
    deadline = began + 60 * args.minutes
    report = Report(Path(args.out).resolve())
    WORK.mkdir(parents=True, exist_ok=True)
    report.content = dict(
        date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), minutes=args.minutes, pack=str(args.folder), steps=[]
    )
    report.write()
    report.log.write_text('', encoding='utf-8')
    environment = make_environment(WORK)
    first = (install_step(args.folder, WORK), describe_step(WORK))
    # Half of the time would be left if both used up their limits.
    run_steps(first, report, began + 30 * args.minutes, environment)
    found = report.content['steps'][-1].get('result') or {}
    device = args.device or ('cuda' if found.get('cuda_available') else 'cpu')
    report.content['device'] = device
    material = unpack_material(args.folder, WORK)
    steps = plan_steps(device, found, material, WORK)
    if args.steps:
        steps = [step for step in steps if step.name.startswith(tuple(args.steps))]
    run_steps(steps, report, deadline, environment)
    report.content['seconds'] = round(time.monotonic() - began, 1)
    report.write()
    print(f'{report.folder / REPORT}: {summary(report.content["steps"])}')
    return int(any(step['status'] != 'done' and step['status'] != 'left out' for step in report.content['steps']))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def summary(steps: Sequence[Mapping[str, Any]]) -> str:
    """The number of steps of each status."""
    statuses = [step['status'] for step in steps]
    return ', '.join(f'{statuses.count(status)} {status}' for status in dict.fromkeys(statuses))


def make_environment(work: Path) -> dict[str, str]:
    """The environment of the steps: the checkout and the unpacked packages come first, no network is asked, and modules
    are compiled once for all steps, wherever they lie."""
    paths = [str(ROOT), str(work / 'site'), *filter(None, [os.environ.get('PYTHONPATH')])]
    own = dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', PIP_NO_INDEX='1', PYTHONUNBUFFERED='1')
    own |= dict(PYTHONPATH=os.pathsep.join(paths), PYTHONPYCACHEPREFIX=str(work / 'pycache'), PYTHONWARNINGS='ignore')
    return {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'} | own


def run_steps(steps: Sequence[Step], report: Report, deadline: float, environment: Mapping[str, str]) -> None:
    """Run steps one by one until the deadline.

    A step's limit is its share of the time that is left, so that what a step does not use goes to those behind it, or
    the time that is enough for it. One that would have less than a third of that is left out.

    Args:
        steps: the steps, the most important first.
        report: the report, to which an entry for each step is added.
        deadline: the end, on the clock of :func:`time.monotonic`.
        environment: the environment of the steps.
    """
    for i, step in enumerate(steps):
        entry: dict[str, Any] = dict(name=step.name)
        report.content['steps'].append(entry)
        limit = step_limit(deadline - time.monotonic(), [s.share for s in steps[i:] if not s.skip], step.enough)
        if step.skip:
            entry |= dict(status='left out', why=step.skip)
        elif limit < max(1, step.enough / 3):
            entry |= dict(status='left out', why='too little time was left')
        else:
            run_step(step, entry, limit, report, environment)
        report.write()
        print(f'{step.name}: {entry["status"]}{_more(entry)}', flush=True)


def _more(entry: Mapping[str, Any]) -> str:
    parts = [entry.get('why'), f'{entry["seconds"]} of {entry["limit"]} s' if 'seconds' in entry else None]
    parts += [f'{key} {value}' for key, value in entry.get('tests', {}).items() if isinstance(value, int) and value]
    return ''.join(f', {part}' for part in parts if part)


def step_limit(left: float, shares: Sequence[float], enough: float = 0.0) -> float:
    """The seconds that the first of several steps may take, of those that are left to all of them."""
    left = max(0.0, left - GRACE)
    return max(left * shares[0] / sum(shares), min(enough, left)) if shares else 0.0


def run_step(step: Step, entry: dict[str, Any], limit: float, report: Report, environment: Mapping[str, str]) -> None:
    """Run the process of a step and note in its entry how it ended, and what it has written, also while it runs."""
    for path in filter(None, (step.result, step.junit)):  # of an earlier run
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    command = [part.replace(MINUTES, f'{0.85 * limit / 60:.2f}') for part in step.command]
    entry |= dict(command=' '.join(command), status='running', limit=round(limit, 1))
    report.write()
    started = noted = time.monotonic()
    with report.log.open('ab') as log:
        log.write(f'\n==== {step.name}: {entry["command"]}\n'.encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.05)
                if time.monotonic() - noted > 5:
                    noted = time.monotonic()
                    entry['result'] = read_result(step.result)
                    report.write()
            entry['status'] = 'stopped at its limit' if process.poll() is None else 'done'
        except KeyboardInterrupt:
            entry['status'] = 'interrupted'
            raise
        finally:
            stop(process)
            if entry['status'] == 'done' and process.returncode:
                entry['status'] = 'failed'
            entry |= dict(seconds=round(time.monotonic() - started, 1), rc=process.returncode)
            entry['result'] = read_result(step.result)
            if step.junit:
                entry['tests'] = read_junit(step.junit)
            with report.log.open('rb') as text:
                text.seek(max(begin, text.seek(0, os.SEEK_END) - 6000))
                entry['tail'] = text.read().decode(errors='replace')
            report.write()


def stop(process: subprocess.Popen) -> None:
    """End a step and every process that it started: by a signal that it may answer, and then by one that it cannot."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # at the first, pytest writes its results
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_result(path: Path | None) -> Any:
    """Read the JSON file of a step, or the files of its folder as one object by file name; None if there is nothing."""
    if path is None or not path.exists():
        return None
    if path.is_dir():
        return {file.name: read_result(file) for file in sorted(path.rglob('*.json'))}
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        return None  # it is being written


def read_junit(path: Path) -> dict[str, Any]:
    """Count the tests of an XML file of pytest, and name those that failed, with the last line of each error."""
    try:
        cases = list(ElementTree.parse(path).iter('testcase'))
    except (OSError, ElementTree.ParseError):
        return {}
    found: dict[str, Any] = dict(passed=0, failed=0, skipped=0, failures={})
    for case in cases:
        bad = [child for child in case if child.tag in ('failure', 'error')]
        if bad:
            found['failed'] += 1
            found['failures'][f'{case.get("classname")}::{case.get("name")}'] = (bad[0].get('message') or '')[:500]
        else:
            found['skipped' if case.find('skipped') is not None else 'passed'] += 1
    return found


# Installing -----------------------------------------------------------------------------------------------------------


def install_step(folder: Path, work: Path) -> Step:
    """The step that installs those of the pack's packages that the machine lacks into a folder of their own.

    Not into a virtual environment: one that is made by the Python of another one does not see that one's packages,
    and torch may be in such a one.
    """
    wheels = folder / 'wheels.tar.xz'
    if not wheels.is_file():
        return Step('install', 1, (), skip=f'there is no {wheels}: the machine has to have everything')
    destination = work / 'wheels'
    shutil.rmtree(destination, ignore_errors=True)
    with tarfile.open(wheels) as archive:
        archive.extractall(destination, filter='data')
    files = [file for file in sorted(destination.glob('*.whl')) if is_lacking(*name_and_version(file.name))]
    site = work / 'site'
    shutil.rmtree(site, ignore_errors=True)
    options = ('--no-index', '--no-deps', '--no-compile', '--disable-pip-version-check', '--target', str(site))
    command = (sys.executable, '-m', 'pip', 'install', *options, *map(str, files))
    return Step('install', 1, command, skip='' if files else 'the machine has everything that the pack has')


def is_lacking(name: str, version: str) -> bool:
    """Whether this Python lacks a package, or has another version of one whose version matters."""
    try:
        present = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    exact = {normal(re.split('[<=>]', text)[0]) for text in NEEDED[:6]}
    return normal(name) in exact and present != version


def name_and_version(wheel: str) -> tuple[str, str]:
    """The name and version in the file name of a wheel."""
    name, version = wheel.split('-')[:2]
    return normal(name), version


def normal(name: str) -> str:
    """The name of a package as package indexes compare it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def unpack_material(folder: Path, work: Path) -> dict[str, Any]:
    """Find the weights and the data sets of the pack; the weights are unpacked.

    Returns:
        ``weights``, a file or None, ``data``, the folder of the data sets, and ``sets``, their names.
    """
    packed, weights = folder / 'dinov2_vits14.safetensors.gz', None
    if packed.is_file():
        weights = work / 'dinov2_vits14.safetensors'
        with gzip.open(packed) as source, weights.open('wb') as target:
            shutil.copyfileobj(source, target)
    data = folder / 'data'
    return dict(weights=weights, data=data, sets=sorted(path.name for path in data.glob('*') if path.is_dir()))


# Planning -------------------------------------------------------------------------------------------------------------


def describe_step(work: Path) -> Step:
    result = work / 'machine.json'
    command = (sys.executable, str(ROOT / 'tools' / 'gpu_check.py'), 'describe', '--out', str(result))
    return Step('machine', 1, command, result)


def plan_steps(device: str, machine: Mapping[str, Any], material: Mapping[str, Any], work: Path) -> list[Step]:
    """The steps of a device, the most important first.

    Args:
        device: ``'cuda'`` or ``'cpu'``; the latter runs the same at small sizes.
        machine: what :func:`describe` found.
        material: what :func:`unpack_material` found.
        work: the folder for the steps' files.
    """
    suites = benchmark_steps(device, machine, work)
    first = [suite for suite in suites if suite.name.endswith(('module_bf16', 'swin_b_bf16'))]
    rest = [suite for suite in suites if suite not in first]
    return [test_step(work), *first, *rest, cells_step(device, material, work)]


def test_step(work: Path) -> Step:
    """The tests that are marked ``needs_gpu``, those of the fast forms first; only files that name the mark are
    collected, which is quicker."""
    files = [file for file in sorted((ROOT / 'tests').glob('test_*.py')) if 'needs_gpu' in file.read_text('utf-8')]
    first = ('test_triton_mona.py', 'test_on_gpu.py', 'test_fast_mona.py')
    files.sort(key=lambda file: first.index(file.name) if file.name in first else len(first))
    junit = work / 'tests.xml'
    options = ('-m', 'needs_gpu', '-q', '-rfE', '-p', 'no:cacheprovider', '--timeout', '120', f'--junitxml={junit}')
    names = (str(file.relative_to(ROOT)) for file in files)
    return Step('tests', 3, (sys.executable, '-m', 'pytest', *options, *names), junit=junit, enough=150)


def benchmark_steps(device: str, machine: Mapping[str, Any], work: Path) -> list[Step]:
    """The suites of tools/benchmark.py: all of them in bfloat16, and then in float32. Few CPUs have bfloat16, so there
    one of them is enough."""
    cuda = device == 'cuda'
    # Two images of 800x1216, the published setting, take Swin-B some 30 GiB where all of it trains in float32.
    pair = '2' if machine.get('gpu_memory_gib', 0) >= 40 else '1'
    methods = ('--methods', 'stock', 'full', 'published_mona', 'mona', 'adapter', 'lora', 'spt')
    repeats = ('--repeats', '7') if cuda else ('--repeats', '1', '--threads', '1')
    few = ('--methods', 'mona', 'lora')
    suites: list[tuple[str, float, tuple[str, ...]]] = []
    if cuda:
        suites += [('module', 1.0, ('--suite', 'module', '--arch', 'b', '--sizes', '512', '800x1216', '--batch', pair))]
        for name, size, batch in (
            ('swin_b', '800x1216', pair),
            ('dinov2_s', '518', '8'),
            ('dinov2_b', '518', '8'),
            ('swin_l', '512', '4'),
        ):
            arch = name.removeprefix('swin_')
            shape = ('--suite', 'backbone', '--arch', arch, '--sizes', size, '--batch', batch)
            suites.append((f'backbone_{name}', 1.2, (*shape, *methods)))
        suites.append(('hf_peft', 1.0, ('--against', 'hf-peft', '--batch', '32')))
        suites.append(('detector', 1.0, ('--suite', 'detector', '--arch', 'b', '--sizes', '800x1216', *methods)))
    else:
        suites += [('module', 1.0, ('--suite', 'module', '--arch', 't', '--sizes', '64'))]
        suites += [('backbone_swin_t', 1.0, ('--suite', 'backbone', '--arch', 't', '--sizes', '64', *few))]
        suites += [('backbone_dinov2_s', 1.0, ('--suite', 'backbone', '--arch', 'dinov2_s', '--sizes', '56', *few))]
        suites += [('hf_peft', 1.0, ('--against', 'hf-peft', '--arch', 't', '--sizes', '64'))]
        suites += [('detector', 1.0, ('--suite', 'detector', '--arch', 't', '--sizes', '64', *few))]
    steps = []
    for precision in ('bf16', 'fp32'):
        for name, share, options in suites if cuda or precision == 'fp32' else suites[:1]:
            result = work / f'{name}_{precision}.json'
            own = ('--device', device, '--precision', precision, '--json', str(result))
            command = (sys.executable, 'tools/benchmark.py', *options, *repeats, *own)
            lacks_peft = name == 'hf_peft' and 'peft' not in machine.get('versions', {})
            skip = 'peft cannot be imported here' if lacks_peft else ''
            steps.append(Step(f'{name}_{precision}', share, command, result, skip=skip, enough=60 * share))
    return steps


def cells_step(device: str, material: Mapping[str, Any], work: Path) -> Step:
    """The cells of the comparison `mini` for the data sets at hand."""
    tasks = [name.lower() for name in material['sets']]
    result = work / 'cells'
    if not material['weights'] or not tasks:
        return Step('cells', 2, (), skip='the pack has no weights, or no data set')
    command = [sys.executable, 'tools/reproduce.py', 'run', 'mini', '--device', device, '--tasks', *tasks]
    command += ['--methods', 'fixed', 'full', 'lora', 'adapter', 'mona', '--weights', str(material['weights'])]
    command += ['--data', str(material['data']), '--out', str(result), '--work-dir', str(work / 'runs')]
    command += ['--minutes', MINUTES, '--jobs', '4' if device == 'cuda' else '1']
    return Step('cells', 2, tuple(command), result)


def describe() -> dict[str, Any]:
    """Describe this machine: Python, processor, GPU, driver, and the versions of what can be imported."""
    versions, errors = {}, {}
    for name in ('mona_mm', *IMPORTED):  # mona_mm first, because it makes the OpenMMLab libraries importable
        try:
            versions[name] = getattr(importlib.import_module(name), '__version__', 'unknown')
        except Exception as error:  # an extension module may raise anything
            errors[name] = f'{type(error).__name__}: {error}'
    found: dict[str, Any] = dict(
        python=platform.python_version(), platform=platform.platform(), processors=os.cpu_count(), versions=versions
    )
    found['cannot_be_imported'] = errors
    torch = sys.modules.get('torch')
    found['cuda_available'] = bool(torch and torch.cuda.is_available())
    if found['cuda_available']:
        properties = torch.cuda.get_device_properties(0)
        found |= dict(gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30, 1))
        found |= dict(capability=f'{properties.major}.{properties.minor}', cuda=torch.version.cuda)
        found |= dict(cudnn=torch.backends.cudnn.version(), multiprocessors=properties.multi_processor_count)
    query = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total,clocks.max.sm', '--format=csv,noheader']
    try:
        found['nvidia_smi'] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found['nvidia_smi'] = str(error)
    return found


# Packing --------------------------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> int:
    """Fill the folder: the wheels, then the weights, and then the data sets as long as they fit under the limit."""
    folder, limit = args.folder, args.limit * 2**20
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = download(Path(temporary), args)
        has = {normal(name) for name in args.has}
        packed = [wheel for wheel in wheels if name_and_version(wheel.name)[0] not in has]
        write_wheels(packed, folder / 'wheels.tar.xz')
        content = dict(python=args.python, packages=dict(name_and_version(wheel.name) for wheel in packed))
        content['expected_on_the_machine'] = [wheel.name.split('-')[0] for wheel in wheels if wheel not in packed]
    if args.weights:
        write_weights(Path(args.weights), folder / 'dinov2_vits14.safetensors.gz')
    used = size_of(folder)
    if used > limit:
        print(f'--limit {args.limit:g}: packages and weights alone take {used / 2**20:.1f} MiB.', file=sys.stderr)
        return 1
    content['data'], content['data_left_out'] = [], []
    for name in args.data_sets if args.data else ():
        needed = size_of(args.data / name)
        fits = 0 < needed <= limit - used
        content['data' if fits else 'data_left_out'].append(name)
        if fits:
            shutil.copytree(args.data / name, folder / 'data' / name, copy_function=shutil.copyfile)
            used += needed
    (folder / 'pack.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(content, indent=1))
    print(f'{folder}: {used / 2**20:.1f} MiB')
    return 0


def download(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Download the wheels of the tested versions for the machine's Python, from the index that pip is set to."""
    constraints = ROOT / 'requirements' / 'constraints.txt'
    common = [sys.executable, '-m', 'pip', 'download', '--quiet', '--dest', str(folder), '--only-binary=:all:']
    common += ['--python-version', args.python, '--constraint', str(constraints)]
    subprocess.run([*common, *NEEDED], check=True)
    if args.extra:
        subprocess.run([*common, '--no-deps', *args.extra], check=True)
    return sorted(folder.glob('*.whl'))


def write_wheels(wheels: Sequence[Path], path: Path) -> None:
    """Write wheels into one compressed archive, each without its own compression: together they take half the space."""
    with tarfile.open(path, 'w:xz') as archive:
        for wheel in wheels:
            content = io.BytesIO()
            with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(content, 'w', zipfile.ZIP_STORED) as new:
                for entry in old.infolist():
                    new.writestr(entry.filename, old.read(entry))
            member = tarfile.TarInfo(wheel.name)
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)


def write_weights(source: Path, target: Path) -> None:
    """Write a safetensors file in half precision, compressed."""
    from safetensors.torch import load_file, save  # here, because the machine of a run may not have it yet

    tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(source).items()}
    with gzip.open(target, 'wb', compresslevel=6) as file:
        file.write(save(tensors))


def size_of(path: Path) -> int:
    """The bytes of the files of a folder."""
    return sum(file.stat().st_size for file in path.rglob('*') if file.is_file())


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
