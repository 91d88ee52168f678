"""Which parameters train and which stay frozen, and how time and memory are saved on the frozen ones."""
