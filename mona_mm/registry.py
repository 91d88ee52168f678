"""The registries of mona_mm: children of mmengine's, under the scope ``mona_mm``.

A config that says ``type='mona_mm.PeftBackbone'`` makes mmengine import this module by the scope's name, so no
``custom_imports`` line is needed once the OpenMMLab stack itself can be imported.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mona_mm',
    locations=['mona_mm.backbone', 'mona_mm.models', 'mona_mm.peft_model'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mona_mm', locations=['mona_mm.hooks'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mona_mm',
    locations=['mona_mm.optim'],
)
PARAM_SCHEDULERS = Registry(
    'parameter scheduler', parent=MMENGINE_PARAM_SCHEDULERS, scope='mona_mm', locations=['mona_mm.optim']
)
STRATEGIES = Registry('strategy', parent=MMENGINE_STRATEGIES, scope='mona_mm', locations=['mona_mm.strategies'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mona_mm', locations=['mona_mm.datasets'])
METHODS = Registry('peft method', scope='mona_mm', locations=['mona_mm.methods', 'mona_mm.spt'])
