"""One file, one method. A new method is a new file here: a :class:`PeftModule` registered in ``METHODS``."""

from mona_mm.methods.base import PeftModule, build_method
from mona_mm.methods.mona import Mona

__all__ = ['Mona', 'PeftModule', 'build_method']
