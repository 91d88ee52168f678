"""A lock for threads that predict with a model while others load deltas into it.

Many threads may read the weights at once, and one may change them. :func:`~mona_mm.load_delta` and
:func:`~mona_mm.merge` wait until no thread is within :func:`reading` of the same model, and let none enter until they
are done. A forward pass takes no lock by itself, since only the caller knows which passes belong to one answer.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from mona_mm.errors import UserError
from mona_mm.nn.wrappers import innermost


class _Lock:
    """A lock that any number of reading threads may hold, or one writing thread. Both may enter it again.

    A waiting writer goes before readers that come later, so that a busy server cannot keep it waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}  # how many times each thread has entered
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if me not in self._readers and self._writer != me:
                self._changed.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers:
                    raise UserError(
                        'The weights of this model cannot be changed within mona_mm.reading(model) of the same thread. '
                        'Load or merge before it, or after it.'
                    )
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and not self._readers)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()


# Kept beside the models, so that no copy, pickle or state dict contains a lock.
_LOCKS: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def _lock_of(model: nn.Module) -> _Lock:
    with _GUARD:
        return _LOCKS.setdefault(innermost(model), _Lock())


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """A context in which the weights of ``model`` stay the same: no thread loads a delta into it or merges it.

    ::

        with mona_mm.reading(model):
            result = inference_detector(model, image)  # computed with one delta throughout

    Any number of threads may be in it at once, and a thread may enter it again. Put it around everything that belongs
    to one answer, with the model that is given to :func:`~mona_mm.load_delta` (a wrapper counts as its model, a part
    of the model does not).

    Raises:
        UserError: if the same thread calls ``load_delta`` or ``merge`` within it.
    """
    with _lock_of(model).reading():
        yield


@contextmanager
def writing(model: nn.Module) -> Iterator[None]:
    """A context in which no thread reads the weights of ``model``, and no other thread changes them."""
    with _lock_of(model).writing():
        yield
