"""Who a caller is, its rights, and the part of the store that it sees."""
