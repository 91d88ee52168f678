"""Faster forms of what the hosts compute, equal to it within rounding."""

from torch import nn

from mona_mm.fast import attention, ffn


def make_fast(module: nn.Module) -> bool:
    """Put the fast form in front of the class of a module, in place, if there is one for that class."""
    return attention.make_fast(module) or ffn.make_fast(module)
