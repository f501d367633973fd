"""Dense language models into Mixture-of-Experts by Router Upcycling, for Megatron-LM (arXiv 2509.00679)."""

__version__ = "0.1.0"
