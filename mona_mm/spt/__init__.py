"""SPT: measure how sensitive each weight is, and train those that matter, under a parameter budget.

Source: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023.
"""

from mona_mm.spt.allocation import allocate
from mona_mm.spt.method import SPT
from mona_mm.spt.plan import Plan
from mona_mm.spt.published import load_published_plan
from mona_mm.spt.sensitivity import Sensitivity, compute_sensitivity

__all__ = ['SPT', 'Plan', 'Sensitivity', 'allocate', 'compute_sensitivity', 'load_published_plan']
