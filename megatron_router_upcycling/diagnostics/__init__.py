"""Describe checkpoints, analyse how routing would start before training, and report on training runs."""
