"""Make ``mmcv.ops`` importable where mmcv was installed without its compiled operators."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path


class _StandInFinder(importlib.abc.MetaPathFinder):
    """A finder that resolves ``mmcv._ext`` to ``mmcv_ops.py`` and leaves every other import alone."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != 'mmcv._ext':
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).with_name('mmcv_ops.py'))


_FINDER = _StandInFinder()


def install_mmcv_ext() -> None:
    """Let ``mmcv._ext`` be imported from :mod:`mona_mm.compat.mmcv_ops` when mmcv was built without it.

    Python asks its import finders in order, and the finder of this module is the last one, so a compiled
    ``mmcv._ext`` is found first and used unchanged. Nothing is imported before it is needed, and the import system
    gives the module the ``__spec__`` that mmengine's ``mmcv_full_available`` looks for. Further calls have no effect.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
