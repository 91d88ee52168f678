"""Let weights-only loading read the objects that mmengine writes to a checkpoint, without allowing forged ones.

Each mmengine checkpoint holds its log history: :class:`HistoryBuffer`, numpy arrays and numpy scalars. Allowing numpy's
own classes would be dangerous: a pickle can set the inner state of a ``numpy.dtype`` and of an array, so it can make an
array of Python objects over bytes of its choice, or free the memory of a tensor that shares it. So the names in a file
stand for the classes and functions below, which accept only plain numbers.
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
    """Stands for ``numpy.dtype``: a dtype of plain numbers, without fields, shape, objects or metadata. It is pickled
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
        self._order = state[1].replace('|', '=')  # '|' means that the order does not apply, for one byte

    def plain(self) -> np.dtype:
        """Convert it to numpy's own dtype."""
        return np.dtype(self._order + self._kind)

    def __reduce__(self) -> Any:
        return np.dtype, (self._order + self._kind,)


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``: made by ``_reconstruct``, then filled once. It is pickled as numpy's own."""

    _plain: np.ndarray | None = None

    def __new__(cls, *args) -> NoReturn:
        _refuse('an array that is made in another way than numpy writes it')

    def __setstate__(self, state: Any) -> None:
        if self.is_filled:  # otherwise the memory of a tensor that shares it would be freed
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
        """Whether the array has its values. Before that its dtype is bytes, which torch refuses for a tensor."""
        return self.dtype.kind != 'S'

    def plain(self) -> np.ndarray:
        """Convert it to numpy's own array."""
        if not self.is_filled:
            _refuse('an array without values')
        if self._plain is None:  # once: a file may name one array many times
            self._plain = np.array(self.view(np.ndarray), order='K')
        return self._plain

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct(*args) -> _Array:
    # numpy writes the shape and dtype of an empty array here, whatever the array.
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
    """Stands for ``bytes``, which a pickle calls without arguments for empty bytes; a number would allocate memory."""
    if args:
        _refuse('bytes that are made in another way than pickle writes them')
    return b''


class _Method:
    """Stands for a method of :class:`HistoryBuffer`, which pickles its own methods as calls of ``getattr``."""

    __slots__ = ('name',)
    __hash__ = None

    def __init__(self, name: str) -> None:
        self.name = name


def _history_method(*args) -> _Method:
    if len(args) == 2 and args[0] is _Buffer and type(args[1]) is str and args[1] in _STATISTICS:
        return _Method(args[1])
    _refuse(f'the attribute {args[1] if len(args) == 2 else ""!r} of {args[0] if args else ""!r}')


class _Buffer(HistoryBuffer):
    """Stands for :class:`HistoryBuffer`, and becomes one when it gets its two arrays of numbers."""

    def __new__(cls, *args) -> '_Buffer':
        if args:
            _refuse('a log history that is made in another way than mmengine writes it')
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        names = {'max_length', '_log_history', '_count_history'}
        if type(state) is not dict or state.keys() - {'statistics_methods'} != names:
            _refuse('a log history with other attributes than mmengine writes')
        # Its methods are mmengine's own. Those in a file are only checked, since they would apply to the whole process.
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


