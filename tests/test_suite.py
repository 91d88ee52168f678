"""The suite itself: what it covers, and how its files depend on one another."""

import ast
import re
from pathlib import Path

import pytest
from conftest import HOSTS, ROOT
from declared_hosts import DECLARED
from foreign_hosts import FOREIGN
from mmengine.registry import MODELS
from suite import COMMON, COMMON_IN_HALF_PRECISION, COMMON_STRUCTURED, METHOD_CONFIGS, STRUCTURED, types

from mona_mm import hosts
from mona_mm.methods import StreamModule
from mona_mm.registry import METHODS

BY_PLANS = {'SPT'}
"""The methods that the shared suite meets by their plans, in test_spt.py."""


def uncovered_methods() -> set[str]:
    """The registered methods that the shared suite does not run over."""
    covered = {name for config in METHOD_CONFIGS.values() for name in types(config)} | BY_PLANS
    return set(METHODS.module_dict) - covered


def uncovered_hosts() -> set[str]:
    """The registered hosts that the shared suite does not run over."""
    classes = [MODELS.get(config['type']) for config in (*HOSTS.values(), *DECLARED.values(), *FOREIGN.values())]
    return set(hosts.HOSTS) - {f'{cls.__module__}.{cls.__qualname__}' for cls in classes}


def test_every_method_and_host_is_covered(monkeypatch):
    """Whoever registers a method or a host adds a config of it to suite.py or conftest.py, or this fails."""
    assert uncovered_methods() == uncovered_hosts() == set()
    monkeypatch.setitem(METHODS.module_dict, 'Another', StreamModule)
    monkeypatch.setitem(hosts.HOSTS, 'library.Another', next(iter(hosts.HOSTS.values())))
    assert uncovered_methods() == {'Another'} and uncovered_hosts() == {'library.Another'}


def test_every_method_and_host_is_covered_by_default():
    """The choice of pairs for `make test` names each host, and each method twice at least, once in half precision."""
    assert COMMON.keys() == HOSTS.keys() and all(COMMON.values())
    chosen = [method for methods in COMMON.values() for method in methods]
    assert all(chosen.count(method) >= 2 for method in METHOD_CONFIGS) and set(chosen) == set(METHOD_CONFIGS)
    low = [method for methods in COMMON_IN_HALF_PRECISION.values() for method in methods]
    assert COMMON_IN_HALF_PRECISION.keys() == HOSTS.keys() and set(low) == set(METHOD_CONFIGS)
    structured = [kind for kinds in COMMON_STRUCTURED.values() for kind in kinds]
    assert COMMON_STRUCTURED.keys() <= HOSTS.keys()
    assert all(structured.count(kind) >= 2 for kind in STRUCTURED) and set(structured) == set(STRUCTURED)


TESTS = sorted(Path(__file__).parent.glob('*.py'))


def imports(file: Path) -> set[str]:
    """The first names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or '.')
    return {name.partition('.')[0] for name in names}


@pytest.mark.parametrize('file', TESTS, ids=lambda file: file.stem)
def test_no_test_module_is_imported(file):
    """What two test modules share is in conftest.py, helpers.py, suite.py or another module that holds no tests."""
    modules = {each.stem for each in TESTS if each.stem.startswith('test_')}
    assert not imports(file) & modules


@pytest.mark.parametrize('file', TESTS, ids=lambda file: file.stem)
def test_only_real_images_are_beside_the_checkout(file):
    """Nothing but :func:`conftest.real_images` looks outside of the repository."""
    text = file.read_text()
    if file.name not in ('conftest.py', 'test_suite.py'):
        assert not re.search(r'\bSHARED\b.*import|import.*\bSHARED\b|\.\./shared|ROOT\.parent', text)


def test_evidence_is_in_the_tree():
    """What golden tests read is part of a public clone."""
    assert (ROOT / 'tests/golden/README.md').is_file()
