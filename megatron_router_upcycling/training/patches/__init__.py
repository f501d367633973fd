"""All patches of Megatron and PyTorch: each wrapped or replaced symbol, and why."""
