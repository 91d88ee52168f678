"""Every name of this package that its documentation or a docstring mentions is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

NAME = re.compile(r'(?<![\w./-])mona_mm(?:\.[A-Za-z_]\w*)+(?!\w|/\d)')  # no name of a file format
FILE = re.compile(r'(?<![\w/])mona_mm(?:/[\w-][\w.-]*)+')  # `.mim` is in wheels alone
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
CODE = [path for folder in ('mona_mm', 'tools', 'configs') for path in sorted((ROOT / folder).rglob('*.py'))]


def texts(path: Path) -> list[str]:
    """The text of a page; of Python the docstrings, those of attributes included, and the comments."""
    content = path.read_text()
    if path.suffix == '.md':
        return [content]
    comments = [line.partition('#')[2] for line in content.splitlines() if '#' in line]
    if 'configs' in path.relative_to(ROOT).parts[:1]:
        return comments
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(content))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return strings + comments


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, of a class, or what a class annotates."""
    parts = name.split('.')
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if part not in getattr(found, '__annotations__', {}) and not hasattr(found, part):
                return _is_registered(name)
            found = getattr(found, part, None)
        return True
    return False


def _is_registered(name: str) -> bool:
    """Whether a config may say ``type=name``."""
    from mona_mm import registry

    registries = [getattr(registry, key) for key in registry.__dict__ if key.isupper()]
    return any(each.get(name) is not None for each in registries if each.scope == 'mona_mm')


@pytest.mark.parametrize('path', [*PAGES, *CODE], ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path):
    """Modules, classes and functions by their dotted names, and files of the package by their paths."""
    found = [name for text in texts(path) for name in NAME.findall(text)]
    assert [name for name in dict.fromkeys(found) if not is_there(name)] == []
    files = [name.rstrip('.') for text in texts(path) for name in FILE.findall(text)]
    assert [name for name in dict.fromkeys(files) if not (ROOT / name).exists()] == []
