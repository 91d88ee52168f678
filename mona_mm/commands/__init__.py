"""What the command lines in ``tools/`` share: arguments, runners and errors, and a few steps to try a training."""
