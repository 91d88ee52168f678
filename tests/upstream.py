"""Run the OpenMMLab libraries' own tests on top of this package, and say of every failure whose it is.

The tests are not part of the installed libraries, so each library needs a checkout of its sources, best of the
installed version (only ``tests/`` and ``configs/`` of it are used; the code under test is the installed one)::

    git clone --depth 1 --branch v3.3.0 https://github.com/open-mmlab/mmdetection
    python tests/upstream.py --mmdet mmdetection --only dense_heads

Everything runs twice: once with ``mona_mm`` imported first, once without it. Without it, and without a compiled
mmcv, the libraries cannot even be imported; there an empty ``mmcv._ext`` takes its place, whose operators raise.
``--reference DIR`` names a folder with a compiled mmcv for the run without (``pip install --no-deps
--no-build-isolation --target DIR mmcv==2.1.0``): then there is an answer for the operators too.

A failure on top of this package is one of

* ``stock``: the run without this package fails in the same way, so the cause lies in the test, the library or the
  machine (the summary groups them by reason);
* ``missing operator``: the test calls an operator of mmcv for which there is no stand-in;
* ``ours``: all others. There must be none, and the exit status is 1 if there is one.

Needs pytest, pytest-timeout and ``parameterized``. Writes ``upstream.json`` (every test, both results), from which a
run that was stopped goes on, and prints the summary as Markdown.
"""

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What of each library runs by default, in its checkout.
DEFAULT_PATHS = {
    'mmcv': ['tests/test_ops', 'tests/test_cnn'],
    'mmdet': ['tests/test_models', 'tests/test_structures', 'tests/test_engine'],
    'mmseg': ['tests/test_models', 'tests/test_structures', 'tests/test_engine'],
    'mmpretrain': ['tests/test_models', 'tests/test_structures', 'tests/test_engine'],
    'mmengine': ['tests/test_hooks', 'tests/test_runner', 'tests/test_model', 'tests/test_optim'],
}

_NETWORK = 'needs the network'
# The reasons for failures that the run without this package has too: the first pattern that its error matches.
STOCK_REASONS = {
    'an operator that mmcv has on a GPU only': r'not implemented on CPU|is not compiled with GPU'
    r'|implementation for device',
    _NETWORK: r'URLError|urlopen error|ConnectionError|MaxRetryError|[Nn]ame ?[Rr]esolution|HTTPS?Connection|HTTPError'
    r'|huggingface|Network is unreachable|gaierror|openmmlab\.com|RemoteDisconnected|timed out',
    'needs a GPU': r'Torch not compiled with CUDA|NVIDIA driver|No CUDA GPUs|CUDA error|cuda is not available|nccl',
    'needs a package that is not installed': r'ModuleNotFoundError|No module named|ImportError|[Pp]lease install'
    r'|is required|is not installed|pip install',
    'needs a file that is not there': r'FileNotFoundError|No such file',
    'weights-only loading of torch 2.6': r'Weights only load failed|weights_only',
    'numpy 2': r'numpy.*has no attribute|np\.[a-z_0-9]+.* was removed|only 0-dimensional arrays|only length-1 arrays'
    r'|NumPy|out of bounds for u?int',
    'takes too long': r'Timeout',
    'another version of the library': r'is not in the .* registry|unexpected keyword argument',
    'an assertion of the test': r'AssertionError|Failed: DID NOT RAISE|^E? *assert ',
}
MISSING_OPERATOR = re.compile(
    r"mmcv operator '?([a-z_0-9]+)'? is not available|operator with no compiled form: ([a-z_0-9]+)"
)


# ---- in the worker: one pytest session in a process of its own ----


class Recorder:
    """A pytest plugin that notes down every test as it ends, so that a crash of the process costs one test only."""

    def __init__(self, path: str):
        self._file = open(path, 'a', buffering=1)  # noqa: SIM115  open as long as the process lives
        self._errors: dict[str, str] = {}

    def _write(self, **entry) -> None:
        self._file.write(json.dumps(entry) + '\n')

    def pytest_runtest_logstart(self, nodeid, location) -> None:
        self._write(event='start', test=nodeid)

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo is not None:
            self._errors[item.nodeid] = f'{call.excinfo.typename}: {call.excinfo.value}'[:2000]

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            text = str(report.longrepr)
            causes = [line.removeprefix('E').strip() for line in text.splitlines() if line.startswith('E ')]
            self._write(event='end', test=report.nodeid, outcome='failed', error=causes[-1] if causes else text[-2000:])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed or report.when == 'call' or (report.when == 'setup' and report.skipped):
            self._write(
                event='end',
                test=report.nodeid,
                outcome=report.outcome,
                error=self._errors.get(report.nodeid, str(report.longrepr)[-2000:]) if report.failed else None,
                seconds=round(report.duration, 2),
            )


