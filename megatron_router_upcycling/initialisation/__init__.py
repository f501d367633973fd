"""A router's first values: from attention heads (the paper), or for ablations. Pure tensors."""
