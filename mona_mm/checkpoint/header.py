"""Headers of files, parsed only once they are known to be of the size and depth that honest ones have.

JSON takes hundreds of times its length when it is parsed, and what it says of counts and shapes costs nothing to
write. So every header is bounded before it is parsed, and after it has been unpacked.
"""

import json
import os
import re
import struct
from collections import Counter
from typing import Any, BinaryIO

LONGEST = 2**20  # bytes; of a delta of a thousand tensors, with the text of its config, it is a tenth
LONGEST_OF_OTHERS = 16 * LONGEST  # of safetensors files of other code, which safetensors itself lets be 100 MB
_DEEPEST = 32
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse(text: str | bytes) -> Any:
    """JSON of a header.

    Raises:
        ValueError: if it is longer than a mebibyte, nests deeper than 32, names a key twice, or is no JSON.
    """
    if len(text) > LONGEST:
        raise ValueError(f'a header of more than {LONGEST:,} bytes')
    text = text.decode() if isinstance(text, bytes) else text
    depth = 0
    for bracket in re.findall(r'[][{}]', _STRING.sub('', text)):
        depth += 1 if bracket in '[{' else -1
        if depth > _DEEPEST:
            raise ValueError(f'a header that nests deeper than {_DEEPEST}')
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'{twice[:80]!r} is named twice')
    return found


def check_length(file: str | os.PathLike | BinaryIO, longest: int = LONGEST) -> int:
    """The length of a safetensors file's header, which follows its first eight bytes.

    Raises:
        ValueError: if it is longer than the file, or than ``longest``.
    """
    if not hasattr(file, 'read'):
        with open(file, 'rb') as opened:
            return check_length(opened, longest)
    start = file.read(8)
    size = file.seek(0, os.SEEK_END)
    if len(start) < 8:
        raise ValueError('it is cut short')
    (length,) = struct.unpack('<Q', start)
    if not 0 < length <= size - 8:
        raise ValueError('it is no safetensors file, or cut short')
    if length > longest:
        raise ValueError(f'its header is of {length:,} bytes, and {longest:,} are the most')
    return length
