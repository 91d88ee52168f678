"""Code that the command lines in ``tools/`` share."""
