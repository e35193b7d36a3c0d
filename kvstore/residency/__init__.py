"""Which key is in which tier, and what changes that: the read and write paths, the mover, the maintainer."""
