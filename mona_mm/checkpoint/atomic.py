"""Write files so that a stopped process or a full disk cannot leave a broken one."""

import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mona_mm.errors import ConfigError


@register_backend('mona_mm_atomic')
class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, which writes a file completely or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` beside ``filepath``, flush it to the disk, and rename it.

        Raises:
            ConfigError: if the path is a folder, or its parent is or lies in a file.
            OSError: if the system cannot write it, with the path as its file name.
        """
        path = Path(filepath)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f'{path} cannot be written: {path.parent} is, or lies in, a file.') from None
        if path.is_dir():
            raise ConfigError(f'{path} cannot be written: it is a folder.')
        partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
        try:
            with partial.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:  # that of a write names no file
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        finally:
            partial.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write a text by :meth:`put`."""
        self.put(obj.encode(encoding), filepath)
