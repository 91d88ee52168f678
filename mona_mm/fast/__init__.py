"""Faster forms of what the hosts compute, equal to it within rounding."""
