"""Tensors that several modules of a model share, and so have several names."""

from collections.abc import Mapping

from torch import Tensor


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the first name of every tensor that modules share, by each of its other names.

    Two names are of one tensor if memory, dtype, shape and strides are equal. Tensors without memory count
    as different.
    """
    first: dict[tuple, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.data_ptr() and first.setdefault(memory, name) != name:
            shared[name] = first[memory]
    return shared
