"""A router's first values: from attention heads (the paper), or as the ablations ask. Pure tensors."""
