"""Activation checkpoints that keep the gradients of a module whose input does not require one.

mmengine's ``activation_checkpointing`` uses torch's re-entrant form, in which nothing within a checkpoint gets a
gradient unless an input of it requires one. The input of the first tuned block under a frozen base does not.
"""

from functools import partial

from mmengine.runner import activation_checkpointing
from torch.utils.checkpoint import checkpoint


def install_activation_checkpoints() -> None:
    """Let mmengine's activation checkpoints be torch's other form."""
    if getattr(activation_checkpointing, 'checkpoint', None) is checkpoint:
        activation_checkpointing.checkpoint = partial(checkpoint, use_reentrant=False)
