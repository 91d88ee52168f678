"""Attack every reader of files: python tests/attack.py [--count N] [--seed S] [--only KIND ...]

Two kinds of attack: damage (cut, changed, moved, doubled, zeroed ranges) of honest files, and pickles, deltas and plans
that are forged. For each kind the counts are printed: refused with the error that says so, loaded and equal to the
honest file (the damage hit nothing that is read), loaded as plain values (a forged pickle may hold some), and anything
else, which must be 0: a file that loads as something else, another error, a file written, something run, a crash.
Pickles are loaded in a process of their own. The tests run a short, fixed part of it.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader

from mona_mm import PeftBackbone, save_delta
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.errors import CheckpointMismatchError, PlanError, UserError
from mona_mm.spt import Plan
from mona_mm.spt.parts import Architecture
from mona_mm.spt.published import _read as read_published_plan

# ----------------------------------------------------------------------------------------------------------- pickles

# What can follow a value on the stack, with the values that it takes from there.
OPCODES = {
    'REDUCE': (pickle.TUPLE, pickle.REDUCE),
    'NEWOBJ': (pickle.TUPLE, pickle.NEWOBJ),
    'BUILD': (b'', pickle.BUILD),
    'APPEND': (b'', pickle.APPEND),
    'SETITEM': (b'', pickle.SETITEM),
    'APPENDS': (b'', pickle.APPENDS),
    'SETITEMS': (b'', pickle.SETITEMS),
    'BINPERSID': (b'', pickle.BINPERSID),
}


def encoded(value) -> bytes:
    """The opcodes that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    """The opcodes that put a global on the stack."""
    module, _, attribute = name.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def tuple_of(*pieces: bytes) -> bytes:
    return pickle.MARK + b''.join(pieces) + pickle.TUPLE


def called(function: str, *pieces: bytes) -> bytes:
    return named(function) + tuple_of(*pieces) + pickle.REDUCE


@cache
def allowed_names() -> tuple[list[str], list[str]]:
    """The globals that a file may name: those of the package, and torch's own."""
    import torch._weights_only_unpickler as unpickler

    ours = sorted(each[1] for each in torch.serialization.get_safe_globals() if isinstance(each, tuple))
    get = getattr(unpickler, '_get_allowed_globals', dict)  # torch's own list is private
    return ours, sorted(get())


