"""The mixture's arithmetic: queries and keys folded into gates, and pooling over them (equations 6 to 8).

Imports torch only when it is called.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fold(
    query_weight: "Tensor", expert_key: "Tensor", pooling: str, dtype: "torch.dtype | None" = None
) -> "Tensor":
    """The linear gates that a mixture of routers amounts to (eq. 6-8, rearranged).

    S_i^j = (W^j x) . K_i / sqrt(d') = ((K_i W^j) / sqrt(d')) . x is linear in x for every router j and key
    i, and so is its sum over j. ``pool_logits`` takes the maximum over routers and keys afterwards.

    ``query_weight`` is [m, d', D], ``expert_key`` [n*c, d']; ``dtype`` (default: float32) is the arithmetic's
    and the result's. ``sum`` gives [n*c, D], ``max`` [m*n*c, D]: all keys of router 0, then of router 1, ...
    """
    import torch

    dtype = dtype or torch.float32
    scaled_key = expert_key.to(dtype) / math.sqrt(expert_key.shape[1])
    if pooling == "sum":
        return scaled_key @ query_weight.sum(dim=0, dtype=dtype)
    return (scaled_key @ query_weight.to(dtype)).flatten(0, 1)


def pool_logits(logits: "Tensor", num_experts: int, keys_per_expert: int) -> "Tensor":
    """An expert's score: the largest over its keys, and over the routers in ``max`` pooling (section 5.2).

    ``logits`` [..., n*c] or [..., m*n*c] are tokens times the rows of a folded gate; the result is [..., n].
    Where several are equal the first gets the gradient, so that keys which start out equal (those of one
    query group, under grouped-query attention) do not stay so.
    """
    if logits.shape[-1] == num_experts:
        return logits
    by_router = logits.unflatten(-1, (-1, num_experts, keys_per_expert))
    return by_router.max(dim=-1).values.max(dim=-2).values
