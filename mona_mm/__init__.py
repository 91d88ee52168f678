"""mona_mm: parameter-efficient fine-tuning of dense-prediction models, as an OpenMMLab plugin.

Importing it registers everything under the scope ``mona_mm`` and, where mmcv has no compiled operators, makes the
OpenMMLab libraries importable without them. Import it before their models.
"""

from mona_mm import compat

compat.install()  # before any import of mmcv.ops below

from mona_mm.backbone import FrozenModel, PeftBackbone  # noqa: E402
from mona_mm.checkpoint import loading  # noqa: E402, F401  lets every loader of mmengine read deltas
from mona_mm.checkpoint.delta import load_delta, save_delta  # noqa: E402
from mona_mm.checkpoint.lock import reading  # noqa: E402
from mona_mm.checkpoint.merge import merge  # noqa: E402
from mona_mm.frozen import averages  # noqa: E402, F401  lets averages keep the frozen part
from mona_mm.frozen.count import count_trainable  # noqa: E402
from mona_mm.hosts import register_host  # noqa: E402
from mona_mm.methods.auxiliary import auxiliary_loss  # noqa: E402
from mona_mm.peft_model import PeftModel  # noqa: E402
from mona_mm.version import __version__  # noqa: E402

__all__ = [
    'FrozenModel',
    'PeftBackbone',
    'PeftModel',
    '__version__',
    'auxiliary_loss',
    'count_trainable',
    'load_delta',
    'merge',
    'reading',
    'register_host',
    'save_delta',
]
