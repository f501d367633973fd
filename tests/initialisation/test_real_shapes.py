"""The default conversion (8 routers, 8 experts, 2 a token) of the head counts of Qwen1.5, 2, 2.5 and 3."""

import math

import pytest
import torch

from megatron_router_upcycling.initialisation.heads import init_mixture, overlapping_sets
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.fold import fold
from megatron_router_upcycling.routers.likeness import tied_experts

SIZE, HIDDEN, TOKENS = 8, 64, 256
SHARPNESS = 3.0  # of attention, as trained models have it: random projections alone attend next to evenly
# Query heads and query groups, of Qwen1.5 (0.5B to 14B), 1.5 and 2.5 (14B, 32B), 2 and 2.5 (0.5B, 1.5B, 3B,
# 7B, 72B) and 3 (0.6B, 8B).
SHAPES = [
    *((16, 16), (20, 20), (32, 32), (40, 40)),
    (40, 8),
    *((14, 2), (12, 2), (16, 2), (28, 4), (64, 8)),
    *((16, 8), (32, 8)),
]


def random_layer(heads: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, D], query projections [H, d, D] and attended keys [H, d] of a random layer, causal."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(TOKENS, HIDDEN, generator=random)
    query, key = (
        torch.randn(count, SIZE, HIDDEN, generator=random) / math.sqrt(HIDDEN) for count in (heads, groups)
    )
    keys = (tokens @ key.mT).repeat_interleave(heads // groups, dim=0)  # (H, T, d)
    scores = SHARPNESS * (tokens @ query.mT) @ keys.mT / math.sqrt(SIZE)
    weights = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -math.inf).softmax(dim=-1)
    return tokens, query, (weights @ keys).mean(dim=1)


@pytest.mark.parametrize(("heads", "groups"), SHAPES)
def test_gates_differ_and_no_expert_is_idle(heads: int, groups: int) -> None:
    for seed in range(3):
        tokens, query, attended = random_layer(heads, groups, seed)
        gate = fold(*init_mixture(query, attended, RouterConfig()), "sum")  # (n, D)
        distances = torch.pdist(gate)
        assert not tied_experts(tokens @ gate.t())
        assert distances.min() >= 0.1 * distances.mean()
        load = torch.bincount((tokens @ gate.t()).topk(2).indices.flatten(), minlength=8)
        assert load.min() > 0


@pytest.mark.parametrize(("heads", "sets"), [(14, 8), (12, 8), (28, 8), (14, 16), (6, 8)])
def test_each_head_is_in_as_many_sets_and_in_none_twice(heads: int, sets: int) -> None:
    common = math.gcd(heads, 8)
    for seed in range(5):
        keys = torch.randn(heads, SIZE, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            keys = keys[:2].repeat_interleave(heads // 2, dim=0)  # as the heads of two query groups
        made = overlapping_sets(keys, sets, heads // common)
        assert len({tuple(members) for members in made}) == len(made) == sets
        assert all(len(set(members)) == heads // common for members in made)
        assert all(sum(head in members for members in made) == sets // common for head in range(heads))
        for first in range(0, sets, common):  # in each round every head once
            assert sorted(sum(made[first : first + common], [])) == list(range(heads))
