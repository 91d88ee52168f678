"""mona_mm under both mim programs, as a user would have it: environments of their own, commands run elsewhere. Slow."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from shipped import NARROW, NARROW_TASK

from mona_mm.datasets.shapes import CLASSES, make_demo_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROGRAMS = {
    'official': ('openmim==0.3.9', 'requirements/constraints.txt'),
    'onedl': ('onedl-mim==0.5.1', 'requirements/constraints-onedl.txt'),
}
CHECKOUT = (
    *('configs', 'mona_mm', 'requirements', 'tools', 'LICENSE', 'Makefile', 'README.md', 'model-index.yml'),
    *('pyproject.toml', 'requirements.txt', 'setup.py'),
)


class Mim(NamedTuple):
    """An environment with one of the programs, and with mona_mm from a checkout or from a wheel."""

    python: Path
    package: Path  # where mona_mm must be found: the checkout, or the environment
    elsewhere: Path  # the folder that commands run in

    def __call__(self, *arguments: str) -> str:
        return command(self.python.with_name('mim'), *arguments, cwd=self.elsewhere)


def command(*arguments: object, cwd: Path) -> str:
    """What a command prints; a failing one fails the test with it."""
    # None of what this environment adds to the ones under test.
    drop = ('PYTHONPATH', 'VIRTUAL_ENV', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL')
    env = {key: value for key, value in os.environ.items() if key not in drop}
    result = subprocess.run([*map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f'{arguments[0]} {arguments[1]}: {output[-4000:]}'
    return output


@pytest.fixture(scope='module', params=PROGRAMS)
def checkout(request, tmp_path_factory) -> Mim:
    """A copy of the checkout with what `make env` installs, and the program. A wheel has been built in it, too, since
    what that leaves behind must not hide a config."""
    program, constraints = PROGRAMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    copy, venv, elsewhere = folder / 'checkout', folder / 'venv', folder / 'elsewhere'
    request.addfinalizer(lambda: shutil.rmtree(venv, ignore_errors=True))  # gigabytes, which pytest would keep
    elsewhere.mkdir()
    copy.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('.mim', '__pycache__'))
        else:
            shutil.copy(ROOT / name, copy)
    python = venv / 'bin/python'
    variables = (f'STACK={request.param}', f'VENV={venv}', f'PYTHON={sys.executable}')
    command('make', *variables, python, cwd=copy)
    try:
        command(python, '-m', 'pip', 'install', program, '-c', constraints, cwd=copy)
    except AssertionError as error:
        pytest.skip(f'{program} cannot be installed here: {str(error)[-300:]}')
    command('make', *variables, 'env', cwd=copy)
    command(python, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, '.', cwd=copy)
    make_demo_dataset(elsewhere / 'data', train=4, val=2)
    return Mim(python, copy, elsewhere)


@pytest.fixture(scope='module')
def wheel(checkout) -> Mim:
    """The same environment, with the wheel in place of the checkout."""
    command(checkout.python, '-m', 'pip', 'uninstall', '--yes', 'mona_mm', cwd=checkout.elsewhere)
    (file,) = checkout.package.parent.glob('*.whl')
    checkout('install', str(file))
    return checkout._replace(package=checkout.python.parents[1])


def options(**values: object) -> list[str]:
    return ['--cfg-options', *(re.sub(r"[' ]", '', f'{key}={value}') for key, value in values.items())]


def check_found(mim: Mim, name: str, output: str) -> None:
    """The program has found a config that only mona_mm has, where mona_mm is."""
    path = re.search(rf'will use (\S+/{name}) instead', output)[1]
    assert Path(path).is_relative_to(mim.package.resolve())


def check_search(mim: Mim) -> None:
    """`mim search` knows all configs of a method, and what it prints of one."""
    names = mim('search', 'mona_mm', '--model', 'mona', '--valid-config')
    assert all(f"'{path.stem}'" in names for path in (ROOT / 'configs/mona').glob('*.py'))
    entry = mim('search', 'mona_mm', '--config', 'lora_retinanet_swin_l_voc')
    assert re.search(r'pascal voc 2007/ap50 +85\.42\b', entry)
    assert re.search(r'trainable_backbone_parameters +4620288\b', entry)


# In this order: the wheel takes the checkout's place.


def test_checkout(checkout):
    """From elsewhere, with the checkout installed as `make env` does: search, and a training of the demo."""
    check_search(checkout)
    output = checkout(
        *('train', 'mona_mm', 'demo_mona_shapes.py', '--gpus', '0', '--work-dir', 'demo'),
        *options(data_root='data', **{'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1}),
    )
    check_found(checkout, 'demo_mona_shapes.py', output)
    assert re.search(r'Epoch\(val\) \[1\]\[2/2\].*coco/bbox_mAP', output)
    assert (checkout.elsewhere / 'demo/epoch_1.pth').is_file()


def test_wheel(wheel):
    """From elsewhere, with the wheel: search, a training of the main config scaled down by options, and a test of its
    checkpoint, which scores the same."""
    check_search(wheel)
    name = 'cascade_swin_b_coco.py'
    narrow = {**NARROW, **NARROW_TASK['coco'], 'data_root': 'data', 'classes': list(CLASSES)}
    narrow |= {key.replace('val_', 'test_', 1): value for key, value in narrow.items() if key.startswith('val_')}
    where = ('--work-dir', 'main', *options(**narrow))
    output = wheel('train', 'mona_mm', name, '--gpus', '0', *where)
    check_found(wheel, name, output)
    score = r'coco/bbox_mAP: (\S+) .*coco/segm_mAP: (\S+)'
    trained = re.search(rf'Epoch\(val\) \[1\]\[2/2\] +{score}', output).groups()
    output = wheel('test', 'mona_mm', name, '--checkpoint', 'main/epoch_1.pth', *where)
    check_found(wheel, name, output)
    assert re.search(rf'Epoch\(test\) \[2/2\] +{score}', output).groups() == trained
