"""Let weights-only loading read what mmengine itself puts into a checkpoint, and let no file forge an object with it.

Each mmengine checkpoint holds its log history: :class:`HistoryBuffer`, numpy arrays and numpy scalars. To allow numpy's
own classes would be dangerous: a pickle sets the inside of a ``numpy.dtype`` and of an array as it likes, so it can
make an array of Python objects over bytes of its choice, or take the memory away from under a tensor that shares it.
So the names in a file stand for the classes and functions below, which accept plain numbers and nothing else.
"""

import math
import pickle
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FunctionType
from typing import Any, NoReturn

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_NUMBERS = frozenset(('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8', 'c8', 'c16'))
_MOST_AXES = 32  # of an array, in numpy 1
_BYTE = (b'b', 'b')  # the type of every array before it is filled
_STATISTICS = ('min', 'max', 'current', 'mean')


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f'The file asks for {what}, which is not allowed.')


def _are(values: Any, *types: type) -> bool:
    """Whether this is a tuple of values of exactly these types."""
    return type(values) is tuple and tuple(map(type, values)) == types


class _DType:
    """Stands for ``numpy.dtype``: the type of plain numbers, without fields, shape, objects or metadata. It is pickled
    as numpy's own."""

    __slots__ = ('_kind', '_order')
    __hash__ = None

    def __new__(cls, *args) -> '_DType':
        # numpy writes dtype('f8', False, True); older versions write the truth values as 0 and 1.
        if not args or type(args[0]) is not str or args[0] not in _NUMBERS or len(args) > 3 or any(args[1:2]):
            _refuse('an array or a scalar that is not of plain numbers')
        self = super().__new__(cls)
        self._kind, self._order = args[0], '='
        return self

    def __setstate__(self, state: Any) -> None:
        none = type(None)
        if not _are(state, int, str, none, none, none, int, int, int) or state[1] not in ('<', '>', '=', '|'):
            _refuse('a numpy type with fields, a shape or metadata')
        if (state[0], *state[5:]) != (3, -1, -1, 0):
            _refuse('a numpy type of another size, alignment or kind than it says')
        self._order = state[1].replace('|', '=')  # which says of one byte that it has none

    def plain(self) -> np.dtype:
        """numpy's own."""
        return np.dtype(self._order + self._kind)

    def __reduce__(self) -> Any:
        return np.dtype, (self._order + self._kind,)


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``: made by ``_reconstruct``, then filled once. It is pickled as numpy's own."""

    _plain: np.ndarray | None = None

    def __new__(cls, *args) -> NoReturn:
        _refuse('an array that is made in another way than numpy writes it')

    def __setstate__(self, state: Any) -> None:
        if self.is_filled:  # a tensor may share its memory
            _refuse('an array to be filled twice')
        if type(state) is tuple and len(state) == 5 and type(state[3]) is int:
            state = (*state[:3], bool(state[3]), state[4])
        if not _are(state, int, tuple, _DType, bool, bytes) or state[0] != 1:
            _refuse('an array that does not hold plain numbers')
        _, shape, dtype, is_fortran, data = state
        dtype = dtype.plain()
        if len(shape) > _MOST_AXES or any(type(length) is not int or length < 0 for length in shape):
            _refuse('an array of an impossible shape')
        if math.prod(shape) * dtype.itemsize != len(data):
            _refuse(f'an array of shape {shape} and gives {len(data)} bytes')
        _check_truth_values(dtype, data)
        try:
            super().__setstate__((1, shape, dtype, is_fortran, data))
        except (ValueError, OverflowError, MemoryError) as error:
            raise pickle.UnpicklingError(f'The file asks for an array that numpy cannot make: {error}.') from None

    @property
    def is_filled(self) -> bool:
        """Whether the values are there. Until then it is of bytes, of which torch makes no tensor."""
        return self.dtype.kind != 'S'

    def plain(self) -> np.ndarray:
        """numpy's own."""
        if not self.is_filled:
            _refuse('an array without values')
        if self._plain is None:  # once: a file may name one array many times
            self._plain = np.array(self.view(np.ndarray), order='K')
        return self._plain

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct(*args) -> _Array:
    # As numpy writes it, whatever the array: the shape and the type here are those of an empty one.
    if len(args) != 3 or args[0] is not _Array or not _are(args[1], int) or args[1] != (0,) or args[2] not in _BYTE:
        _refuse('an array that is made in another way than numpy writes it')
    return np.ndarray.__new__(_Array, (0,), 'S1')


