"""How similar the routers of a mixture are (pure torch).

Symbols: T tokens, n experts, m routers, c keys an expert, d' router width, D hidden size.
"""

import math

import torch
from torch import Tensor

from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.fold import fold


def tied_experts(logits: Tensor, granularity: int = 1) -> tuple[tuple[int, int], ...]:
    """Pairs of experts whose ``logits`` [T, n] are equal up to rounding for every token.

    Shards of one copy (``granularity``) are equal by design: only the first of each copy is compared.
    """
    copies = logits.t()[::granularity]
    tied = torch.cdist(copies, copies, p=math.inf) <= 1e-6 * copies.abs().max()
    return tuple((a * granularity, b * granularity) for a, b in tied.triu(1).nonzero().tolist())


def router_agreement(
    tokens: Tensor, query_weight: Tensor, expert_key: Tensor, options: RouterConfig
) -> float:
    """How often a single router's first choice for ``tokens`` [T, D] is the mixture's, the mean over routers.

    1/n when routers have nothing in common, 1 when all choose alike.
    """
    gates = fold(query_weight, expert_key, "max")  # all routers' apart
    scores = (tokens.float() @ gates.t()).unflatten(-1, (len(query_weight), options.num_experts, -1))
    pooled = (scores.sum(dim=1) if options.pooling == "sum" else scores.amax(dim=1)).amax(dim=-1)
    alone = scores.amax(dim=-1).argmax(dim=-1)  # [T, m], of scores [T, m, n, c]
    return float((alone == pooled.argmax(dim=-1, keepdim=True)).float().mean())


def gate_cosine(query_weight: Tensor, expert_key: Tensor) -> float:
    """Mean cosine between every two routers' folded gates."""
    gates = fold(query_weight, expert_key, "max").unflatten(0, (len(query_weight), -1))  # [m, n*c, D]
    gates = gates - gates.mean(dim=1, keepdim=True)  # the mean over experts cannot change the routing
    return mean_cosine(gates.flatten(1))


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine similarity of every two different rows, [N, D]; NaN for a single row."""
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    pairs = len(rows) * (len(rows) - 1)
    if not pairs:
        return math.nan
    # |sum of unit vectors|^2 is the sum over all pairs, those of a row with itself included.
    own = (unit * unit).sum()
    return float(((unit.sum(dim=0) ** 2).sum() - own) / pairs)
