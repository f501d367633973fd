"""Heads into a mixture of routers, against references written as loops over plain Python numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.heads import cosine_similarity, group_heads, init_mixture
from megatron_router_upcycling.routers.config import POOLINGS, RouterConfig
from megatron_router_upcycling.routers.fold import fold, pool_logits
from megatron_router_upcycling.routers.kinds import keys_per_expert

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
TABLE_IDS = [f"H{H}-m{m}-n{n}" for H, _, m, n in TABLE]


def random_heads(heads: int, head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Query projections [H, d, D] and keys [H, d]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, head_dim, HIDDEN, generator=generator),
        torch.randn(heads, head_dim, generator=generator),
    )


def reference_cosine(a: list[float], b: list[float]) -> float:
    norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    if norm_a == 0 or norm_b == 0:
        return 0.0
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b), 12)


def reference_mean(keys: list[list[float]]) -> list[float]:
    return [sum(column) / len(keys) for column in zip(*keys, strict=True)]


def reference_groups(keys: list[list[float]], num_sets: int) -> list[list[int]]:
    """Greedy grouping, one merge at a time."""
    sets = [[h] for h in range(len(keys))]
    size, factors = len(keys) // num_sets, []
    for p in range(2, size + 1):
        while size % p == 0:
            factors.append(p)
            size //= p
    for p in factors:
        means = [reference_mean([keys[h] for h in members]) for members in sets]
        free = list(range(len(sets)))
        merged = []
        while free:
            best, seed = -2.0, (-1, -1)
            for i in free:
                for j in free:
                    if i < j and reference_cosine(means[i], means[j]) > best:
                        best, seed = reference_cosine(means[i], means[j]), (i, j)
            chosen = list(seed)
            while len(chosen) < p:
                centre = reference_mean([means[i] for i in chosen])
                best, nearest = -2.0, -1
                for i in free:
                    if i not in chosen and reference_cosine(centre, means[i]) > best:
                        best, nearest = reference_cosine(centre, means[i]), i
                chosen.append(nearest)
            free = [i for i in free if i not in chosen]
            merged.append(sorted(h for i in chosen for h in sets[i]))
        sets = sorted(merged, key=lambda members: members[0])
    return sets


def reference_mixture(
    queries: torch.Tensor, keys: torch.Tensor, m: int, n: int
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """query_weight and expert_key as nested lists, by the rules of section 5.2.1 taken one by one."""
    head_rows = [[row.tolist() for row in head] for head in queries]
    head_keys = [key.tolist() for key in keys]
    if m > len(head_keys):
        splits = m // len(head_keys)
        part = len(head_keys[0]) // splits
        head_rows = [rows[p * part : (p + 1) * part] for rows in head_rows for p in range(splits)]
        head_keys = [key[p * part : (p + 1) * part] for key in head_keys for p in range(splits)]
    query_sets = reference_groups(head_keys, m)
    if m < n:
        owner = [h for h in range(len(head_keys)) for _ in range(n // m)]
        key_sets = [
            [owner[copy] for copy in members]
            for members in reference_groups([head_keys[h] for h in owner], n)
        ]
    else:
        key_sets = query_sets
    weight = [[row for h in members for row in head_rows[h]] for members in query_sets]
    expert_key = [[x for h in members for x in head_keys[h]] for members in key_sets]
    return weight, expert_key


def reference_scores(
    x: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, num_experts: int, pooling: str
) -> torch.Tensor:
    """Eq. 6-8 as the paper writes them: S_i^j = (W^j x) . K_i / sqrt(d'), pooled over j, then over keys."""
    keys = len(key) // num_experts
    experts = []
    for i in range(num_experts):
        scores_of_keys = []
        for c in range(keys):
            scores = []
            for router in weight:
                query = x @ router.T
                scores.append(query @ key[i * keys + c] / math.sqrt(key.shape[1]))
            pooled = scores[0]
            for score in scores[1:]:
                pooled = pooled + score if pooling == "sum" else torch.maximum(pooled, score)
            scores_of_keys.append(pooled)
        best = scores_of_keys[0]
        for score in scores_of_keys[1:]:
            best = torch.maximum(best, score)
        experts.append(best)
    return torch.stack(experts, dim=-1)


@pytest.mark.parametrize("heads, head_dim, m, n", TABLE, ids=TABLE_IDS)
def test_mixture_equals_the_reference_bit_for_bit(heads: int, head_dim: int, m: int, n: int) -> None:
    for seed in range(3):
        queries, keys = random_heads(heads, head_dim, seed)
        config = RouterConfig(num_experts=n, num_routers=m)
        query_weight, expert_key = init_mixture(queries, keys, config)
        weight, key = reference_mixture(queries, keys, m, n)
        shape = config.shape(heads, head_dim)
        assert query_weight.shape == (m, shape.router_width, HIDDEN)
        assert expert_key.shape == (n * keys_per_expert(config), shape.router_width)
        assert torch.equal(query_weight, torch.tensor(weight))
        assert torch.equal(expert_key, torch.tensor(key))


def test_keys_of_a_query_group_are_equal_and_its_heads_merge() -> None:
    """Grouped-query attention: the four heads of a group share one key, and ties go by head index."""
    queries, _ = random_heads(16, 4)
    keys = random_heads(4, 4)[1].repeat_interleave(4, dim=0)
    weight, key = reference_mixture(queries, keys, 8, 8)
    query_weight, expert_key = init_mixture(queries, keys, RouterConfig(num_experts=8))
    assert torch.equal(query_weight, torch.tensor(weight)) and torch.equal(expert_key, torch.tensor(key))
    assert group_heads(keys, 8, "greedy") == [[2 * i, 2 * i + 1] for i in range(8)]


def test_as_many_routers_as_heads_and_more_experts_start_with_twin_keys() -> None:
    queries, keys = random_heads(4, 4)
    _, expert_key = init_mixture(queries, keys, RouterConfig(num_experts=8, num_routers=4))
    assert torch.equal(expert_key, keys.repeat_interleave(2, dim=0))


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
    assert group_heads(keys, sets, "greedy") == reference_groups(keys.tolist(), sets)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["greedy", "optimal", "consecutive"]),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 2**16),
)
def test_sets_are_ordered_and_hold_every_head_once(grouping: str, sets: int, size: int, seed: int) -> None:
    keys = torch.randn(sets * size, 4, generator=torch.Generator().manual_seed(seed))
    groups = group_heads(keys, sets, grouping)
    assert [len(members) for members in groups] == [size] * sets
    assert sorted(head for members in groups for head in members) == list(range(sets * size))
    assert all(members == sorted(members) for members in groups) and groups == sorted(groups)


