"""Make mmpretrain importable beside a version of transformers that its multi-modal models cannot use."""

import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

_DEPENDENCY = 'mmpretrain.utils.dependency'
# The folders of mmpretrain that hold the modules which it imports only if it finds transformers.
_PARTS = ('models/multimodal', 'models/utils')


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that resolves ``mmpretrain.utils.dependency`` as Python does and corrects the loaded module."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DEPENDENCY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _correct(module)


_FINDER = _Finder()


def install_multimodal_check() -> None:
    """Let mmpretrain import its multi-modal models only if they can be imported.

    mmpretrain imports them whenever transformers 4.28 or later is installed. Later versions (4.57 and 5 among them)
    have moved or dropped some of the names that these models use, so every import of ``mmpretrain.models`` fails with
    ``TypeError: NoneType takes no arguments``. If such a name is missing, mmpretrain is told that its multi-modal
    extra is not installed, and behaves as it does without transformers: building one of these models raises
    ImportError. Nothing is imported before mmpretrain asks for it. Without transformers, or with a version that has
    all the names, nothing changes. Further calls have no effect.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if _DEPENDENCY in sys.modules:
        _correct(sys.modules[_DEPENDENCY])


def _correct(dependency: ModuleType) -> None:
    """Set ``WITH_MULTIMODAL`` in mmpretrain's module to False if an import that depends on it would fail."""
    if not getattr(dependency, 'WITH_MULTIMODAL', False):
        return
    fault = next(_faults(Path(dependency.__file__).parents[1]), None)
    if fault is None:
        return
    dependency.WITH_MULTIMODAL = False

    def register_multimodal_placeholder(names, registry) -> None:
        for name in names:
            registry.register_module(name=name, module=_placeholder(name, fault))

    dependency.register_multimodal_placeholder = register_multimodal_placeholder


def _placeholder(name: str, fault: str):
    def not_importable(*args, **kwargs):
        raise ImportError(
            f'{name} is a multi-modal model of mmpretrain, which cannot use the transformers {_version()} '
            f'installed here: {fault}. Install one that it can: `pip install transformers==4.49.0`.'
        )

    return not_importable


def _version() -> str:
    try:
        return version('transformers')
    except PackageNotFoundError:
        return '(of unknown version)'


def _faults(mmpretrain: Path) -> Iterator[str]:
    """Describe each top-level import from transformers that fails in the multi-modal parts of mmpretrain."""
    for path in sorted(path for part in _PARTS for path in (mmpretrain / part).rglob('*.py')):
        source = path.read_text(encoding='utf-8')
        if 'transformers' not in source:
            continue
        for module, names in _imports(ast.parse(source)):
            try:
                imported = importlib.import_module(module)
                missing = [name for name in names if not hasattr(imported, name)]
            except Exception as error:  # an incompatible or half-installed package may raise anything when imported
                yield f'importing {module} raises {type(error).__name__}: {error}'
                continue
            yield from (f'{module} has no {name}' for name in missing)


def _imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """The modules of transformers that a file imports outside functions and classes, each with the imported names."""
    for statement in tree.body:
        for node in statement.body if isinstance(statement, ast.Try) else [statement]:
            if isinstance(node, ast.Import):
                modules = [(alias.name, []) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [(node.module, [alias.name for alias in node.names])]
            else:
                continue
            yield from ((module, names) for module, names in modules if module.split('.')[0] == 'transformers')