def _scalar(*args) -> np.generic:
    if not _are(args, _DType, bytes) or len(args[1]) != args[0].plain().itemsize:
        _refuse('a scalar that is not a plain number')
    dtype = args[0].plain()
    _check_truth_values(dtype, args[1])
    return np.frombuffer(args[1], dtype)[0]


def _check_truth_values(dtype: np.dtype, data: bytes) -> None:
    if dtype.kind == 'b' and data.translate(None, b'\x00\x01'):
        _refuse('truth values that are neither true nor false')


def _no_bytes(*args) -> bytes:
    """Stands for ``bytes``, by which a pickle means no bytes; a number would make so many."""
    if args:
        _refuse('bytes that are made in another way than pickle writes them')
    return b''


class _Method:
    """Stands for a method of :class:`HistoryBuffer`, which names its own methods by way of ``getattr``."""

    __slots__ = ('name',)
    __hash__ = None

    def __init__(self, name: str) -> None:
        self.name = name


def _history_method(*args) -> _Method:
    if len(args) == 2 and args[0] is _Buffer and type(args[1]) is str and args[1] in _STATISTICS:
        return _Method(args[1])
    _refuse(f'the attribute {args[1] if len(args) == 2 else ""!r} of {args[0] if args else ""!r}')


class _Buffer(HistoryBuffer):
    """Stands for :class:`HistoryBuffer`, and becomes one once it has its two arrays of numbers."""

    def __new__(cls, *args) -> '_Buffer':
        if args:
            _refuse('a log history that is made in another way than mmengine writes it')
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        names = {'max_length', '_log_history', '_count_history'}
        if type(state) is not dict or state.keys() - {'statistics_methods'} != names:
            _refuse('a log history with other attributes than mmengine writes')
        # Its methods are mmengine's own; what a file says of them is only checked, for it would hold in the process.
        methods = state.get('statistics_methods', {})
        if type(methods) is not dict or any(
            type(method) is not _Method or method.name != name for name, method in methods.items()
        ):
            _refuse("other statistics of a log history than mmengine's own")
        arrays = [state[name] for name in ('_log_history', '_count_history')]
        if type(state['max_length']) is not int or not all(
            type(array) is _Array and array.is_filled and array.ndim == 1 and array.dtype.kind in 'biuf'
            for array in arrays
        ):
            _refuse('a log history that does not hold numbers')
        if len(arrays[0]) != len(arrays[1]):
            _refuse('a log history whose values are not as many as their counts')
        log, count = (array.plain() for array in arrays)
        vars(self).clear()
        vars(self).update(max_length=state['max_length'], _log_history=log, _count_history=count)
        self.__class__ = HistoryBuffer
        self._set_default_statistics()


