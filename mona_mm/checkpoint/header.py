"""Parse the headers of files, after checking that their length and depth are those of genuine files.

Parsed JSON can take hundreds of times the memory of its text, and a few bytes can state any count or shape. So the size
of every header is checked before it is parsed.
"""

import json
import os
import re
import struct
from collections import Counter
from typing import Any, BinaryIO

LONGEST = 2**20  # bytes; the header of a delta with a thousand tensors and its config takes a tenth
LONGEST_OF_OTHERS = 16 * LONGEST  # for safetensors files of other code; safetensors itself allows 100 MB
_DEEPEST = 32
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse(text: str | bytes) -> Any:
    """Parse the JSON of a header.

    Raises:
        ValueError: if it is longer than a mebibyte, nests deeper than 32, has a key twice, or is not JSON.
    """
    if len(text) > LONGEST:
        raise ValueError(f'its header has more than {LONGEST:,} bytes')
    text = text.decode() if isinstance(text, bytes) else text
    depth = 0
    for bracket in re.findall(r'[][{}]', _STRING.sub('', text)):
        depth += 1 if bracket in '[{' else -1
        if depth > _DEEPEST:
            raise ValueError(f'its header nests deeper than {_DEEPEST}')
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'its header has the key {duplicate[:80]!r} twice')
    return found


def check_length(file: str | os.PathLike | BinaryIO, longest: int = LONGEST) -> int:
    """The length of a safetensors file's header, which follows its first eight bytes.

    Raises:
        ValueError: if the header is longer than the file or than ``longest``.
    """
    if not hasattr(file, 'read'):
        with open(file, 'rb') as opened:
            return check_length(opened, longest)
    start = file.read(8)
    size = file.seek(0, os.SEEK_END)
    if len(start) < 8:
        raise ValueError('it is truncated')
    (length,) = struct.unpack('<Q', start)
    if not 0 < length <= size - 8:
        raise ValueError('it is not a safetensors file, or it is truncated')
    if length > longest:
        raise ValueError(f'its header has {length:,} bytes, and at most {longest:,} are accepted')
    return length
