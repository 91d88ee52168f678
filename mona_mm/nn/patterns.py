"""Choose modules of a model by patterns of their paths."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from mona_mm.errors import ConfigError

REGULAR_EXPRESSION = 're:'
"""The beginning of a pattern that is a regular expression."""

_MOST_NEAR = 16
"""The most patterns that are named where none is like a wrong one."""

_TRANSLATED = {'**.': r'(?:[^.]+\.)*', '*': '[^.]*', '{': '(?:', '}': ')', ',': '|'}


class PathPattern:
    """A pattern that whole paths of modules match or not.

    ``*`` stands for any characters within one name of a path, ``**`` as a whole name for any number of names, none
    included, and ``{a,b.c}`` for one of the alternatives: ``decoder.**.{value_proj,output_proj}``. What follows ``re:``
    is a regular expression.

    Args:
        text: the pattern.

    Raises:
        ConfigError: if the regular expression, or the braces of the alternatives, are malformed.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._is_expression = text.startswith(REGULAR_EXPRESSION)
        expression = text.removeprefix(REGULAR_EXPRESSION) if self._is_expression else _translate(text)
        try:
            self._expression = re.compile(expression)
        except re.error as error:
            raise ConfigError(f'{text!r} is not a valid pattern of paths: {error}.') from None

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path."""
        return self._expression.fullmatch(path if self._is_expression or not path else f'{path}.') is not None

    def near(self, paths: Iterable[str]) -> list[str]:
        """The paths that are most like the pattern, with ``*`` for indices; or else patterns of their begins and ends.

        A pattern that matches the ends of paths, as those of Hugging Face's PEFT do, is given with ``**`` before it.
        """
        paths = list(paths)
        anywhere = '' if self._is_expression else f'**.{self.text}'
        if anywhere and any(map(PathPattern(anywhere).matches, paths)):
            return [anywhere]
        known = list(dict.fromkeys(map(without_indices, paths)))
        like = without_indices(self.text.removeprefix(REGULAR_EXPRESSION).replace('\\', ''))
        close = get_close_matches(like, known, n=4, cutoff=0.5)
        if close:
            return close
        begins = dict.fromkeys(f'{path.partition(".")[0]}.**' for path in known if '.' in path)
        ends = dict.fromkeys(f'**.{path.rpartition(".")[2]}' for path in known)
        return [*begins, *(end for end in ends if end != '**.*')][:_MOST_NEAR]


def without_indices(path: str) -> str:
    """A path with ``*`` in place of the indices of lists, so that like parts of a model have one path."""
    return '.'.join('*' if name.isdigit() else name for name in path.split('.'))


def _translate(pattern: str) -> str:
    """The regular expression for a pattern, which matches paths with a dot at their end."""
    expression, depth = '', 0
    for token in re.findall(r'(?<![^.])\*\*\.|.', f'{pattern}.'):
        depth += (token == '{') - (token == '}')
        if depth < 0 or (token == ',' and not depth):
            break
        expression += _TRANSLATED.get(token) or re.escape(token)
    else:
        if not depth:
            return expression
    raise ConfigError(f'{pattern!r} is not a valid pattern of paths: alternatives are written {{a,b}}.')
