"""Compare an upcycled checkpoint with the dense one that it was made from."""
