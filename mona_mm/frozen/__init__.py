"""What of a model trains, what stays frozen, and what can be saved on what is frozen."""
