"""A mixture of routers of attention heads, by loops over numbers (arXiv 2509.00679, section 3.2 and 5.2).

Symbols: H query heads, G query groups, d head size, D hidden size, m routers, n experts.
"""

import math

import numpy as np
import torch

from megatron_router_upcycling.routers.config import RouterConfig

DECIMALS = 12  # similarities closer than this are a tie, which the lower index wins

Vector = np.ndarray
Sets = list[list[int]]


def of_heads(
    fused: torch.Tensor, head_keys: Vector, num_groups: int, router: RouterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's query_weight [m, d', D] and expert_key [n*c, d'] (eq. 4, 5).

    ``fused`` is the query-key-value projection [(H + 2G)*d, D]: group after group, its query heads, its key,
    its value. ``head_keys``, float32 [H, d], has the key of each query head.
    """
    assert router.num_routers is not None
    num_heads, head_size = head_keys.shape
    heads_a_group = num_heads // num_groups
    # More routers than heads: every head is cut, where that comes out even.
    parts = 1 if router.num_routers % num_heads else max(1, router.num_routers // num_heads)
    size = head_size // parts
    queries, keys = [], []
    for head in range(num_heads):
        group, place = divmod(head, heads_a_group)
        row = (group * (heads_a_group + 2) + place) * head_size
        for part in range(parts):
            queries.append(fused[row + part * size : row + (part + 1) * size])
            keys.append(head_keys[head, part * size : (part + 1) * size])
    num_copies = router.num_experts // router.granularity
    query_sets, key_sets = sets_of_heads(keys, router.num_routers, num_copies)
    vectors = [np.concatenate([keys[i] for i in members]) for members in key_sets]
    a_copy = len(vectors) // num_copies
    shards = [
        vectors[copy * a_copy + i]
        for copy in range(num_copies)
        for _ in range(router.granularity)  # which begin with equal keys
        for i in range(a_copy)
    ]
    query_weight = torch.stack([torch.cat([queries[i] for i in members]) for members in query_sets])
    return query_weight, torch.from_numpy(np.stack(shards))


def sets_of_heads(keys: list[Vector], num_routers: int, num_experts: int) -> tuple[Sets, Sets]:
    """The (parts of) heads that each router, and each key, is made of."""
    vectors = [key.astype(np.float64) for key in keys]
    similar = _similarities(vectors)
    if len(vectors) % num_routers:
        sets = _in_rounds(vectors, similar, num_routers, max(num_routers, num_experts))
        return sets[:num_routers], sets
    query_sets = _group(vectors, similar, num_routers)
    if num_experts <= num_routers:
        return query_sets, query_sets
    times = num_experts // num_routers  # every head several times, so that there is a key for every expert
    copies = [index // times for index in range(len(vectors) * times)]
    of_copies = [[similar[i][j] for j in copies] for i in copies]
    key_sets = _group([vectors[i] for i in copies], of_copies, num_experts)
    return query_sets, [[copies[i] for i in members] for members in key_sets]


def _in_rounds(vectors: list[Vector], similar: list[list[float]], num_routers: int, num_sets: int) -> Sets:
    """Rounds of gcd(H, m) sets with every head in one of them, until there are ``num_sets``."""
    H = len(vectors)
    a_round = math.gcd(H, num_routers)
    size = H // a_round
    sets = _group(vectors, similar, a_round)
    while len(sets) < num_sets:

        def cost(i: int, others: list[int]) -> tuple[int, float]:
            shared = sum(1 for known in sets for j in others if i in known and j in known)  # noqa: B023
            likeness = math.fsum(similar[i][j] for j in others)
            return shared, -round(likeness, DECIMALS)

        left, made = list(range(H)), []
        while left:
            first = min((cost(j, [i]), i, j) for i in left for j in left if i < j)
            members = [first[1], first[2]]
            while len(members) < size:
                rest = [i for i in left if i not in members]
                members.append(min(rest, key=lambda i: (cost(i, members), i)))  # noqa: B023
            left = [i for i in left if i not in members]
            made.append(sorted(members))
        made.sort()
        for one in range(a_round):
            for other in range(a_round):
                if one == other or made[one] not in sets:
                    continue
                for a in list(made[one]):
                    for b in list(made[other]):
                        changed = [
                            sorted([i for i in made[one] if i != a] + [b]),
                            sorted([i for i in made[other] if i != b] + [a]),
                        ]
                        if made[one] in sets and changed[0] not in sets and changed[1] not in sets:
                            made[one], made[other] = changed
        sets = sets + sorted(made)
    return sets


def _cosine(a: Vector, b: Vector) -> float:
    lengths = math.sqrt(math.fsum((a * a).tolist())) * math.sqrt(math.fsum((b * b).tolist()))
    return round(math.fsum((a * b).tolist()) / lengths, DECIMALS) if lengths else 0.0


def _similarities(vectors: list[Vector]) -> list[list[float]]:
    table = [[0.0] * len(vectors) for _ in vectors]
    for i, a in enumerate(vectors):
        for j in range(i + 1):
            table[i][j] = table[j][i] = _cosine(a, vectors[j])
    return table


def _mean(vectors: list[Vector]) -> Vector:
    return sum(vectors[1:], vectors[0]) / len(vectors)


def _group(vectors: list[Vector], similar: list[list[float]], num_sets: int) -> Sets:
    """Sets of equal size, by merging 2 (or an odd prime number of) sets at a time."""
    size = len(vectors) // num_sets
    sets = [[i] for i in range(len(vectors))]
    while len(sets) > num_sets:
        factor = next(p for p in range(2, size + 1) if size % p == 0)
        size //= factor
        means = [_mean([vectors[i] for i in members]) for members in sets]
        if len(sets) < len(vectors):
            similar = _similarities(means)
        merged = _greedy(means, similar, factor)
        sets = sorted(sorted(head for i in together for head in sets[i]) for together in merged)
    return sets


def _greedy(means: list[Vector], similar: list[list[float]], count: int) -> Sets:
    """The most similar free pair, joined by the free sets nearest to the mean until there are ``count``."""
    free, merged = set(range(len(means))), []
    pairs = [(i, j) for i in range(len(means)) for j in range(i + 1, len(means))]
    for i, j in sorted(pairs, key=lambda pair: (-similar[pair[0]][pair[1]], *pair)):
        if not {i, j} <= free:
            continue
        together = [i, j]
        while len(together) < count:
            mean = _mean([means[k] for k in together])
            rest = free - set(together)
            together.append(max(rest, key=lambda k: (_cosine(mean, means[k]), -k)))  # noqa: B023
        free -= set(together)
        merged.append(together)
    return merged
