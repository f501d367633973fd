"""Megatron's torch_dist checkpoints without Megatron: read safely, written by chunk, published whole."""
