"""The named places in a block at which a method may attach, and the modules that are attached there."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

STREAM_SITES = ('post_attn', 'post_ffn', 'attn_branch', 'ffn_branch', 'attn_out', 'ffn_out', 'parallel_ffn')
"""The sites where a method maps the tokens ``(B, N, C)`` of a block; see :mod:`mona_mm.hosts`."""

LINEAR_SITES = ('q', 'k', 'v', 'proj', 'fc1', 'fc2')
"""The sites where a method adds to the output of a linear layer; see :mod:`mona_mm.hosts`."""


class PeftModules(nn.ModuleDict):
    """The modules that a method added: to one block, by site, or to one module, by parameter."""

    taken: Mapping[str, nn.Module] | None = None
    """What it holds but for the context :func:`taken_out` that it is in."""


def method_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that a method added to ``model``."""
    return [child for m in model.modules() if isinstance(m, PeftModules) for child in m.values()]


@contextlib.contextmanager
def taken_out(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which those of ``modules`` that hold what a method added are empty.

    A stock model is initialised within it: some initialise every linear layer that they find, expect it to have a bias,
    and would draw more random numbers with a method than without.
    """
    held = [holder for holder in modules if isinstance(holder, PeftModules) and holder.taken is None]
    for holder in held:
        holder.taken = dict(holder._modules)
        holder._modules.clear()
    try:
        yield
    finally:
        for holder in held:
            holder._modules.update(holder.taken)
            del holder.taken


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """A context within :func:`taken_out` in which a model holds what a method added, so that a file is loaded into all
    of it."""
    emptied = [m for m in model.modules() if isinstance(m, PeftModules) and m.taken is not None]
    for holder in emptied:
        holder._modules.update(holder.taken)
    try:
        yield
    finally:
        for holder in emptied:
            holder._modules.clear()


def method_paths(model: nn.Module) -> list[str]:
    """The paths of the modules that a method added to ``model``."""
    return [f'{path}.{name}' for path, m in model.named_modules() if isinstance(m, PeftModules) for name in m._modules]


def method_names(model: nn.Module) -> set[str]:
    """The state-dict names of everything that a method added to ``model``."""
    return {
        f'{path}.{name}'
        for path, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, PeftModules)
        for name in m.state_dict()
    }
