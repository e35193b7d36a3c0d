"""What a store of some size would do with a trace, without tensors."""