# Both spellings of the names that numpy 2 has changed, since a file has those of the numpy that wrote it.
_SAFE = [
    (_Buffer, f'{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}'),
    (_history_method, 'builtins.getattr'),
    (_no_bytes, 'builtins.bytes'),
    (_DType, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    *((_reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]
_STAND_INS = [stand_in for stand_in, _ in _SAFE]


def register_safe_globals() -> None:
    """Allow the objects that mmengine writes to its checkpoints whenever ``torch.load`` loads weights only.

    ``torch.load`` itself then returns arrays of a subclass of ``numpy.ndarray``; loading through mmengine or this
    package returns numpy's own, see :func:`finished`.
    """
    torch.serialization.add_safe_globals(_SAFE)


def finished(loaded: Any) -> Any:
    """Replace the stand-ins in the result of weights-only loading by numpy's own arrays and dtypes.

    Dicts and lists are changed in place. An object that the file holds several times stays one object.

    Raises:
        UnpicklingError: if it contains a stand-in that is not a value, or that has got none.
    """
    done: dict[int, tuple[Any, Any]] = {}  # by id, with the old value, so that no other object can get its id

    def finish(value: Any) -> Any:
        cls = type(value)
        if cls in (_Array, _DType):
            return value.plain()
        if cls in (_Buffer, _Method) or (cls in (type, FunctionType) and value in _STAND_INS):
            _refuse('a part of an array or of a log history alone')
        if cls not in (dict, OrderedDict, Counter, list, tuple, set):
            return value
        if id(value) in done:
            return done[id(value)][1]
        done[id(value)] = value, value
        if cls is tuple:
            new = tuple(finish(item) for item in value)
            if any(a is not b for a, b in zip(new, value, strict=True)):
                done[id(value)] = value, new
        elif cls is set:
            for item in value:
                finish(item)
        else:
            for key, item in list(enumerate(value) if cls is list else value.items()):
                finish(key)
                new = finish(item)
                if new is not item:
                    value[key] = new
            if cls is OrderedDict:
                finish(vars(value))  # the _metadata of a state dict
        return done[id(value)][1]

    return finish(loaded)


class _Loading:
    """The state of weights-only loading in all threads.

    Attributes:
        lock: protects the other attributes and torch's list of allowed objects.
        count: the number of contexts of :func:`weights_only` that are active.
        registered: the objects that torch allowed before the first of them.
        allowed: the objects that torch allows during them.
    """

    lock = threading.Lock()
    count = 0
    registered: list
    allowed: list


# mona_mm calls a reader of mmengine (or one that other code has registered), which calls torch.load with arguments of
# its own, so no argument can be passed through.
_WEIGHTS_ONLY: ContextVar[bool] = ContextVar('weights_only', default=False)


def guard_torch_load() -> None:
    """Let ``torch.load`` load weights only in the context of :func:`weights_only`.

    It gets an explicit ``weights_only=True``, which no environment variable overrides.
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
    """A context in which ``torch.load`` loads weights only, whatever its arguments, in this thread.

    ``torch.hub``, through which mmengine downloads, and mmengine itself since 0.11 would otherwise execute pickles.
    Objects that other code has registered with torch stay allowed, except under the names that have stand-ins here.
    torch has one list of allowed objects for the process, which the first thread in this context changes and the last
    one restores.
    """
    with _Loading.lock:
        if not _Loading.count:
            _Loading.registered = torch.serialization.get_safe_globals()
            names = {name for _, name in _SAFE}
            others = [registered for registered in _Loading.registered if _registered_name(registered) not in names]
            _Loading.allowed = [*others, *_SAFE]
            _set_safe_globals(_Loading.allowed)
        _Loading.count += 1
    token = _WEIGHTS_ONLY.set(True)
    try:
        yield
    finally:
        _WEIGHTS_ONLY.reset(token)
        with _Loading.lock:
            _Loading.count -= 1
            if not _Loading.count:
                current = torch.serialization.get_safe_globals()
                new = [registered for registered in current if registered not in _Loading.allowed]
                _set_safe_globals([*_Loading.registered, *new])


def _registered_name(registered: Any) -> str:
    """The name in a file under which torch allows a registered object."""
    return registered[1] if isinstance(registered, tuple) else f'{registered.__module__}.{registered.__qualname__}'


def _set_safe_globals(allowed: list) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@contextmanager
def portable_names() -> Iterator[None]:
    """A context in which numpy's arrays and scalars are pickled under the names of numpy 1, which numpy 2 has as well.

    The names that numpy 2 writes otherwise cannot be read with numpy before 1.26, not even by ``pickle``.
    """
    try:
        from numpy.core.multiarray import _reconstruct, scalar
    except ImportError:  # a later numpy may no longer have these names
        yield
        return
    modules = [(function, function.__module__) for function in (_reconstruct, scalar)]
    for function, _ in modules:
        function.__module__ = 'numpy.core.multiarray'
    try:
        yield
    finally:
        for function, module in modules:
            function.__module__ = module
