"""Megatron's training loop with this package's model, data and log."""
