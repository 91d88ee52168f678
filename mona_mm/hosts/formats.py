"""Checkpoints of other code: how one is recognised by its names, and how it is converted for a host."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mona_mm.errors import CheckpointMismatchError

END = r'(weight|bias)'
"""A regular expression of the last part of most names."""


@dataclass(frozen=True)
class OwnNames:
    """The names of a host's tensors, as regular expressions that match the whole of a name.

    Args:
        in_blocks: of what lies in its blocks and between them, which tells its checkpoints from others.
        outside: of the rest.
    """

    in_blocks: str
    outside: str

    @property
    def pattern(self) -> str:
        """Of all of them."""
        return f'{self.in_blocks}|{self.outside}'


@dataclass(frozen=True)
class CheckpointFormat:
    """Checkpoints of other code.

    Args:
        name: what messages and reports call the format.
        recognised_by: a regular expression that the beginning of at least one name matches.
        convert: renames and re-orders the tensors of a backbone.
        left_out: a regular expression of names that no backbone has a use for (a classifier's, a decoder's).
    """

    name: str
    recognised_by: str
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    left_out: str = ''

    def is_left_out(self, name: str) -> bool:
        """Whether a name of the checkpoint is one that no backbone has a use for."""
        return bool(self.left_out) and re.match(self.left_out, name) is not None


def rename(tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under new names.

    Args:
        tensors: by their names.
        renames: regular expressions and what takes the place of each, one after another.

    Raises:
        CheckpointMismatchError: if two tensors get one name.
    """
    renames, renamed = tuple(renames), {}
    for source, tensor in tensors.items():
        name = source
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        put(renamed, name, tensor, source)
    return renamed


def put(converted: dict[str, Tensor], name: str, tensor: Tensor, source: str) -> None:
    """Put a tensor in under its new name.

    Raises:
        CheckpointMismatchError: if another one has that name already.
    """
    if name in converted:
        raise CheckpointMismatchError(f'{source} and another tensor of the checkpoint would both become {name}.')
    converted[name] = tensor
