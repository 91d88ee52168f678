"""Data sets that the OpenMMLab libraries lack. Importing this package registers them."""

from mona_mm.datasets.fgvc import FGVCJson

__all__ = ['FGVCJson']
