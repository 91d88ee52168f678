"""The checkpoint formats of other code: how they are recognised by their names and converted for a host."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mona_mm.errors import CheckpointMismatchError

END = r'(weight|bias)'
"""A regular expression for the last part of most names."""


@dataclass(frozen=True)
class OwnNames:
    """The names of a host's tensors, as regular expressions that match a whole name.

    Args:
        in_blocks: the names of the tensors in and between its blocks, which tell its checkpoints from others.
        outside: the names of all its other tensors.
    """

    in_blocks: str
    outside: str

    @property
    def pattern(self) -> str:
        """A regular expression that matches every name of the host."""
        return f'{self.in_blocks}|{self.outside}'


@dataclass(frozen=True)
class CheckpointFormat:
    """A checkpoint format of other code.

    Args:
        name: the name of the format in messages and reports.
        recognised_by: a regular expression that matches the beginning of at least one name.
        convert: a function that renames and re-orders the tensors of a backbone.
        left_out: a regular expression for names that no backbone uses (of a classifier or a decoder).
    """

    name: str
    recognised_by: str
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    left_out: str = ''

    def is_left_out(self, name: str) -> bool:
        """Whether no backbone uses the tensor of this name in the checkpoint."""
        return bool(self.left_out) and re.match(self.left_out, name) is not None


def rename(tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename tensors.

    Args:
        tensors: the tensors by name.
        renames: pairs of a regular expression and its replacement, which are applied one after another.

    Raises:
        CheckpointMismatchError: if two tensors get the same name.
    """
    renames, renamed = tuple(renames), {}
    for source, tensor in tensors.items():
        name = source
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        put(renamed, name, tensor, source)
    return renamed


def put(converted: dict[str, Tensor], name: str, tensor: Tensor, source: str) -> None:
    """Add a tensor to ``converted`` under its new name.

    Raises:
        CheckpointMismatchError: if another tensor already has that name.
    """
    if name in converted:
        raise CheckpointMismatchError(f'{source} and another tensor of the checkpoint would both become {name}.')
    converted[name] = tensor
