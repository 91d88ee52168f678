"""Let weights-only loading read what mmengine itself puts into a checkpoint."""

import pickle
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


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
