"""The sums that routing statistics are made of, in pure torch.

Symbols: T tokens, n experts.
"""

import torch
from torch import Tensor

# The sums over tokens that come first in ``routing_sums``; the n experts' token counts follow.
SUMS = ("tokens", "entropy", "top1_probability", "weight_sum", "dropped")


def routing_sums(scores: Tensor, weights: Tensor, routing_map: Tensor, top_k: int) -> Tensor:
    """One router's decisions on some tokens, as sums that may be added over micro-batches and ranks.

    ``scores`` [T, n], float32 or wider, are each token's distribution over all experts; ``weights`` [T, n],
    0 but for the chosen experts. Of T * top_k choices, those missing in ``routing_map``, bool [T, n], were
    dropped. Returns [5 + n] in the dtype of ``scores``: SUMS, then tokens by expert. Never waits for a GPU.
    """
    load = routing_map.sum(dim=0, dtype=scores.dtype)
    tokens = scores.new_full((), scores.shape[0])
    entropy = -torch.xlogy(scores, scores).sum()
    dropped = tokens * top_k - load.sum()
    parts = (tokens, entropy, scores.amax(dim=1).sum(), weights.sum(dtype=scores.dtype), dropped)
    return torch.cat((torch.stack(parts), load))
