"""Measures of routing in pure torch: of a router's decisions, and of the distance between experts.

Symbols: T tokens, n experts, k experts a token.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_router_upcycling.layers.statistics import SUMS


def summarise(sums: Tensor) -> dict[str, Any]:
    """The measures of one layer, from the sums of ``routing_sums``; empty if there were no tokens.

    ``load`` is each expert's share of the choices that were kept; ``load_cv`` is its standard deviation over
    its mean. Entropy (nats), largest probability and sum of weights are means over tokens.
    """
    tokens, entropy, top1, weight_sum, dropped = sums[: len(SUMS)].tolist()
    load = sums[len(SUMS) :].double()
    total = float(load.sum())
    if not tokens or not total:
        return {}
    share = load / total
    return {
        "load": share.tolist(),
        "load_max_over_mean": float(share.max() * len(share)),
        "load_cv": float(share.std(correction=0) * len(share)),
        "dead_experts": int((load == 0).sum()),
        "entropy": entropy / tokens,
        "top1_probability": top1 / tokens,
        "weight_sum": weight_sum / tokens,
        "dropped_fraction": dropped / (total + dropped),
    }


def common_share(logits: Tensor) -> float:
    """The share of the variance of ``logits`` [T, n] over experts that all tokens have in common."""
    apart = logits - logits.mean(dim=1, keepdim=True)
    return float(apart.mean(dim=0).square().sum() / apart.square().sum(dim=1).mean())


def choose(logits: Tensor, top_k: int, pre_softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax router's decisions, without Megatron: logits [T, n] to the inputs of ``routing_sums``."""
    scores = logits.float().softmax(dim=1)
    top = logits.float().topk(top_k, dim=1)
    values = scores.gather(1, top.indices) if pre_softmax else top.values.softmax(dim=1)
    weights = torch.zeros_like(scores).scatter_(1, top.indices, values)
    return scores, weights, torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices, True)


def spread(total: Tensor, square_total: float, count: int) -> float:
    """Root mean square distance over all pairs of ``count`` vectors, divided by their root mean square norm.

    0 if they are equal, sqrt(2) if they are orthogonal and of equal length. ``total`` is the vectors' sum,
    ``square_total`` the sum of their squared norms.
    """
    if count < 2 or not square_total:
        return math.nan
    mean_square = square_total / count
    variance = max(0.0, mean_square - float((total.double() / count).square().sum()))
    return math.sqrt(2 * count / (count - 1) * variance / mean_square)