# Both spellings of what numpy 2 has renamed, whichever is here: a file says it as the numpy that wrote it.
_SAFE = [
    (_Buffer, f'{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}'),
    (_history_method, 'builtins.getattr'),
    (_no_bytes, 'builtins.bytes'),
    (_DType, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    *((_reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]
_STAND_INS = [each for each, _ in _SAFE]


def register_safe_globals() -> None:
    """Allow what mmengine puts into its checkpoints whenever ``torch.load`` loads weights only.

    ``torch.load`` by itself then gives arrays of a subclass of ``numpy.ndarray``; what loads through mmengine or this
    package gives numpy's own, see :func:`finished`.
    """
    torch.serialization.add_safe_globals(_SAFE)


def finished(loaded: Any) -> Any:
    """What weights-only loading made of a file, with numpy's own arrays and types in the place of the stand-ins.

    Dicts and lists are changed in place, and what the file holds twice stays one object.

    Raises:
        UnpicklingError: if anything in it is a stand-in that is no value, or was left without one.
    """
    done: dict[int, tuple[Any, Any]] = {}  # by id; with the old value, so that no other gets its id

    def finish(value: Any) -> Any:
        of = type(value)
        if of in (_Array, _DType):
            return value.plain()
        if of in (_Buffer, _Method) or (of in (type, FunctionType) and value in _STAND_INS):
            _refuse('a part of an array or of a log history alone')
        if of not in (dict, OrderedDict, Counter, list, tuple, set):
            return value
        if id(value) in done:
            return done[id(value)][1]
        done[id(value)] = value, value
        if of is tuple:
            new = tuple(finish(each) for each in value)
            if any(a is not b for a, b in zip(new, value, strict=True)):
                done[id(value)] = value, new
        elif of is set:
            for each in value:
                finish(each)
        else:
            for key, each in list(enumerate(value) if of is list else value.items()):
                finish(key)
                new = finish(each)
                if new is not each:
                    value[key] = new
            if of is OrderedDict:
                finish(vars(value))  # the _metadata of a state dict
        return done[id(value)][1]

    return finish(loaded)


class _Loading:
    """How many are loading weights only now, in all threads, and what was registered before the first one."""

    lock = threading.Lock()
    count = 0
    registered: list
    ours: list


# Between mona_mm, which calls a reader of mmengine (or one that somebody has registered with it), and torch.load, which
# that reader calls as it likes, there is no argument and no object that could be handed on.
_WEIGHTS_ONLY: ContextVar[bool] = ContextVar('weights_only', default=False)


def guard_torch_load() -> None:
    """Let ``torch.load`` load weights only where its caller's caller is within :func:`weights_only`.

    An explicit ``weights_only=True`` is also what no environment variable overrides.
    """
    load = torch.load
    if hasattr(load, 'is_guarded_by_mona_mm'):
        return

    @wraps(load)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _WEIGHTS_ONLY.get():
            kwargs.update(weights_only=True)
        return load(*args, **kwargs)

    guarded.is_guarded_by_mona_mm = True
    torch.load = torch.serialization.load = guarded


@contextmanager
def weights_only() -> Iterator[None]:
    """In this context ``torch.load`` loads weights only, whatever its caller asks for.

    ``torch.hub``, through which mmengine downloads, and mmengine itself from 0.11 on would otherwise execute a pickle.
    It holds for what this thread calls. What others have registered with torch stays allowed, but not under the names
    that stand for something else here; of that there is one list a process, which the first thread in this context
    changes and the last one restores.
    """
    with _Loading.lock:
        if not _Loading.count:
            _Loading.registered = torch.serialization.get_safe_globals()
            names = {name for _, name in _SAFE}
            _Loading.ours = [*(each for each in _Loading.registered if _name(each) not in names), *_SAFE]
            _set_safe_globals(_Loading.ours)
        _Loading.count += 1
    token = _WEIGHTS_ONLY.set(True)
    try:
        yield
    finally:
        _WEIGHTS_ONLY.reset(token)
        with _Loading.lock:
            _Loading.count -= 1
            if not _Loading.count:
                since = [each for each in torch.serialization.get_safe_globals() if each not in _Loading.ours]
                _set_safe_globals([*_Loading.registered, *since])


def _name(registered: Any) -> str:
    """The name in a file by which torch allows something that was registered with it."""
    return registered[1] if isinstance(registered, tuple) else f'{registered.__module__}.{registered.__qualname__}'


def _set_safe_globals(allowed: list) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@contextmanager
def portable_names() -> Iterator[None]:
    """In this context numpy's arrays and scalars are pickled under the names of numpy 1, which numpy 2 knows as well.

    What numpy 2 writes by itself is not readable with numpy before 1.26, not even by ``pickle``.
    """
    try:
        from numpy.core.multiarray import _reconstruct, scalar
    except ImportError:  # a numpy that has forgotten these names: it cannot pickle by them
        yield
        return
    before = [(each, each.__module__) for each in (_reconstruct, scalar)]
    for each, _ in before:
        each.__module__ = 'numpy.core.multiarray'
    try:
        yield
    finally:
        for each, module in before:
            each.__module__ = module
