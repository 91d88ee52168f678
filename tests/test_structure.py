"""The structure of the package: imports run down the floors, no folders import each other, functions are short."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {'errors', 'registry', 'record', 'type_names', 'options', 'version', 'compat'},
    {'nn', 'datasets'},
    {'hosts'},
    {'methods', 'frozen'},
    {'checkpoint'},
    {'spt', 'report', 'own_data'},
    {'backbone', 'peft_model', 'hooks', 'models', 'strategies'},
    {'optim', 'catalogue', 'reliability', 'config'},
    {'data_check', 'spt_plans'},
    {'commands', 'inference'},
    {'reproduce', 'benchmark'},
    {'tools'},
)
"""The rooms from the ground up, see docs/design.md: the folders and top-level modules of mona_mm, and tools."""

LAZY = {
    ('benchmark/detector.py', 'mmdet'): 'importing mmdet.testing takes a second, and only this benchmark needs it',
    ('benchmark/hf_peft.py', 'peft'): 'an extra, which takes seconds to import',
    ('compat/mmcv_ops.py', 'mmcv'): 'mmcv.ops can be imported only after these operators have been registered',
    ('compat/mmcv_ops.py', 'torchvision'): 'only some operators need torchvision, which is slow to import',
    ('compat/safe_globals.py', 'numpy'): 'a later numpy may lack these names, which are used only for saving',
    ('hosts/pvt.py', 'mmdet'): 'only the conversion of official PVT checkpoints needs mmdet, which is slow to import',
    ('inference/export.py', 'onnx'): 'an extra, which only an export needs',
    ('inference/export.py', 'onnxruntime'): 'an extra, which only an export needs',
    ('methods/adapter_plus.py', 'mmcv'): 'importing mmcv takes a second, and importing methods must not',
    ('methods/fast_mona.py', 'mona_mm'): 'importing Triton takes seconds, and only a GPU needs it',
    ('methods/lora.py', 'mmcv'): 'importing mmcv takes a second, and importing methods must not',
    ('models/dinov2.py', 'mona_mm'): 'the class derives from one of mmpretrain, which takes seconds to import',
    ('models/hf_backbone.py', 'transformers'): 'an extra, which takes seconds to import',
    ('spt/sparse.py', 'mmcv'): 'importing mmcv takes a second, and importing spt must not',
    ('spt/structured.py', 'mmcv'): 'importing mmcv takes a second, and importing spt must not',
}
"""The packages that a module imports inside a function, with the reason."""

LONGEST = 60
"""The largest number of lines of code in a function, its docstring not counted."""


def files() -> list[Path]:
    return sorted([*(ROOT / 'mona_mm').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')])


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding='utf-8'))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix().removeprefix('mona_mm/')


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix('').parts
    return parts[0] if parts[0] == 'tools' else parts[1]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """The absolute names of all imported modules, those under TYPE_CHECKING and inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'line {node.lineno}: imports are absolute in this project'
            yield node.module
            if node.module == 'mona_mm':
                yield from (f'mona_mm.{alias.name}' for alias in node.names)


def imported_rooms(file: Path) -> set[str]:
    """The rooms of mona_mm that a file imports, without its own."""
    names = imported_modules(tree_of(file))
    rooms = {name.split('.')[1] for name in names if name.startswith('mona_mm.')}
    known = set().union(*FLOORS)
    return (rooms & known) - {room_of(file)}


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_room_is_on_one_floor():
    rooms = {room_of(file) for file in files()} - {'__init__'}
    assert rooms == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(rooms)


def test_imports_run_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = [
        f'{name_of(file)} imports {room}'
        for file in files()
        if room_of(file) != '__init__'
        for room in sorted(imported_rooms(file))
        if floor[room] > floor[room_of(file)]
    ]
    assert not upward


def test_no_room_imports_the_package_itself():
    """``from mona_mm import merge`` imports all that the package's ``__init__`` does, whatever the floor."""
    named = {
        name_of(file): set(imported_modules(tree_of(file))) & {f'mona_mm.{name}' for name in exported_names()}
        for file in files()
        if room_of(file) not in ('__init__', 'tools')
    }
    assert not {name: modules for name, modules in named.items() if modules}


def exported_names() -> set[str]:
    tree = tree_of(ROOT / 'mona_mm' / '__init__.py')
    (names,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == '__all__']
    return set(ast.literal_eval(names))


def test_rooms_import_each_other_in_no_circle():
    imports: dict[str, set[str]] = {}
    for file in files():
        if room_of(file) != '__init__':
            imports.setdefault(room_of(file), set()).update(imported_rooms(file))
    rooms = set(imports)
    while rooms:
        free = {room for room in rooms if not imports[room] & rooms}
        assert free, f'a circle among {sorted(rooms)}'
        rooms -= free


def test_imports_inside_functions_are_slow_ones():
    lazy = {
        (name_of(file), module.partition('.')[0])
        for file in files()
        if room_of(file) != 'tools'
        for function in functions(file)
        for module in imported_modules(function)
    }
    assert lazy == set(LAZY)
    own = {file for file, package in LAZY if package == 'mona_mm'}
    assert own == {'models/dinov2.py', 'methods/fast_mona.py'}, 'a circle is no reason'


@pytest.mark.parametrize('folder', ['mona_mm', 'tools'])
def test_functions_are_short(folder):
    long = {}
    for file in files():
        if file.is_relative_to(ROOT / folder):
            for function in functions(file):
                docstring = function.body[0] if ast.get_docstring(function) is not None else None
                lines = function.end_lineno - function.lineno + 1
                lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                if lines > LONGEST:
                    long[f'{name_of(file)}: {function.name}'] = lines
    assert not long
