"""Text files as people and tools write them: UTF-8 with or without a byte order mark, and UTF-16 with one."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from mona_mm.errors import ConfigError

_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Read a text file; its line ends become ``\\n``.

    Raises:
        ConfigError: if it is in another encoding; it names the file and the line.
    """
    content = path.read_bytes()
    encoding = 'utf-16' if content.startswith(_MARKS) else 'utf-8-sig'
    try:
        return content.decode(encoding).replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b'\n') + 1
        raise ConfigError(f'{path}, line {line}, is not in UTF-8: save the file with the encoding UTF-8.') from None


def lines_of(path: Path) -> list[str]:
    """The lines of a text file without white space around them and without empty ones at the end.

    Raises:
        ConfigError: if it is not in UTF-8.
    """
    return [line.strip() for line in read_text(path).rstrip().split('\n')]


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file in any encoding of Unicode.

    Raises:
        ConfigError: if it does not parse; it names the file, and the place.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{path} is no JSON file ({error}): it may be empty, cut short or of another kind.') from None


def says(content: Any, *words: str) -> bool:
    """Whether the bytes of a text file have all these words, in UTF-8 or UTF-16.

    Args:
        content: bytes, or a file in memory (:class:`mmap.mmap`).
        words: what is looked for.
    """
    start = bytes(content[:2])
    encoding = 'utf-8'
    if b'\0' in start or start in _MARKS:
        encoding = 'utf-16-le' if start.endswith(b'\0') or start == codecs.BOM_UTF16_LE else 'utf-16-be'
    return all(content.find(word.encode(encoding)) >= 0 for word in words)
