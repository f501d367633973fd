"""Writing a folder whole or not at all, and proving that it is whole."""
