"""A mixture of routers computed again, by loops over numbers (arXiv 2509.00679, section 3.2 and 5.2).

Written from the paper and not from ``router_init``, with which it shares nothing: what one gets wrong the
other does not repeat. Says which rows of the query projection and which numbers of the average keys every
router parameter is, so that nothing needs to be computed beyond grouping.

Symbols: H query heads, G query groups, d head size, m routers, n experts.
"""

import math
from dataclasses import dataclass

import numpy as np

DECIMALS = 12  # similarities closer than this are a tie, which the lower index wins

Vector = np.ndarray
Sets = list[list[int]]


@dataclass(frozen=True)
class Rows:
    """``count`` rows of head ``head`` from its row ``first`` on: a head, or a part of one."""

    head: int
    first: int
    count: int


@dataclass(frozen=True)
class LayerSources:
    """What a layer's routers are made of: for each router, and for each key, the rows it consists of."""

    queries: list[list[Rows]]
    keys: list[list[Rows]]


def layer_sources(
    mean_keys: Vector, num_heads: int, num_routers: int, num_experts: int, grouping: str
) -> LayerSources:
    """Group one layer's heads.

    Args:
        mean_keys: float32 [G, d], the average key of each query group.
    """
    num_groups, head_size = mean_keys.shape
    parts = max(1, num_routers // num_heads)  # more routers than heads: every head is cut
    size = head_size // parts
    pieces: list = []
    vectors: list = []
    for head in range(num_heads):
        group = head * num_groups // num_heads
        for part in range(parts):
            pieces.append(Rows(head, part * size, size))
            vectors.append(mean_keys[group, part * size : (part + 1) * size].astype(np.float64))
    similar = _similarities(vectors)
    query_sets = _group(vectors, similar, num_routers, grouping)
    key_sets = query_sets
    if num_experts > num_routers:  # every head several times, so that there is a key for every expert
        times = num_experts // num_routers
        copies = [index // times for index in range(len(vectors) * times)]
        of_copies = [[similar[i][j] for j in copies] for i in copies]
        key_sets = _group([vectors[i] for i in copies], of_copies, num_experts, grouping)
        key_sets = [[copies[i] for i in members] for members in key_sets]
    return LayerSources(
        [[pieces[i] for i in members] for members in query_sets],
        [[pieces[i] for i in members] for members in key_sets],
    )


def fused_row(rows: Rows, num_heads: int, num_groups: int, head_size: int) -> int:
    """Where ``rows`` begin in Megatron's fused query-key-value projection of a layer.

    Group after group: the group's query heads, its key, its value.
    """
    heads_a_group = num_heads // num_groups
    group, place = divmod(rows.head, heads_a_group)
    return (group * (heads_a_group + 2) + place) * head_size + rows.first


def key_values(rows: Rows, mean_keys: Vector, num_heads: int) -> Vector:
    """The numbers of the average keys that ``rows`` stand for, float32."""
    group = rows.head * len(mean_keys) // num_heads
    return mean_keys[group, rows.first : rows.first + rows.count]


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


def _group(vectors: list[Vector], similar: list[list[float]], num_sets: int, grouping: str) -> Sets:
    """Sets of equal size, by merging 2 (or an odd prime number of) sets at a time."""
    size = len(vectors) // num_sets
    if grouping == "consecutive":
        return [list(range(i * size, (i + 1) * size)) for i in range(num_sets)]
    sets = [[i] for i in range(len(vectors))]
    while len(sets) > num_sets:
        factor = next(p for p in range(2, size + 1) if size % p == 0)
        size //= factor
        means = [_mean([vectors[i] for i in members]) for members in sets]
        if len(sets) < len(vectors):
            similar = _similarities(means)
        if factor == 2:
            merged = _matching(similar) if grouping == "optimal" else _greedy(means, similar, 2)
        else:
            merged = _greedy(means, similar, factor)
        sets = sorted(sorted(head for i in together for head in sets[i]) for together in merged)
    return sets


def _ranked(similar: list[list[float]]) -> list[tuple[int, int]]:
    count = len(similar)
    ranked = [(-similar[i][j], i, j) for i in range(count) for j in range(i + 1, count)]
    return [(i, j) for _, i, j in sorted(ranked)]


def _greedy(means: list[Vector], similar: list[list[float]], count: int) -> Sets:
    """The most similar free pair, joined by the free sets nearest to the mean until there are ``count``."""
    free = [True] * len(means)
    merged = []
    for i, j in _ranked(similar):
        if not (free[i] and free[j]):
            continue
        together = [i, j]
        free[i] = free[j] = False
        while len(together) < count:
            mean = _mean([means[k] for k in together])
            best = max((k for k in range(len(means)) if free[k]), key=lambda k: (_cosine(mean, means[k]), -k))
            together.append(best)
            free[best] = False
        merged.append(together)
    return merged


def _matching(similar: list[list[float]]) -> Sets:
    import networkx  # type: ignore[import-untyped]

    graph = networkx.Graph()
    for i, j in _ranked(similar):
        graph.add_edge(i, j, weight=round(similar[i][j] * 10**DECIMALS))
    return [list(pair) for pair in networkx.max_weight_matching(graph, maxcardinality=True)]
