"""What the hosts compute in less time or memory: faster forms, frozen weights in half precision, kept features."""

from torch import nn

from mona_mm.fast import attention, ffn


def make_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of a module, in place, if there is one for that class."""
    return attention.make_fast(module) or ffn.make_fast(module)
