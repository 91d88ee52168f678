"""The memory that tensors hold at once, followed operator by operator."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # a private name, without which nothing is followed
    TorchDispatchMode = None


class LiveMemory:
    """The bytes that tensors made since the beginning hold, now and at most.

    What an operator needs within itself, and what the allocator rounds up or keeps, is not seen.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def add(self, storage: UntypedStorage) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storage(leaf: Any) -> UntypedStorage | None:
    """The storage of a tensor; None for what is no tensor, or has none of its own (a sparse one)."""
    try:
        return leaf.untyped_storage() if isinstance(leaf, Tensor) else None
    except NotImplementedError:
        return None


@contextmanager
def live_memory() -> Iterator[LiveMemory | None]:
    """Follow the memory of what is computed within, in the forward and in the backward pass; None where torch has not
    what that needs."""
    if TorchDispatchMode is None:
        yield None
        return
    memory = LiveMemory()

    class _Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {storage._cdata for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
            for leaf in tree_leaves(result):
                storage = _storage(leaf)
                if storage is not None and storage._cdata not in given:  # no view of an input
                    memory.add(storage)
            return result

    with _Mode():
        yield memory
