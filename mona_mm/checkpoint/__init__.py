"""Checkpoints: their formats, loading with checks, and deltas."""

from mona_mm.checkpoint.convert import convert_state_dict
from mona_mm.checkpoint.delta import load_delta, save_delta
from mona_mm.checkpoint.pretrained import load_pretrained

__all__ = ['convert_state_dict', 'load_delta', 'load_pretrained', 'save_delta']
