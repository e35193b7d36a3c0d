"""What a store of a given size would do with a trace, without tensors."""
