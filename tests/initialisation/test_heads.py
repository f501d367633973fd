"""Heads into a mixture of routers, against references written as loops over plain Python numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_router_upcycling.initialisation.heads import (
    cosine_similarity,
    group_heads,
    init_mixture,
    query_heads,
)
from megatron_router_upcycling.routers.config import POOLINGS, RouterConfig
from megatron_router_upcycling.routers.fold import fold, pool_logits
from megatron_router_upcycling.routers.kinds import keys_per_expert
from tests.reference import mixture
from tests.reference.megatron_ffn import merge_qkv

HIDDEN = 12

# (heads H, head size d, routers m, experts n): the rows of section 5.2.1 and table 2, then what the rules
# allow beyond them (sets of three and of six, splitting together with duplication, one router, H = m).
TABLE = [
    (16, 8, 8, 8),
    (16, 8, 16, 16),
    (16, 8, 2, 8),
    (16, 8, 4, 8),
    (16, 8, 16, 8),
    (16, 8, 32, 8),
    (12, 4, 4, 4),
    (12, 4, 2, 4),
    (2, 8, 4, 16),
    (4, 4, 1, 6),
    (4, 4, 4, 8),
]


def random_heads(heads: int, head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Query projections [H, d, D] and keys [H, d]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, head_dim, HIDDEN, generator=generator),
        torch.randn(heads, head_dim, generator=generator),
    )


@pytest.mark.parametrize(
    ("heads", "groups", "size", "routers", "experts"),
    [
        *((heads, heads, size, routers, experts) for heads, size, routers, experts in TABLE),
        (16, 4, 8, 8, 8),  # ties among the heads of a group
        (16, 4, 8, 2, 8),  # m < n: every head four times
        (16, 8, 8, 16, 8),  # m > n: two keys an expert
        (20, 4, 4, 4, 4),  # sets of five
        (8, 2, 4, 8, 32),  # m = H < n: keys of one head
        (14, 14, 4, 8, 8),  # each head in four routers of seven
        (12, 2, 4, 8, 16),  # each in two routers of three, and in four keys
        (28, 4, 4, 8, 8),
        (6, 6, 4, 9, 9),  # where heads have been together in every way
    ],
)
def test_mixtures_equal_the_reference_bit_for_bit(
    heads: int, groups: int, size: int, routers: int, experts: int
) -> None:
    """Of Megatron's fused projection, which the reference reads row by row."""
    config = RouterConfig(num_experts=experts, num_routers=routers, top_k=1)
    shape = config.shape(heads, size)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(groups, size, generator=generator)
        if seed == 4:
            mean[0] = 0  # similar to none
        query, other = (torch.randn(count * size, HIDDEN, generator=generator) for count in (heads, groups))
        keys = mean.repeat_interleave(heads // groups, 0)
        fused = merge_qkv(query, other, other, heads, groups)
        query_weight, expert_key = init_mixture(query_heads(fused, heads, groups), keys, config)
        expected = mixture.of_heads(fused, keys.numpy(), groups, config)
        assert torch.equal(query_weight, expected[0]) and torch.equal(expert_key, expected[1])
        assert query_weight.shape == (routers, shape.router_width, HIDDEN)
        assert expert_key.shape == (experts * keys_per_expert(config), shape.router_width)


def test_dtypes_follow_the_queries_and_float32() -> None:
    queries, keys = random_heads(8, 4)
    query_weight, expert_key = init_mixture(queries.bfloat16(), keys.bfloat16(), RouterConfig(num_experts=4))
    assert query_weight.dtype == torch.bfloat16 and expert_key.dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**16), st.booleans())
def test_greedy_equals_the_reference(sets: int, size: int, seed: int, ties: bool) -> None:
    keys = torch.randn(sets * size, 3, generator=torch.Generator().manual_seed(seed))
    if ties:  # few distinct directions, and zeros
        keys = keys.round()
    expected, _ = mixture.sets_of_heads(list(keys.numpy()), sets, sets)
    assert group_heads(keys, sets) == expected


def test_ties_go_to_the_lowest_heads() -> None:
    assert group_heads(torch.ones(6, 3), 3) == [[0, 1], [2, 3], [4, 5]]
    assert group_heads(torch.zeros(6, 3), 2) == [[0, 1, 2], [3, 4, 5]]
    of_groups = random_heads(4, 4)[1].repeat_interleave(4, dim=0)  # whose heads share a key
    assert group_heads(of_groups, 8) == [[2 * i, 2 * i + 1] for i in range(8)]


def angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def test_greedy_takes_the_best_pair_before_the_best_sum() -> None:
    # The middle two are the likest pair, which leaves the outer two to each other.
    assert group_heads(angles(0, 40, 70, 110), 2) == [[0, 3], [1, 2]]


def test_cosine_of_a_zero_key_is_zero() -> None:
    similarity = cosine_similarity(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]]))
    assert similarity.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]


def test_fold_is_done_in_float32_whatever_the_parameters() -> None:
    weight, key = (t.bfloat16() for t in init_mixture(*random_heads(16, 8), RouterConfig(num_experts=8)))
    for pooling in POOLINGS:
        gate = fold(weight, key, pooling)
        assert gate.dtype == torch.float32
        exact = fold(weight.double(), key.double(), pooling, torch.float64)
        assert (gate - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_of_equal_scores_the_first_gets_the_gradient() -> None:
    logits = torch.zeros(1, 8, requires_grad=True)  # two routers, two experts, two keys each
    pool_logits(logits, num_experts=2, keys_per_expert=2).sum().backward()
    assert logits.grad.tolist() == [[1, 0, 1, 0, 0, 0, 0, 0]]


def test_pooling_takes_the_right_rows() -> None:
    """Rows are router by router, expert by expert, key by key."""
    routers, experts, keys = 3, 2, 4
    logits = torch.randperm(routers * experts * keys, generator=torch.Generator().manual_seed(0)).float()
    expected = [
        max(logits[(j * experts + i) * keys + c].item() for j in range(routers) for c in range(keys))
        for i in range(experts)
    ]
    assert pool_logits(logits, experts, keys).tolist() == expected
