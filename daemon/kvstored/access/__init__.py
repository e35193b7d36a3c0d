"""Who a caller is, what it may do, and which part of the store it sees."""
