"""One file, one method. A new method is a new file here: a :class:`PeftModule` registered in ``METHODS``."""

from mona_mm.methods.adapter import Adapter
from mona_mm.methods.adaptformer import AdaptFormer
from mona_mm.methods.base import PeftModule, build_method
from mona_mm.methods.folded_mona import FoldedMona, fold_mona
from mona_mm.methods.lora import LoRA
from mona_mm.methods.lorand import LoRand
from mona_mm.methods.mona import Mona

__all__ = ['AdaptFormer', 'Adapter', 'FoldedMona', 'LoRA', 'LoRand', 'Mona', 'PeftModule', 'build_method', 'fold_mona']
