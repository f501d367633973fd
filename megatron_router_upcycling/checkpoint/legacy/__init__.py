"""Megatron's legacy ``mp_rank_*`` checkpoints, read as if they were torch_dist ones."""