@cache
def pieces() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Values to attack, made as honest files make them and otherwise; and values to attack them with."""
    history = HistoryBuffer()
    history.update(1.5)
    dtype = encoded(np.dtype('f8'))
    array = encoded(np.arange(3.0))
    empty = called('numpy.core.multiarray._reconstruct', named('numpy.ndarray'), encoded((0,)), encoded(b'b'))
    storage = tuple_of(encoded('storage'), named('torch.FloatStorage'), encoded('0'), encoded('cpu'), encoded(4))
    tensor = called(
        'torch._utils._rebuild_tensor_v2', storage + pickle.BINPERSID, encoded(0), encoded((4,)), encoded((1,)),
        encoded(False), called('collections.OrderedDict'),
    )  # fmt: skip
    method = called('builtins.getattr', named('mmengine.logging.history_buffer.HistoryBuffer'), encoded('mean'))
    unfilled = named('mmengine.logging.history_buffer.HistoryBuffer') + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    filled = {'max_length': 5, '_log_history': np.ones(2), '_count_history': np.ones(2)}
    attacked = dict(
        dtype=dtype, bare_dtype=called('numpy.dtype', encoded('f8'), encoded(False), encoded(True)), array=array,
        empty=empty, scalar=encoded(np.float64(3)), history=encoded(history), unfilled=unfilled, method=method,
        tensor=tensor, ordered=called('collections.OrderedDict'), counter=called('collections.Counter'),
        shared=called('torch._utils._rebuild_device_tensor_from_numpy', array, named('torch.float64'), encoded('cpu'),
                      encoded(False)),
        list=pickle.EMPTY_LIST, dict=pickle.EMPTY_DICT, set=called('builtins.set'), bytes=encoded(b''),
    )  # fmt: skip
    address = struct.pack('<Q', id(None) + 8)
    fields = tuple_of(encoded(('x',)), encoded(None))
    tuples = {
        'nothing': (), 'one': (1,), 'huge': (2**40,), 'text': ('x',), 'texts': ('x', 'y'), 'none': (None,),
        'f8': ('f8', False, True),
        'O': ('O8', False, True), 'V': ('V8', False, True), 'S': ('S1', False, True),
        'list': ([('a', 'O')], False, True),
        'comma': ('f8,O', False, True), 'align': ('f8', True, True), 'subarray': ('(2,)f8', False, True),
        'dict': ({'names': ['a'], 'formats': ['O']},), 'bytes': (b'f8',), 'times': ('M8', False, True),
        'dict state': ({'a': 1},), 'pair': ({}, {'__class__': 1}), 'second of a pair': (None, {'a': 1}),
        'state': (3, '<', None, None, None, -1, -1, 0), 'objects': (3, '|', None, None, None, 8, 8, 63),
        'size': (3, '|', None, None, None, 2**40, 8, 0), 'order': (3, 'x', None, None, None, -1, -1, 0),
        'metadata': (4, '<', None, None, None, -1, -1, 0, {'a': 1}), 'flags': (3, '<', None, None, None, -1, -1, 2**31),
        'names': (3, '|', None, ('a',), {'a': 1}, 8, 8, 0), 'sub': (3, '|', ('f8', (2,)), None, None, 16, 8, 0),
        'getattr': ('__init__',), 'scalar': (1, b'12345678'), 'shape': ((0,), b'b'), 'minus': ((-1,), b'b'),
    }  # fmt: skip
    weapons = {name: encoded(value) for name, value in tuples.items()}
    weapons |= {f'unpacked {name}': b''.join(map(encoded, value)) for name, value in tuples.items()}
    weapons |= {
        'int': encoded(2**40), 'dict': encoded({'a': 1, 'mean': 2}),
        'class': tuple_of(encoded(None), named('torch.Tensor')),
        'fields': tuple_of(encoded(3), encoded('|'), encoded(None), encoded(('a',)), pickle.EMPTY_DICT + encoded('a')
                           + tuple_of(dtype, encoded(0)) + pickle.SETITEM, encoded(16), encoded(8), encoded(27)),
        'base': tuple_of(encoded(3), encoded('|'), tuple_of(dtype, encoded((2,))), encoded(None), encoded(None),
                         encoded(16), encoded(8), encoded(0)),
        'of objects': tuple_of(encoded(1), encoded((1,)), called('numpy.dtype', weapons['unpacked O']), encoded(False),
                               encoded([1])),
        'address': tuple_of(encoded(1), encoded((1,)), dtype, encoded(False), encoded(address)),
        'too short': tuple_of(encoded(1), encoded((2**40,)), dtype, encoded(False), encoded(address)),
        'negative': tuple_of(encoded(1), encoded((-1, -1)), dtype, encoded(False), encoded(address)),
        'axes': tuple_of(encoded(1), encoded((1,) * 70), dtype, encoded(False), encoded(address)),
        'no bytes': tuple_of(encoded(1), encoded((0, 2**62, 2**62)), dtype, encoded(False), encoded(b'')),
        'list': tuple_of(encoded(1), encoded((1,)), dtype, encoded(False), encoded([1.0])),
        'truth': tuple_of(encoded(1), encoded((8,)), encoded(np.dtype('?')), encoded(False), encoded(address)),
        'good': tuple_of(encoded(1), encoded((1,)), dtype, encoded(False), encoded(bytes(8))),
        'scalar of dtype': tuple_of(dtype, encoded(bytes(8))), 'short scalar': tuple_of(dtype, encoded(b'1')),
        'arrays': encoded(filled), 'more': encoded({**filled, 'mean': 3}),
        'objects': encoded({**filled, '_log_history': [{}]}),
        'methods': encoded({**filled, 'statistics_methods': {'mean': 3}}),
        'torch method': encoded(filled) + encoded('statistics_methods') + pickle.EMPTY_DICT + encoded('mean')
        + named('torch._utils._rebuild_tensor') + pickle.SETITEM + pickle.SETITEM,
        'own method': encoded(filled) + encoded('statistics_methods') + pickle.EMPTY_DICT + encoded('mean') + method
        + pickle.SETITEM + pickle.SETITEM,
        'of history': tuple_of(named('mmengine.logging.history_buffer.HistoryBuffer'), encoded('__init__')),
        'of array': tuple_of(named('numpy.ndarray'), encoded('mean')), 'fields only': fields,
    }  # fmt: skip
    weapons |= {f'a {name}': piece for name, piece in attacked.items()}
    return attacked, weapons


def forged_objects() -> dict[str, bytes]:
    """Arrays and scalars of types with a field that says of eight bytes that they are a Python object's address."""
    inner = called('numpy.dtype', *map(encoded, ('O8', False, True)))
    field = pickle.EMPTY_DICT + encoded('x') + tuple_of(inner, encoded(0)) + pickle.SETITEM
    address = encoded(struct.pack('<Q', 8))
    made = {}
    for kind, core in itertools.product(('f8', 'i8', 'V8', 'O8'), ('core', '_core')):
        empty = called(f'numpy.{core}.multiarray._reconstruct', named('numpy.ndarray'), encoded((0,)), encoded(b'b'))
        for flags in (0, 0b11001):  # of which one says that there are references to count
            state = tuple_of(*map(encoded, (3, '<', None, ('x',))), field, *map(encoded, (8, 8, flags)))
            dtype = called('numpy.dtype', *map(encoded, (kind, False, True))) + state + pickle.BUILD
            filled = tuple_of(*map(encoded, (1, (1,))), dtype, encoded(False), address)
            made[f'{core}: array of {kind}, {flags}'] = empty + filled + pickle.BUILD
            made[f'{core}: scalar of {kind}, {flags}'] = called(f'numpy.{core}.multiarray.scalar', dtype, address)
    return made