def bare_mmcv_ext() -> None:
    """Make ``mmcv.ops`` importable without any operator, where mmcv has no compiled ones: each raises when called."""
    import importlib.util

    if importlib.util.find_spec('mmcv._ext') is not None:
        return
    module = types.ModuleType('mmcv._ext')
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)

    def operator(name):
        def raise_missing(*args, **kwargs):
            raise NotImplementedError(f'operator with no compiled form: {name}')

        if name.startswith('_'):
            raise AttributeError(name)
        return raise_missing

    module.__getattr__ = operator
    sys.modules['mmcv._ext'] = module


def let_the_cpu_stand_for_the_gpu() -> None:
    """Send what goes to CUDA to the CPU: most tests of mmcv's operators ask for a GPU, which stand-ins do not need."""
    import torch
    from torch.overrides import TorchFunctionMode

    def here(value):
        if isinstance(value, str) and value.split(':')[0] == 'cuda':
            return 'cpu'
        return torch.device('cpu') if isinstance(value, torch.device) and value.type == 'cuda' else value

    class OnCPU(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.cuda:
                return args[0]
            return function(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})

    os.environ['CUDA_VISIBLE_DEVICES'] = '0'  # mmengine's logger looks its number up there
    torch.cuda.is_available = lambda: True
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.cuda.amp.autocast = functools.partial(torch.autocast, 'cpu', dtype=torch.float16)
    OnCPU().__enter__()  # until the process ends


