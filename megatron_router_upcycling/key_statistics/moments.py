"""Sums of a dense model's key vectors, by attention head (pure torch).

The heads of a query group share its keys, which are averaged in two ways. The mean key is the average over
all tokens (section 3.2 of the paper). The attended key of a head is the average over the tokens that it
attends to more than the group's other heads do (``attending_heads``). With one head a group both are equal.

Shapes: L layers, G query groups, H query heads, d head size, T tokens.
"""

import math
from typing import Any

import torch

TOKENS_PER_BLOCK = 1024


class KeySums:
    """Running sums of keys and numbers of tokens; each token's key of a query group goes to one of its heads.

    Every rank holds sums of the whole model's size and adds to its own layers and heads.
    """

    def __init__(
        self, num_layers: int, num_heads: int, num_groups: int, head_dim: int, device: Any = "cpu"
    ) -> None:
        shape = (num_layers, num_heads, head_dim)
        self.num_groups = num_groups
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)  # [L, H, d]
        self.count = torch.zeros(shape[:2], dtype=torch.int64, device=device)  # [L, H]

    @torch.no_grad()
    def add(self, layer: int, first_group: int, keys: torch.Tensor, heads: torch.Tensor | None) -> None:
        """Add ``keys`` [..., groups, d] of the query groups from ``first_group`` on, in any floating-point
        dtype. ``heads``: as ``attending_heads`` gives them."""
        keys = keys.flatten(0, -3)  # (T, groups, d)
        in_group = self.total.shape[1] // self.num_groups
        own = slice(first_group * in_group, (first_group + keys.shape[1]) * in_group)
        if heads is None:
            assert in_group == 1
            self.total[layer, own] += sum_over_tokens(keys)
            self.count[layer, own] += len(keys)
            return
        chosen = torch.nn.functional.one_hot(heads.flatten(0, -2), in_group)  # (T, groups, heads)
        self.count[layer, own] += chosen.sum(0).flatten()
        dtype = torch.float32 if keys.is_cuda else torch.float64
        for some, keys_of in zip(chosen.split(TOKENS_PER_BLOCK), keys.split(TOKENS_PER_BLOCK), strict=True):
            sums = torch.einsum("tgh,tgd->ghd", some.to(dtype), keys_of.to(dtype))
            self.total[layer, own] += sums.flatten(0, 1)

    def all_reduce(self) -> None:
        """Add up the sums of every rank of the run; all ranks end with the same."""
        for tensor in (self.total, self.count):
            torch.distributed.all_reduce(tensor)

    @property
    def tokens(self) -> int:
        """Tokens whose keys were added, the same for every layer and query group.

        Raises RuntimeError if they differ: a rank's sums were not merged, or its layers were not captured.
        """
        seen = self.count.unflatten(1, (self.num_groups, -1)).sum(2)
        tokens = int(seen.max())
        for layer, group in ((seen != tokens) | (seen == 0)).nonzero().tolist():
            raise RuntimeError(
                f"key statistics: layer {layer}, query group {group} saw {int(seen[layer, group])} tokens"
                f" where {tokens} are expected"
            )
        return tokens

    def mean(self) -> torch.Tensor:
        """The mean key of each query group, [L, G, d] in float32 on the CPU."""
        return (self.total.unflatten(1, (self.num_groups, -1)).sum(2) / self.tokens).float().cpu()

    def attended(self) -> torch.Tensor:
        """The mean of each head's own keys, likewise [L, H, d]; the group's mean key if it has none."""
        own = (self.total / self.count.unsqueeze(2)).float().cpu()
        mean = self.mean().repeat_interleave(self.total.shape[1] // self.num_groups, dim=1)
        return torch.where(self.count.cpu().unsqueeze(2) > 0, own, mean)


def sum_over_tokens(keys: torch.Tensor) -> torch.Tensor:
    """Sum of [T, G, d] over tokens: float64 [G, d].

    Computed in float64 on the CPU; on a GPU as a tree of float32 additions, so that a run's average over
    many micro-batches is accurate to float32 rounding.
    """
    if keys.is_cuda:
        return keys.sum(0, dtype=torch.float32).double()  # casts as it reads: no copy is made
    total = torch.zeros(keys.shape[1:], dtype=torch.float64)
    for block in keys.split(TOKENS_PER_BLOCK):  # keeps the float64 copy small
        total += block.sum(0, dtype=torch.float64)
    return total


@torch.no_grad()
def attending_heads(
    query: torch.Tensor, key: torch.Tensor, context_parallel: Any | None = None
) -> torch.Tensor | None:
    """For each token and query group the head that attends to it most: [s, b, groups], counted from 0 in its
    group; None where groups have one head.

    A head's own logit of a token, q_t . k_t / sqrt(d), measures how strongly the token attends to itself,
    whatever its position, since the rotary embedding rotates both alike. The token goes to the head whose own
    logit is furthest above its mean over the sequence: without the mean, one head could get all tokens.

    ``query`` [s, b, heads, d] and ``key`` [s, b, groups, d] are both before or both after the rotary
    embedding; packed sequences have no axis b. ``context_parallel``: the group of the sequence's other parts.
    """
    if query.shape[-2] == key.shape[-2]:
        return None
    query = query.unflatten(-2, (key.shape[-2], -1))  # (s, b, groups, heads, d)
    own = torch.einsum("...ghd,...gd->...gh", query.float(), key.float()) / math.sqrt(key.shape[-1])
    total, ranks = own.sum(dim=0, keepdim=True), context_parallel.size() if context_parallel else 1
    if ranks > 1:
        torch.distributed.all_reduce(total, group=context_parallel)
    return (own - total / (len(own) * ranks)).argmax(dim=-1)
