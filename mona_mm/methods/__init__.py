"""The methods, one file each. A new method is a new file here with a module that is registered in ``METHODS``."""

from mona_mm.methods.adapter import Adapter
from mona_mm.methods.adapter_plus import AdapterPlus
from mona_mm.methods.adaptformer import AdaptFormer
from mona_mm.methods.base import LinearModule, Method, MethodGroup, StreamModule, build_method, deploy
from mona_mm.methods.colin import CoLin
from mona_mm.methods.dora import DoRA
from mona_mm.methods.lora import LoRA
from mona_mm.methods.lorand import LoRand
from mona_mm.methods.mona import Mona
from mona_mm.methods.parax import ParaX
from mona_mm.methods.rein import Rein

__all__ = [
    'AdaptFormer',
    'Adapter',
    'AdapterPlus',
    'CoLin',
    'DoRA',
    'LinearModule',
    'LoRA',
    'LoRand',
    'Method',
    'MethodGroup',
    'Mona',
    'ParaX',
    'Rein',
    'StreamModule',
    'build_method',
    'deploy',
]