def programs() -> Iterator[tuple[str, bytes]]:
    """Every allowed global, and everything made of one, under every opcode that can follow, with every value."""
    ours, torchs = allowed_names()
    attacked, weapons = pieces()
    targets = {**attacked, **{name: named(name) for name in ours}}
    for target, piece in targets.items():
        for opcode, (before, operator) in OPCODES.items():
            for weapon, value in weapons.items():
                body = pickle.MARK + value + before + operator if before or opcode.endswith('S') else value + operator
                yield f'{target} {opcode} {weapon}', piece + body
    # torch calls what a file names here, and then sets the state of what comes of it
    for target, piece in {**attacked, **{name: named(name) for name in ours}}.items():
        for kind in (*ours, 'torch.Tensor'):
            for weapon in (
                'nothing',
                'f8',
                'shape',
                'scalar of dtype',
                'arrays',
                'good',
                'state',
                'fields',
                'of history',
            ):
                state = weapons[weapon]
                yield (
                    f'{target} from type {kind} {weapon}',
                    called('torch._tensor._rebuild_from_type_v2', piece, named(kind), weapons['nothing'], state),
                )
    for target in torchs:
        for weapon in ('nothing', 'a array', 'a empty', 'a dtype', 'a history', 'a method', 'a unfilled', 'a shared'):
            for opcode in ('REDUCE', 'NEWOBJ', 'BUILD'):
                before, operator = OPCODES[opcode]
                yield (
                    f'{target} {opcode} {weapon}',
                    named(target) + pickle.MARK + weapons[weapon] + pickle.TUPLE + operator,
                )


def random_program(rng: random.Random) -> tuple[str, bytes]:
    """A global or a value, and up to five opcodes with random values, one after the other."""
    ours, _ = allowed_names()
    attacked, weapons = pieces()
    name, body = rng.choice([*attacked.items(), *((name, named(name)) for name in ours)])
    says = [name]
    for _ in range(rng.randrange(1, 6)):
        opcode = rng.choice([*OPCODES, 'BUILD', 'REDUCE', 'put', 'tuple'])
        if opcode == 'put':
            body += pickle.BINPUT + b'\xf0' + pickle.TUPLE1 + pickle.BINGET + b'\xf0' + pickle.TUPLE2
            says.append(opcode)
            continue
        if opcode == 'tuple':
            body += pickle.TUPLE1
            continue
        before, operator = OPCODES[opcode]
        chosen = rng.choices(list(weapons), k=rng.randrange(1, 4) if before or opcode.endswith('S') else 1)
        values = b''.join(weapons[weapon] for weapon in chosen)
        body += pickle.MARK + values + before + operator if before or opcode.endswith('S') else values + operator
        says += [opcode, *chosen]
    return ' '.join(says), body


