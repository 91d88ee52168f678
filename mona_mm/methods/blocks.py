"""Choose the blocks that a method is in, and its width in each of them.

A *pattern* is a :class:`mona_mm.nn.patterns.PathPattern` of the path of a block or of a module around it:
``'stages.3'`` matches every block in the fourth stage, ``'stages.{2,3}.blocks.0'`` two blocks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.nn.patterns import REGULAR_EXPRESSION, PathPattern
from mona_mm.options import show

DEFAULT = 'default'
"""The key, among patterns, of the value in every block that no pattern matches."""

_LAST = re.compile(r'last +([0-9]{1,9})')
_SLICE = re.compile(r'(-?[0-9]{1,9})?:(-?[0-9]{1,9})?(?::([1-9][0-9]{0,8}))?')


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is that of a block's path or of a module around the block.

    Raises:
        ConfigError: if the pattern is malformed.
    """
    names, compiled = path.split('.'), _compiled(pattern)
    return any(compiled.matches('.'.join(names[:count])) for count in range(1, len(names) + 1))


_compiled = lru_cache(PathPattern)


def choose_blocks(name: str, blocks: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths that the option ``blocks`` of a method names, in the order of the backbone.

    Args:
        name: the name of the method, for messages.
        blocks: ``'last 6'``, a slice over all blocks in their order (``'4:'``, ``':-2'``), a pattern, or a list of
            indices and patterns; None for all blocks.
        paths: the paths of the backbone's blocks, in order.

    Raises:
        ConfigError: if it is none of these, or names a block that the backbone does not have, or none at all.
    """
    if blocks is None:
        return tuple(paths)
    given = [blocks] if isinstance(blocks, str) else list(blocks) if isinstance(blocks, list | tuple) else []
    if not given or not all(_is_entry(entry) for entry in given):
        raise ConfigError(
            f"peft: {name}: blocks={show(blocks)} must be 'last 6', a slice such as '4:', a pattern of paths such as "
            "'stages.3', or a list of indices and patterns."
        )
    chosen: set[int] = set()
    for entry in given:
        found = _positions(name, entry, paths)
        if not found:
            raise ConfigError(
                f'peft: {name}: blocks={show(blocks)} selects none of the {len(paths)} blocks, which are {paths[0]} '
                f'(0) to {paths[-1]} ({len(paths) - 1}).'
            )
        chosen.update(found)
    return tuple(paths[index] for index in sorted(chosen))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, int | str) and not isinstance(entry, bool) and entry != ''


def _positions(name: str, entry: int | str, paths: Sequence[str]) -> list[int]:
    """The positions of the blocks that one entry of ``blocks`` names."""
    count = len(paths)
    last = _LAST.fullmatch(entry) if isinstance(entry, str) else None
    index = entry if isinstance(entry, int) else -int(last[1]) if last else 0
    if not -count <= index < count:
        raise ConfigError(
            f'peft: {name}: blocks has {show(entry)}, but this backbone has {count} blocks, {paths[0]} (0) to '
            f'{paths[-1]} ({count - 1}).'
        )
    if isinstance(entry, int):
        return [index % count]
    if last:
        return list(range(count + index, count))
    part = _SLICE.fullmatch(entry)
    if part:
        return list(range(count)[slice(*(None if number is None else int(number) for number in part.groups()))])
    found = [position for position, path in enumerate(paths) if matches(entry, path)]
    if not found:
        raise ConfigError(
            f'peft: {name}: blocks={show(entry)} matches no block of this backbone. {near(entry, paths)} Beside '
            "patterns of paths there are 'last 6', a slice such as '4:', and a list of indices, [0, -1]."
        )
    return found


def near(pattern: str, paths: Iterable[str]) -> str:
    """A sentence that names the blocks' paths, or modules around them, that are most like a pattern."""
    paths = list(paths)
    around = dict.fromkeys('.'.join(path.split('.')[: n + 1]) for path in paths for n in range(path.count('.') + 1))
    close = get_close_matches(pattern, around, n=3)
    return f'Did you mean {" or ".join(map(repr, close))}?' if close else f'Blocks are {paths[0]} to {paths[-1]}.'


def in_each_block(name: str, option: str, value: Any, paths: Sequence[str]) -> dict[str, Any]:
    """The value of an option in each block, by path.

    Args:
        name: the name of the method, for messages.
        option: the name of the option.
        value: the value in all blocks, or a mapping from patterns to values. The most specific pattern that matches a
            block counts, see :func:`specificity`; :data:`DEFAULT` is for blocks that none matches.
        paths: the paths of the blocks that the method is in.

    Raises:
        ConfigError: if a pattern matches no block, two equally specific patterns with different values match one, or
            none matches a block and there is no default.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(paths, value)
    patterns = [pattern for pattern in value if pattern != DEFAULT]
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ConfigError(
                f'peft: {name}: the pattern {pattern!r} of {option} matches no block that it is in. '
                f'{near(pattern, paths)}'
            )
    return {path: _in_block(name, option, value, patterns, path) for path in paths}


def specificity(pattern: str) -> tuple[int, bool, int]:
    """How narrow a pattern is, for comparison: one of more names comes first, then one without wildcards and
    alternatives, then the longer one. Regular expressions come last."""
    if pattern.startswith(REGULAR_EXPRESSION):
        return 0, False, len(pattern)
    names = [name for name in pattern.split('.') if name != '**']
    return len(names), not any(sign in pattern for sign in '*{'), len(pattern.replace('*', ''))


def _in_block(name: str, option: str, value: Mapping[str, Any], patterns: Sequence[str], path: str) -> Any:
    found = [pattern for pattern in patterns if matches(pattern, path)]
    found = [pattern for pattern in found if specificity(pattern) == max(map(specificity, found))] or [DEFAULT]
    if found[0] not in value:
        raise ConfigError(
            f'peft: {name}: no pattern of {option}={show(dict(value))} matches the block {path}. Add one, or '
            f'{DEFAULT!r}: the value in all other blocks.'
        )
    if len({value[pattern] for pattern in found}) > 1:
        raise ConfigError(
            f'peft: {name}: the patterns {" and ".join(map(repr, found))} of {option} match the block {path} and are '
            'equally specific, so neither comes first. Write one of them out further.'
        )
    return value[found[0]]