def work(job: dict) -> int:
    """Run pytest on the paths of ``job`` in the checkout, which is the working directory."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (job['memory'], job['memory']))
    if job['ours']:
        sys.path.insert(0, str(ROOT))
        import mona_mm  # noqa: F401  this is what the run is about: all below happens on top of it
    else:
        if job['reference']:
            sys.path.insert(0, job['reference'])
        bare_mmcv_ext()
    import pytest
    import torch

    torch.set_num_threads(1)
    if job['library'] == 'mmcv' and not torch.cuda.is_available():
        let_the_cpu_stand_for_the_gpu()
    # Before pytest puts the checkout in front: the code under test is the installed one.
    library = __import__(job['library'])
    if job['library'] == 'mmdet':
        # mmdet.testing looks for the configs of a checkout beside the installed package.
        import mmdet.testing._utils as testing

        configs = Path('configs').resolve()
        installed = Path(library.__file__).parent / '.mim' / 'configs'
        testing._get_config_directory = lambda: str(configs if configs.exists() else installed)
    status = pytest.main(
        [
            *job['paths'],
            '-c', os.devnull, '--rootdir', os.getcwd(), '-q', '--no-header', '--tb=short', '-p', 'no:cacheprovider',
            '--continue-on-collection-errors',
            f'--timeout={job["timeout"]}', *(argument for test in job['deselect'] for argument in ('--deselect', test)),
        ],
        plugins=[Recorder(job['record'])],
    )  # fmt: skip
    assert job['ours'] == ('mona_mm' in sys.modules), 'mona_mm must be imported in the one run and not in the other'
    return 0 if status in (0, 1, 2, 5) else int(status)


# ---- in the parent ----


def run_group(library: str, checkout: Path, group: list[str], ours: bool, arguments: argparse.Namespace) -> dict:
    """The results ``{test: entry}`` of one group of test files; a test that kills the process is noted and skipped."""
    record = arguments.work_dir / f'{library}-{"ours" if ours else "stock"}.jsonl'
    results, deselect = {}, []
    while True:
        record.unlink(missing_ok=True)
        job = dict(
            library=library,
            paths=group,
            ours=ours,
            reference=arguments.reference,
            record=str(record),
            deselect=deselect,
            timeout=arguments.timeout,
            memory=int(arguments.memory * 2**30),
        )
        environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
        process = subprocess.run(
            ['nice', '-n', '10', sys.executable, __file__, '--worker', json.dumps(job)],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        started = None
        for entry in lines:
            if entry['event'] == 'start':
                started = entry['test']
            else:
                previous = results.get(entry['test'])
                if previous is None or previous['outcome'] != 'failed':  # a failing teardown counts
                    results[entry['test']] = {k: v for k, v in entry.items() if k not in ('event', 'test')}
                if entry['test'] == started:
                    started = None
        if process.returncode == 0:
            return results
        if started is None or started in deselect:
            results[' '.join(group)] = dict(
                outcome='failed', error=f'the session ended with {process.returncode}: {process.stdout[-1500:]}'
            )
            return results
        results[started] = dict(outcome='failed', error=f'the process died with {process.returncode}')
        deselect.extend(results)


def groups_of(checkout: Path, paths: list[str], only: str | None) -> list[list[str]]:
    """The test files under ``paths``, relative to the checkout, by folder: each folder is one pytest session."""
    groups = collections.defaultdict(list)
    for path in paths:
        for file in sorted((checkout / path).rglob('test_*.py')) if (checkout / path).is_dir() else [checkout / path]:
            name = str(file.relative_to(checkout))
            if file.exists() and (only is None or re.search(only, name)):
                groups[file.parent].append(name)
    return list(groups.values())


def normalised(error: str | None) -> str:
    """The first line of an error without addresses, paths of temporary files and figures."""
    first = (error or '').strip().split('\n')[0]
    return re.sub(r'0x[0-9a-f]+|/tmp/\S+|\d+(\.\d+)?(e-?\d+)?', '#', first)[:200]


def classify(ours: dict, stock: dict | None) -> tuple[str, str]:
    """What a result means, and the reason: see the head of this file."""
    if ours['outcome'] != 'failed':
        return ours['outcome'], ''
    missing = MISSING_OPERATOR.search(ours['error'] or '')
    if missing:
        return 'missing operator', missing[1] or missing[2]
    if not stock or stock['outcome'] != 'failed':
        return 'ours', normalised(ours['error'])
    # Without a network, the package has an error of its own.
    if all(re.search(STOCK_REASONS[_NETWORK], each['error'] or '') for each in (ours, stock)):
        return 'stock', _NETWORK
    if normalised(stock['error']) == normalised(ours['error']):
        for reason, pattern in STOCK_REASONS.items():
            if re.search(pattern, ours['error'] or '', re.MULTILINE):
                return 'stock', reason
        return 'stock', normalised(ours['error'])
    return 'ours', normalised(ours['error'])


def summary(results: dict) -> tuple[str, int]:
    """The Markdown summary and the number of failures that are ours."""
    lines = [
        '| library | tests | passed | of these not without us | skipped | stock | missing operator | ours |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    reasons, bad = collections.Counter(), []
    for library, tests in results.items():
        counts = collections.Counter()
        for name, entry in tests.items():
            kind, reason = classify(entry['ours'], entry.get('stock'))
            counts[kind] += 1
            stock = entry.get('stock')
            counts['gained'] += kind == 'passed' and (stock is None or stock['outcome'] == 'failed')
            if kind in ('stock', 'missing operator'):
                reasons[library, kind, reason] += 1
            elif kind == 'ours':
                bad.append(f'- {library}: `{name}`: {entry["ours"]["error"]} (without us: {stock})')
        cells = (counts[k] for k in ('passed', 'gained', 'skipped', 'stock', 'missing operator', 'ours'))
        lines.append(f'| {library} | {len(tests)} | ' + ' | '.join(map(str, cells)) + ' |')
    lines += ['', '| library | kind | reason | tests |', '|---|---|---|---:|']
    lines += [f'| {" | ".join(key)} | {number} |' for key, number in sorted(reasons.items())]
    return '\n'.join([*lines, '', *bad]), len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    for library, paths in DEFAULT_PATHS.items():
        parser.add_argument(f'--{library}', type=Path, metavar='CHECKOUT', help=f'runs {", ".join(paths)}')
    parser.add_argument('--paths', nargs='+', help='run these of the checkout instead')
    parser.add_argument('--only', metavar='REGEX', help='of the test files, those whose path matches')
    parser.add_argument('--reference', metavar='DIR', help='a folder with a compiled mmcv, for the run without us')
    parser.add_argument('--timeout', type=int, default=600, help='seconds a test may take')
    parser.add_argument('--memory', type=float, default=8, help='GiB that a session may take')
    parser.add_argument('--again', action='store_true', help='run what is in the results once more')
    parser.add_argument('--again-ours', action='store_true', help='the same, but keep the results without us')
    parser.add_argument('--out', type=Path, default=Path('upstream.json'))
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))

    arguments.reference = arguments.reference and str(Path(arguments.reference).resolve())
    arguments.out = arguments.out.resolve()
    arguments.work_dir = arguments.out.parent
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for library, paths in DEFAULT_PATHS.items():
        checkout = getattr(arguments, library)
        if checkout is None:
            continue
        checkout = checkout.resolve()
        known = results.setdefault(library, {})
        for group in groups_of(checkout, arguments.paths or paths, arguments.only):
            done = {file for file in group if any(name.split('::')[0] == file for name in known)}
            if not (arguments.again or arguments.again_ours):
                group = [file for file in group if file not in done]
            if not group:
                continue
            print(f'{library}: {len(group)} files in {Path(group[0]).parent}', file=sys.stderr, flush=True)
            ours = run_group(library, checkout, group, True, arguments)
            if arguments.again_ours:
                stock = {name: entry['stock'] for name, entry in known.items() if 'stock' in entry}
            else:
                stock = run_group(library, checkout, group, False, arguments)
            for name in [name for name in known if name.split('::')[0] in group]:
                del known[name]
            for name, entry in ours.items():
                # A file that could not be imported without us has no tests there: its own failure stands for each.
                other = stock.get(name) or stock.get(name.split('::')[0])
                known[name] = dict(ours=entry, **(dict(stock=other) if other else {}))
            arguments.out.write_text(json.dumps(results, indent=1))
    text, ours = summary(results)
    print(text)
    return 1 if ours else 0


if __name__ == '__main__':
    sys.exit(main())
