"""For runs that meet trouble: one run a work dir, images that cannot be read, and why a run failed, in one line."""
