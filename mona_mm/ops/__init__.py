"""Faster forms of what the methods compute. Each has its plain form in ``mona_mm.methods``, its test too."""
