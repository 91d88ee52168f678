"""One file, one method. A new method is a new file here: a :class:`PeftModule` registered in ``METHODS``."""

from mona_mm.methods.adapter import Adapter
from mona_mm.methods.adaptformer import AdaptFormer
from mona_mm.methods.base import Method, PeftModule, build_method
from mona_mm.methods.folded_mona import FoldedMona, fold_mona
from mona_mm.methods.lora import LoRA
from mona_mm.methods.lorand import LoRand
from mona_mm.methods.mona import Mona
from mona_mm.methods.spt import SPT

__all__ = [
    'SPT',
    'AdaptFormer',
    'Adapter',
    'FoldedMona',
    'LoRA',
    'LoRand',
    'Method',
    'Mona',
    'PeftModule',
    'build_method',
    'fold_mona',
]
