"""SPT: measure how sensitive each weight is, and train those that matter, under a parameter budget.

Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023.
"""

from importlib import import_module
from typing import Any

_MODULES = dict(
    Plan='plan',
    Sensitivity='sensitivity',
    allocate='allocation',
    compute_sensitivity='sensitivity',
    load_published_plan='published',
)
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # At first use: measuring needs mmengine's runner, which takes a second to import.
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
