"""Shared memory: how a block lies in it, free room, and the arena that tensors are made in."""
