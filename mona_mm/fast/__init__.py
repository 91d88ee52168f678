"""What the hosts compute in less time or memory: faster forms, frozen weights in half precision, kept features."""
