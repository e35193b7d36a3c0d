"""One entry: its tensors in memory, in one compact buffer, and as a record of bytes."""