def archive(body: bytes) -> bytes:
    """A checkpoint of torch whose state dict holds what these opcodes leave on the stack."""
    data = pickle.PROTO + b'\x02' + pickle.EMPTY_DICT + encoded('params') + body + pickle.SETITEM + pickle.STOP
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        for name, content in (('data.pkl', data), ('byteorder', b'little'), ('version', b'3\n'), ('data/0', bytes(16))):
            file.writestr(f'a/{name}', content)
    return buffer.getvalue()


_RUNS = ('subprocess', 'os.system', 'os.exec', 'os.spawn', 'os.posix_spawn', 'os.fork', 'os.remove', 'os.rename',
         'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.putenv', 'socket.', 'ctypes.',
         'exec', 'compile', 'import', 'shutil.', 'webbrowser', 'urllib')  # fmt: skip


# Of the standard library, what runs code that it has generated: for named tuples and the like, and for imports.
_GENERATE = ('typing.py', '__init__.py', 'dataclasses.py', 'enum.py', '<frozen importlib._bootstrap>',
             '<frozen importlib._bootstrap_external>', 'linecache.py')  # fmt: skip


class Watch:
    """Notes what a load does beside reading: files that it writes, modules that it imports, code that it runs."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == 'open':
            _, mode, flags = arguments
            if not set(mode or '') & set('wax+') and not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif not event.startswith(_RUNS) or event == 'os.putenv' and b'WEIGHTS_ONLY' in bytes(arguments[0]):
            return
        if event == 'import' and str(arguments[0]).startswith(('encodings.', 'torch.')):
            return  # a codec, whose name a pickle states, and what torch imports late
        if event in ('exec', 'compile') and Path(sys._getframe(1).f_code.co_filename).name in _GENERATE:
            return
        self.seen.append(f'{event} {str(arguments)[:100]}')


def problem(value, exact: bool, depth: int = 0) -> str:
    """What in a loaded value is not plain, in use too; empty if all is."""
    of = type(value)
    if value is None or of in (bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device):
        return ''
    if of in (dict, OrderedDict, Counter):
        found = [problem(each, exact, depth + 1) for pair in value.items() for each in pair]
        return next(filter(None, found), '')
    if of in (list, tuple, set):
        return next(filter(None, (problem(each, exact, depth + 1) for each in value)), '')
    if isinstance(value, torch.Tensor | torch.storage.UntypedStorage | torch.storage.TypedStorage):
        return ''  # torch's own
    if isinstance(value, np.generic):
        return '' if value.dtype.kind in 'biufc' else f'a scalar {value.dtype}'
    if of is np.dtype or isinstance(value, np.dtype):
        return '' if value.kind in 'biufc' and value.isbuiltin and not value.metadata else f'a type {value!r}'
    if isinstance(value, np.ndarray):
        repr(value)
        if exact and of is not np.ndarray:
            return f'an array of type {of}'
        if exact or value.dtype.kind != 'S':
            if value.dtype.kind not in 'biufc' or value.dtype.hasobject:
                return f'an array {value.dtype}'
            value.sum(), value.copy(), pickle.dumps(value), copy.deepcopy(value)
        return ''
    if of is HistoryBuffer:
        own = {'max_length', '_log_history', '_count_history', 'statistics_methods'}  # the last one once it is copied
        if not own - {'statistics_methods'} <= set(vars(value)) <= own:
            return f'a history with {set(vars(value))}'
        if len(value.data[0]):
            [value.statistics(name) for name in ('mean', 'min', 'max', 'current')]
        copy.deepcopy(value).update(1)
        return next(filter(None, (problem(each, True, depth + 1) for each in value.data)), '')
    if not exact and of.__module__ == 'mona_mm.compat.safe_globals':
        return ''  # stands for something, and does nothing
    import torch._weights_only_unpickler as unpickler

    own = list(getattr(unpickler, '_get_allowed_globals', dict)().values())
    if any(value is each for each in own) or (not exact and any(value is each[0] for each in _registered())):
        return ''  # a name that stands there alone
    return f'a {of}'


def _registered() -> list:
    return [each for each in torch.serialization.get_safe_globals() if isinstance(each, tuple)]


def load_pickles(folder: Path, chosen: list[tuple[str, bytes]]) -> Counter:
    """Load each with every reader of pickles; the file ``at`` says which one, should the process end."""
    watch, found, methods = Watch(), Counter(), dict(HistoryBuffer._statistics_methods)
    readers = {
        'torch': (lambda path: torch.load(path, map_location='cpu'), False, Exception),
        'mmengine': (lambda path: CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent'), True, UserError),
        'plan': (read_published_plan, True, PlanError),
    }
    warnings.simplefilter('ignore')
    path = folder / 'a.pth'
    path.write_bytes(archive(encoded(b'a') + pieces()[0]['tensor'] + pickle.TUPLE2))
    repr(torch.load(path))  # and what torch imports for it
    for name, body in chosen:
        (folder / 'at').write_text(name)
        path.write_bytes(archive(body))
        for reader, (load, exact, refusal) in readers.items():
            wrong, watch.seen, watch.on = '', [], True
            try:
                loaded = load(str(path))
            except refusal:
                loaded, outcome = None, 'refused'
            except BaseException as error:
                loaded, wrong = None, f'{type(error).__name__}: {error}'
            else:
                outcome = 'plain'
            watch.on = False
            wrong = wrong or next(iter(watch.seen), '')
            try:
                wrong = wrong or problem(loaded, exact)
            except BaseException:
                wrong = traceback.format_exc()
            if HistoryBuffer._statistics_methods != methods:
                wrong = wrong or 'the statistics of every history are changed'
                HistoryBuffer._statistics_methods.update(methods)
            if wrong:
                found['else'] += 1
                print(f'{reader}: {name}: {wrong}', file=sys.stderr)
            else:
                found[outcome] += 1
    return found


def attack_pickles(count: int | None, seed: int) -> Counter:
    """Forged pickles in a process of their own: all programs, or an even selection of so many, and as many random."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, __file__, '--child', folder, '--seed', str(seed), '--count', str(count or 0)]
        ran = subprocess.run(arguments, capture_output=True, text=True)
        print(ran.stderr[-3000:], end='', file=sys.stderr)
        if ran.returncode:
            at = Path(folder, 'at')
            print(f'ended with {ran.returncode} at {at.read_text() if at.exists() else "its start"}', file=sys.stderr)
            return Counter({'else': 1})
        return Counter(json.loads(ran.stdout.splitlines()[-1]))


