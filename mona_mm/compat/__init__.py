"""Adaptations that let the OpenMMLab stack run on current torch without compiled operators."""

from mona_mm.compat.mmcv_ext import install_mmcv_ext
from mona_mm.compat.multimodal import install_multimodal_check
from mona_mm.compat.safe_globals import guard_torch_load, register_safe_globals


def install() -> None:
    """Make ``mmcv.ops`` and mmpretrain importable, and mmengine's checkpoints loadable with weights-only loading."""
    install_mmcv_ext()
    install_multimodal_check()
    register_safe_globals()
    guard_torch_load()
