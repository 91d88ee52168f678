"""Write files whole or not at all, since several processes may write the same one at a time."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file beside its place, and move it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