def child(folder: Path, count: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rng, every = random.Random(seed), list(programs())
    chosen = every if not count or count >= len(every) else rng.sample(every, count)
    chosen += [random_program(rng) for _ in range(count or len(every))]
    chosen += forged_objects().items()
    print(json.dumps(load_pickles(folder, chosen)))


# ------------------------------------------------------------------------------------------------------------ damage


def damaged(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One random damage: cut; bits flipped; zeros, noise or a range or an end from elsewhere in its place; doubled."""
    kind, n = rng.randrange(8), len(data)
    at, length = rng.randrange(n), min(rng.choice((1, 8, 64, 512, 4096)), n)
    to = min(at + length, n)
    if kind == 0:
        return data[:at]
    if kind in (1, 2):  # half of the flips where headers are
        result = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            result[rng.randrange(n if kind == 1 else min(n, 2048))] ^= 1 << rng.randrange(8)
        return bytes(result)
    if kind == 3:
        return data[:at] + bytes(to - at) + data[to:]
    if kind == 4:
        return data[:at] + rng.randbytes(to - at) + data[to:]
    if kind == 5:
        return data[:at] + data[at:to] + data[at:]
    if kind == 6:
        source = rng.randrange(n - (to - at) + 1)
        return data[:at] + data[source : source + to - at] + data[to:]
    return data[:at] + other[at:]


def same(a, b) -> bool:
    """Whether two loaded values are equal, to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(key == 'file' or same(a[key], b[key]) for key in a)  # it is another
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, HistoryBuffer) or hasattr(a, '__dataclass_fields__'):
        return same(vars(a), vars(b))
    return a == b


def honest_files(folder: Path) -> dict[str, tuple[list[Path], Callable, type]]:
    """By kind: two honest files, their reader, and the error with which it refuses."""
    from conftest import HOSTS

    torch.manual_seed(0)
    for i in range(2):
        backbone = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=2 + i))
        save_delta(backbone, folder / f'{i}.delta.safetensors', metrics=dict(a=float(i)), config='model = 1\n' * 20)
        history = HistoryBuffer()
        for value in range(20):
            history.update(value / (i + 1))
        state = {name: tensor for name, tensor in backbone.state_dict().items() if 'stages.0' in name}
        hub = dict(log_scalars={'train/loss': history}, runtime_info={'x': np.arange(3), 'y': np.float64(i)})
        checkpoint = dict(meta=dict(iter=i, cfg='x = 1\n' * 50), state_dict=state, message_hub=hub)
        torch.save(checkpoint, folder / f'{i}.pth')
        np.savez_compressed(folder / f'{i}.npz', **{name: tensor.numpy() for name, tensor in state.items()})
        vit = MODELS.build({**HOSTS['mmpretrain-vit'], 'drop_path_rate': 0.0})
        architecture = Architecture.of(vit)
        weights = {
            part.name: torch.arange(i, part.numel, 7)
            for part in architecture.parts if part.kind == 'matrix' and part.rows is None
        }  # fmt: skip
        vectors = tuple((part.name, part.rows) for part in architecture.parts if part.kind == 'vector')
        Plan(architecture, dict(type='LoRA', rank=2), {}, vectors, weights, dict(seed=i)).save(
            folder / f'{i}.safetensors'
        )
        published = dict(
            unstructured_name_shapes={'a': (3, 4)}, unstructured_indexes=torch.arange(500), tuned_matrices=[[0, 1]],
            tuned_vectors=['a'], params=np.float64(0.4),
        )  # fmt: skip
        torch.save(published, folder / f'published{i}.pth')

    def load(path: str):
        return CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')

    def two(pattern: str) -> list[Path]:
        return [folder / pattern.format(i) for i in range(2)]

    return {
        'delta': (two('{}.delta.safetensors'), read_delta, CheckpointMismatchError),
        'plan': (two('{}.safetensors'), Plan.load, PlanError),
        'checkpoint (.pth)': (two('{}.pth'), load, CheckpointMismatchError),
        'checkpoint (.npz)': (two('{}.npz'), load, CheckpointMismatchError),
    }


