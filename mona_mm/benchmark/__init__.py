"""Measurements of speed and memory, as ratios of what is measured in one run."""
