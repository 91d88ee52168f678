"""Configs for the command lines: read, checked, set to data, a recipe or a strategy, and adapted to a machine."""