def test_ties_go_to_the_lowest_heads() -> None:
    assert group_heads(torch.ones(6, 3), 3, "greedy") == [[0, 1], [2, 3], [4, 5]]
    assert group_heads(torch.zeros(6, 3), 2, "greedy") == [[0, 1, 2], [3, 4, 5]]


def angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def test_greedy_takes_the_best_pair_and_optimal_the_best_sum() -> None:
    # The middle two are the likest pair, which leaves the outer two to each other.
    keys = angles(0, 40, 70, 110)
    assert group_heads(keys, 2, "greedy") == [[0, 3], [1, 2]]
    assert group_heads(keys, 2, "optimal") == [[0, 1], [2, 3]]
    assert group_heads(keys, 2, "consecutive") == [[0, 1], [2, 3]]


@pytest.mark.parametrize("seed", range(4))
def test_optimal_has_the_largest_sum_of_all_pairings(seed: int) -> None:
    keys = random_heads(8, 3, seed)[1]
    similarity = cosine_similarity(keys).tolist()

    def total(pairs: list[list[int]]) -> float:
        return sum(similarity[i][j] for i, j in pairs)

    best = max(
        total([list(order[k : k + 2]) for k in range(0, 8, 2)]) for order in itertools.permutations(range(8))
    )
    assert total(group_heads(keys, 4, "optimal")) == pytest.approx(best, abs=1e-9)


def test_cosine_of_a_zero_key_is_zero() -> None:
    similarity = cosine_similarity(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]]))
    assert similarity.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_is_not_finite_is_the_users_error(bad: float) -> None:
    queries, keys = random_heads(4, 4)
    keys[2, 1] = bad
    with pytest.raises(UserError, match="--key-stats: .* head 2 "):
        init_mixture(queries, keys, RouterConfig(num_experts=2))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("heads, head_dim, m, n", TABLE, ids=TABLE_IDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=str)
def test_folded_scores_and_gradients_equal_the_direct_form(
    dtype: torch.dtype, tolerance: float, heads: int, head_dim: int, m: int, n: int, pooling: str
) -> None:
    """``tolerance`` is relative to the largest entry: some tens of roundings of the dtype."""
    config = RouterConfig(num_experts=n, num_routers=m, pooling=pooling)
    start = init_mixture(*random_heads(heads, head_dim), config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, 7, HIDDEN, generator=generator, dtype=dtype)
    grad_scores = torch.randn(3, 7, n, generator=generator, dtype=dtype)

    def run(folded: bool) -> list[torch.Tensor]:
        x, weight, key = (t.detach().to(dtype).requires_grad_() for t in (tokens, *start))
        if folded:
            gate = fold(weight, key, pooling, dtype)
            scores = pool_logits(x @ gate.T, n, keys_per_expert(config))
        else:
            scores = reference_scores(x, weight, key, n, pooling)
        return [scores.detach(), *torch.autograd.grad(scores, (x, weight, key), grad_scores)]

    for found, expected in zip(run(folded=True), run(folded=False), strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


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
