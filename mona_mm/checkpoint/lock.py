"""Who predicts with a model while others put deltas into it: many may read its weights at once, one may change them.

:func:`~mona_mm.load_delta` and :func:`~mona_mm.merge` wait until nobody is within :func:`reading` of the same model,
and let nobody in until they are done. A forward pass takes no lock by itself: what an answer is made of, from the first
image to the last, only the caller knows.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from mona_mm.errors import UserError
from mona_mm.nn.wrappers import innermost


class _Lock:
    """Held by any number of threads that read, or by one that writes; both as often as they like.

    Who waits to write goes before who comes to read later, so that a busy server cannot keep it waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}  # how often, by thread
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
                        'The weights of this model cannot be changed within mona_mm.reading(model) of the same thread, '
                        'which asks that they stay. Load the delta before it, or after it.'
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


# Beside the models and not on them: no copy, pickle or state dict has a lock.
_LOCKS: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def _lock_of(model: nn.Module) -> _Lock:
    with _GUARD:
        return _LOCKS.setdefault(innermost(model), _Lock())


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """In this context the weights of ``model`` stay what they are: nobody loads a delta into it or merges it.

    ::

        with mona_mm.reading(model):
            result = inference_detector(model, image)  # wholly of one delta

    Any number of threads may be in it at once, and one may enter it again. Take it around the whole answer, of the same
    model that is given to :func:`~mona_mm.load_delta` (a wrapper of it counts as the model, a part of it does not).

    Raises:
        UserError: by ``load_delta`` or ``merge``, called within it by the same thread.
    """
    with _lock_of(model).reading():
        yield


@contextmanager
def writing(model: nn.Module) -> Iterator[None]:
    """In this context nobody reads the weights of ``model``, and no other thread changes them."""
    with _lock_of(model).writing():
        yield