def attack_by_damage(kind: str, files: list[Path], read: Callable, refusal: type, count: int, seed: int) -> Counter:
    """Read one file after so many damages, each on its own."""
    data, other = (file.read_bytes() for file in files)
    honest, rng, found = read(str(files[0])), random.Random(f'{kind} {seed}'), Counter()
    bad = files[0].with_name(f'bad{"".join(files[0].suffixes)}')
    for i in range(count):
        content = damaged(data, other, rng)
        while content == other:  # all of it in the place of all of the first
            content = damaged(data, other, rng)
        bad.write_bytes(content)
        try:
            loaded = read(str(bad))
        except refusal as error:
            outcome = 'refused' if bad.name in str(error) and '\n' not in str(error) else 'else'
            if outcome == 'else':
                print(f'not a line about the file: {error!r}', file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            outcome = 'else'
        else:
            outcome = 'equal' if same(loaded, honest) else 'else'
            if outcome == 'else':
                print(f'loaded as another: {str(loaded)[:200]}', file=sys.stderr)
        if outcome == 'else':
            print(f'{kind}: damage {i} of seed {seed}', file=sys.stderr)
        found[outcome] += 1
    return found


# ------------------------------------------------------------------------------------------------- forged deltas


def taken_apart(data: bytes) -> tuple[dict, dict, bytes]:
    """A delta's safetensors header, its fields, and its values."""
    length = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    fields = {name: json.loads(text) for name, text in header['__metadata__'].items() if name not in ENVELOPE}
    return header, fields, data[8 + length :]


ENVELOPE = ('format', 'mona_mm_version', 'digest', 'tensors')


def forged(header: dict, said: dict, body: bytes, **texts) -> bytes:
    """A delta of these parts with a right digest; ``texts`` are entries of the metadata as they are."""
    envelope = {name: header['__metadata__'][name] for name in ENVELOPE}
    fields = {name: json.dumps(value) for name, value in said.items()}
    metadata = {**fields, **envelope, 'digest': '0' * 64, **texts}
    raw = json.dumps({**header, '__metadata__': metadata}).encode()
    whole = struct.pack('<Q', len(raw)) + raw + body
    return whole.replace(b'0' * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


def forged_deltas(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Deltas with a right digest that no training wrote; each must be refused when it is read."""
    header, said, body = taken_apart(data)
    entries = {name: entry for name, entry in header.items() if name != '__metadata__'}
    first = min(entries, key=lambda name: entries[name]['data_offsets'])
    last = max(entries, key=lambda name: entries[name]['data_offsets'])
    where = header[first]
    size, start = entries[last]['data_offsets'][1], entries[last]['data_offsets'][0]
    without = {name: entry for name, entry in header.items() if name != last}

    def says(**changes) -> bytes:
        return forged(header, {**said, **changes}, body)

    yield 'a bomb of spaces', forged(header, said, body, metrics='{"a": "' + ' ' * 2**26 + '"}')
    yield 'a bomb of lists', forged(header, said, body, metrics='[' + '[],' * 2**22 + '[]]')
    yield 'two mebibytes', says(config='x' * 2**21)
    yield 'nested lists', forged(header, said, body, metrics='[' * 10**5 + ']' * 10**5)
    yield 'nested options', says(metrics={'a': json.loads('[' * 60 + ']' * 60)})
    yield 'a key twice', forged(header, said, body, metrics='{"a": 1, "a": 2}')
    yield 'no object', forged(header, said, body, metrics='[]')
    yield 'no JSON', forged(header, said, body, metrics='{')
    yield 'no text', forged(header, said, body, metrics=3)
    yield 'a long header of safetensors', forged(header, said, body, x='x' * 2**21)
    for announced in ('{}', '3', '[]', '{"count": 1}', '', '{"count": 1, "digest": "0"}'):
        yield f'announced {announced}', forged(header, said, body, tensors=announced)
    many = {f'{i}': dict(dtype='F32', shape=[0], data_offsets=[size, size]) for i in range(2**15)}
    yield 'many tensors', forged({**header, **many}, said, body)
    yield (
        'a tensor more',
        forged({**header, 'evil': dict(dtype='U8', shape=[8], data_offsets=[size, size + 8])}, said, body + bytes(8)),
    )
    yield (
        'an empty tensor more',
        forged({**header, 'evil': dict(dtype='F32', shape=[0], data_offsets=[size, size])}, said, body),
    )
    yield 'another type', forged({**header, first: dict(where, dtype='I32')}, said, body)
    yield 'no such type', forged({**header, first: dict(where, dtype='X9')}, said, body)
    yield 'a type that is no text', forged({**header, first: dict(where, dtype=3)}, said, body)
    for shape in ([-1], [2**63], [10**30], ['3'], 3, None, [1.5], [where['shape'][0], 2**32]):
        yield f'shape {shape}', forged({**header, first: dict(where, shape=shape)}, said, body)
    for offsets in ([0, 2**62], [-1, size], [size, 0], [0], None, ['0', '1'], [8, size], [0, size - 4]):
        yield f'offsets {offsets}', forged({**header, first: dict(where, data_offsets=offsets)}, said, body)
    for name in ('', 'evil', '\ud800', 'x' * 2**16):
        yield f'the name {name[:9]!r}', forged({**without, name: header[last]}, said, body)
    yield 'no name', forged({**without, '': header[last]}, said, body)
    for value in (3, None, [], {}):
        yield f'{value} for a tensor', forged({**header, last: value}, said, body)
    yield 'a tensor less', forged(without, said, body[:start])
    yield 'a tensor of which nobody says what it is', forged(without, said, body)
    for key in ('shared', 'copies'):
        for value in (3, None, ['x'], {'a': 'b'}):
            yield f'{key} with {value!r}', says(**{key: {'x': value}})
    yield 'a tensor that is shared and stored', says(shared={first: last})
    yield 'shared with nothing', says(shared={'x': 'y'})
    yield 'parts that are not there', says(parts=['method', 'neck'])
    yield 'parts that are numbers', says(parts=[1])
    yield 'no parts', says(parts=[])
    yield 'parameters without end', says(progress=dict(param_groups=[dict(params=10**12, lr=1.0)]))
    yield 'groups without end', says(progress=dict(param_groups=[dict(params=2**20, lr=1.0)] * 100))
    yield 'negative parameters', says(progress=dict(param_groups=[dict(params=-1)]))
    yield 'groups that are numbers', says(progress=dict(param_groups=[1]))
    for value in (-1, 10**30, 'x', None, 1.5, [], True):
        yield f'an iteration {value!r}', says(progress=dict(iter=value))
    yield 'a number of 4,400 digits', forged(header, said, body, metrics='{"x":' + '9' * 4400 + '}')
    for key, value in (('methods', []), ('methods', {'': 3}),
                       ('methods', {'': dict(type=None, options=3, trainable=[])}),
                       ('methods', {'': dict(type=[], options={}, trainable=[])}), ('base', {}), ('base', None),
                       ('methods', {'': dict(type=None, options={}, trainable=[3])}), ('versions', {'a': 3}),
                       ('backbone', None), ('half', 'no'), ('base_file', 3), ('config', {}), ('dataset_meta', []),
                       ('dataset_meta', dict(classes=3)), ('more', 1)):  # fmt: skip
        yield f'{key}={value}', says(**{key: value})
    kind = dict(F32='<f', F16='<e', F64='<d')[where['dtype']]
    for value in (float('nan'), float('inf'), -float('inf')):
        packed = struct.pack(kind, value)
        yield f'the value {value}', forged(header, said, packed + body[len(packed) :])


def attack_by_forged_deltas(file: Path) -> Counter:
    """Read every forged delta: refused in one line, within two seconds and a hundred mebibytes."""
    import tracemalloc

    data, found, bad = file.read_bytes(), Counter(), file.with_name('forged.delta.safetensors')
    header, said, body = taken_apart(data)
    bad.write_bytes(forged(header, said, body))
    assert same(read_delta(bad), read_delta(file)), 'so built, an honest one is read'
    for name, content in forged_deltas(data):
        bad.write_bytes(content)
        start, outcome = time.process_time(), 'else'
        try:
            read_delta(bad)
        except CheckpointMismatchError as error:
            is_clear = bad.name in str(error) and '\n' not in str(error) and len(str(error)) < 1000
            outcome = 'refused' if is_clear else 'else'
        except BaseException:
            traceback.print_exc()
        seconds = time.process_time() - start
        tracemalloc.start()  # once more, for it takes time itself
        with suppress(CheckpointMismatchError):
            read_delta(bad)
        peak = tracemalloc.get_traced_memory()[1] - len(content)
        tracemalloc.stop()
        if outcome == 'else' or seconds > 2 or peak > 100 * 2**20:
            outcome = 'else'
            print(f'delta with {name}: {seconds:.1f} s, {peak / 2**20:.0f} MiB', file=sys.stderr)
        found[outcome] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--count', type=int, default=0, help='damages of each kind, and random pickles (default: 2000)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', help='kinds to attack (default: all)')
    parser.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    if args.child:
        child(args.child, args.count, args.seed)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        files = honest_files(Path(folder))
        for kind, (pair, read, refusal) in files.items():
            results[kind, 'damaged'] = lambda a=(kind, pair, read, refusal): attack_by_damage(
                *a, args.count or 2000, args.seed
            )
        results['delta', 'forged'] = lambda: attack_by_forged_deltas(files['delta'][0][0])
        results['pickle', 'forged'] = lambda: attack_pickles(args.count, args.seed)
        wrong = 0
        print(f'{"":30}{"tried":>8}{"refused":>9}{"equal":>8}{"plain":>8}{"else":>6}')
        for (kind, how), attack in results.items():
            if args.only and kind.partition(' ')[0] not in args.only:
                continue
            start, found = time.perf_counter(), attack()
            columns = (sum(found.values()), *(found[each] for each in ('refused', 'equal', 'plain', 'else')))
            print(f'{kind + ", " + how:30}{columns[0]:8,}{columns[1]:9,}{columns[2]:8,}{columns[3]:8,}{columns[4]:6,}'
                  f'   {time.perf_counter() - start:.0f} s', flush=True)  # fmt: skip
            wrong += found['else']
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
