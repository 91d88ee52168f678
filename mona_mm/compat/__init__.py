"""Adaptations that let the OpenMMLab stack run on current torch without compiled operators."""

from mona_mm.compat.activation_checkpoints import install_activation_checkpoints
from mona_mm.compat.mmcv_ext import install_mmcv_ext
from mona_mm.compat.multimodal import install_multimodal_check
from mona_mm.compat.safe_globals import guard_torch_load, register_safe_globals


def install() -> None:
    """Make ``mmcv.ops`` and mmpretrain importable, mmengine's checkpoints loadable with weights-only loading, and its
    activation checkpoints fit for a frozen base."""
    install_mmcv_ext()
    install_multimodal_check()
    register_safe_globals()
    guard_torch_load()
    install_activation_checkpoints()
