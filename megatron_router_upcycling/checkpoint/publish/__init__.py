"""Write a folder whole or not at all, and check that it is whole."""
