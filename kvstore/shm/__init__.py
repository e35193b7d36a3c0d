"""Shared memory: the layout of a block, the list of free room, and the arena in which tensors are allocated."""
