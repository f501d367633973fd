"""The bytes of a checkpoint: torch.save archives, pickles read safely, the metadata's index."""
