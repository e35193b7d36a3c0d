"""kvstore: the engine of kvstored, usable with no daemon at all."""
