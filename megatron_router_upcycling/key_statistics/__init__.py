"""Means of a dense model's key vectors: capture, merge over ranks, file."""
