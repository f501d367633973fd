"""Slow implementations from the paper, which of the package read the options' fields and nothing else."""
