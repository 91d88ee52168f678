"""Let weights-only loading read what mmengine itself puts into a checkpoint."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

FORCE_WEIGHTS_ONLY = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'


@contextmanager
def weights_only(only: bool = True) -> Iterator[None]:
    """In this context ``torch.load`` loads weights only, whatever its caller asks for; or what its caller asks for.

    ``torch.hub``, through which mmengine downloads, and the fork's loader, when it meets something unknown, would
    otherwise execute a pickle.
    """
    before = os.environ.pop(FORCE_WEIGHTS_ONLY, None)
    if only:
        os.environ[FORCE_WEIGHTS_ONLY] = '1'
    try:
        yield
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY, None)
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before


@contextmanager
def only_safe(allowed: list[Callable | tuple[Callable, str]]) -> Iterator[None]:
    """In this context weights-only loading allows these, beside torch's own, and nothing that is registered.

    ``torch.serialization.safe_globals`` would leave what is registered allowed, and take away what both name on exit.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def register_safe_globals() -> None:
    """Allow the classes in mmengine's ``message_hub`` when ``torch.load`` loads weights only.

    mmengine 0.10.7 writes its log history (:class:`HistoryBuffer`, numpy arrays and scalars) into every checkpoint,
    and torch >= 2.6 refuses those on resuming. None of them runs code of the file's choosing when it is unpickled.
    A :class:`HistoryBuffer` also names its own methods by way of ``getattr``, which, allowed as it is, would hand a
    malicious file far more; in its place stands a function that gives those methods only.
    """
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            multiarray._reconstruct,
            multiarray.scalar,
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in 'bhilqBHILQefd?'),
            (_history_method, 'builtins.getattr'),
        ]
    )


def _history_method(cls: type, name: str) -> Callable:
    if cls is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(cls, name)
    raise pickle.UnpicklingError(f'The file asks for the attribute {name!r} of {cls!r}, which is not allowed.')
