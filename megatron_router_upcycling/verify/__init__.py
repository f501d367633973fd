"""An upcycled checkpoint held against the dense one that it was made from."""
