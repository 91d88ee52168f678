"""Make ``mmcv.ops`` importable where mmcv was installed without its compiled operators."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path


class _StandInFinder(importlib.abc.MetaPathFinder):
    """Answers an import of ``mmcv._ext`` with ``mmcv_ops.py``, and no other import."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != 'mmcv._ext':
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).with_name('mmcv_ops.py'))


_FINDER = _StandInFinder()


def install_mmcv_ext() -> None:
    """Let ``mmcv._ext`` be imported from :mod:`mona_mm.compat.mmcv_ops` when mmcv brings none of its own.

    Python asks its import finders in order and ours stands last, so a compiled ``mmcv._ext`` is found first
    and used untouched. Nothing is imported before it is needed, and the import system gives the module the
    ``__spec__`` that mmengine's ``mmcv_full_available`` looks for. Calling this again changes nothing.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
