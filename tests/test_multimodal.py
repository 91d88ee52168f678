"""mmpretrain beside versions of transformers that its multi-modal models can and cannot use, by small fakes."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mona_mm.compat import multimodal

ROOT = Path(__file__).resolve().parents[1]

# What every module of the fake has: a class of any public name.
ANYTHING = """
def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)
    return type(name, (), {})
"""
TOP = (
    ANYTHING
    + """
class AutoConfig:
    from_pretrained = None
class PreTrainedModel:
    config_class = AutoConfig
class AutoModelForCausalLM(PreTrainedModel):
    pass
"""
)
MODULES = [
    '__init__',
    'activations',
    'modeling_outputs',
    'models/__init__',
    'models/auto/__init__',
    'models/auto/auto_factory',
    'models/bert/__init__',
    'models/bert/configuration_bert',
    'models/opt/__init__',
    'models/opt/configuration_opt',
    'utils',
]


def write_transformers(folder: Path, modeling_utils: str) -> None:
    """A package that reports version 5 and has ``modeling_utils`` as given and everything else there is."""
    for name in MODULES:
        path = folder / 'transformers' / f'{name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOP if name == '__init__' else ANYTHING)
    (folder / 'transformers' / 'modeling_utils.py').write_text(modeling_utils)
    info = folder / 'transformers-5.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n')


def run_beside(folder: Path, code: str) -> str:
    """What ``code`` prints in a fresh interpreter that finds the fake package of ``folder`` first."""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_MMPRETRAIN = """
import mona_mm
import mmpretrain.models
from mmpretrain.registry import MODELS

arch = dict(embed_dims=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4))
print(type(MODELS.build(dict(type='mona_mm.PeftBackbone', peft=dict(type='Mona'), base=dict(
    type='mmpretrain.SwinTransformer', arch=arch)))).__name__)
for name in ('BlipCaption', 'RAM'):
    try:
        MODELS.build(dict(type=name))
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_mmpretrain_is_imported_beside_a_transformers_that_has_dropped_names(tmp_path):
    """On its own mmpretrain ends in ``TypeError: NoneType takes no arguments``."""
    write_transformers(tmp_path, 'class PreTrainedModel: pass')
    first, *errors = run_beside(tmp_path, USE_MMPRETRAIN).splitlines()
    assert first == 'SwinTransformer'
    assert len(errors) == 2
    for name, error in zip(('BlipCaption', 'RAM'), errors, strict=True):
        assert error.startswith(f'{name} is a multi-modal model of mmpretrain')
        assert 'transformers 5.0.0' in error and 'modeling_utils has no apply_chunking_to_forward' in error
        assert error.endswith('`pip install transformers==4.49.0`.')


# ---- the check by itself ----


@pytest.fixture
def dependency(tmp_path):
    """mmpretrain's module with its two uses of transformers, as they are found in ``mmpretrain.models``."""
    root = tmp_path / 'mmpretrain'
    for name in ('models/multimodal/blip', 'models/utils', 'utils'):
        (root / name).mkdir(parents=True)
    (root / 'models/multimodal/blip/language_model.py').write_text(
        'try:\n    from transformers.modeling_utils import (PreTrainedModel,\n'
        '                                             apply_chunking_to_forward)\n'
        'except:\n    PreTrainedModel = None\n\n'
        'def later():\n    from transformers import NeverThere\n'
    )
    (root / 'models/utils/huggingface.py').write_text('import transformers\nfrom transformers import AutoConfig\n')
    module = types.ModuleType('dependency')
    module.__file__ = str(root / 'utils/dependency.py')
    module.WITH_MULTIMODAL = True
    module.register_multimodal_placeholder = original = object()
    module.original = original
    return module


def fake_transformers(monkeypatch, *names, top=('AutoConfig',)):
    package = types.ModuleType('transformers')
    package.modeling_utils = types.ModuleType('transformers.modeling_utils')
    for module, present in ((package, top), (package.modeling_utils, names)):
        for name in present:
            setattr(module, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, 'transformers', package)
    monkeypatch.setitem(sys.modules, 'transformers.modeling_utils', package.modeling_utils)


def test_a_transformers_that_has_the_names_changes_nothing(dependency, monkeypatch):
    fake_transformers(monkeypatch, 'PreTrainedModel', 'apply_chunking_to_forward')
    multimodal._correct(dependency)
    assert dependency.WITH_MULTIMODAL is True
    assert dependency.register_multimodal_placeholder is dependency.original


@pytest.mark.parametrize(
    ('names', 'top', 'fault'),
    [
        (['PreTrainedModel'], ['AutoConfig'], 'transformers.modeling_utils has no apply_chunking_to_forward'),
        (['PreTrainedModel', 'apply_chunking_to_forward'], [], 'transformers has no AutoConfig'),
    ],
)
def test_a_missing_name_is_named_by_what_needs_it(dependency, monkeypatch, names, top, fault):
    from mmengine.registry import Registry

    fake_transformers(monkeypatch, *names, top=top)
    multimodal._correct(dependency)
    assert dependency.WITH_MULTIMODAL is False
    registry = Registry('models')
    dependency.register_multimodal_placeholder(['Flamingo'], registry)
    with pytest.raises(ImportError, match=rf'^Flamingo is a multi-modal model .*: {fault}\. Install'):
        registry.build(dict(type='Flamingo'))


def test_a_transformers_that_cannot_be_imported_is_as_one_without_the_names(dependency, monkeypatch):
    """Half-installed, say: one of its own requirements is missing."""
    monkeypatch.setitem(sys.modules, 'transformers', None)  # any import of it raises ModuleNotFoundError
    multimodal._correct(dependency)
    assert dependency.WITH_MULTIMODAL is False


def test_without_the_extra_nothing_is_looked_for(dependency, monkeypatch):
    dependency.WITH_MULTIMODAL = False
    monkeypatch.setattr(multimodal, '_faults', None)
    multimodal._correct(dependency)
    assert dependency.register_multimodal_placeholder is dependency.original


def test_installing_again_changes_nothing():
    before = list(sys.meta_path)
    multimodal.install_multimodal_check()
    assert sys.meta_path == before
