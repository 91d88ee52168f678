"""Checkpoints in and out: formats, loading that checks, and what of a file fits a model."""

from mona_mm.checkpoint.convert import convert_state_dict
from mona_mm.checkpoint.pretrained import load_pretrained

__all__ = ['convert_state_dict', 'load_pretrained']
