"""Measurements of speed and memory, given as ratios of figures from the same run."""
