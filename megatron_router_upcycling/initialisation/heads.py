"""Build a mixture of routers from attention heads (arXiv 2509.00679, section 3.2 and 5.2).

Pure torch: group a layer's heads by the similarity of their average keys, merge each set's query projections
into a router's query map W^j and each set's keys into an expert's key K_i.

Symbols: T tokens, D hidden size, H query heads, d head size, m routers, n experts, c keys an expert,
d' router width. ``RouterConfig.shape`` holds the rules that give d' and c.
"""

import itertools

import torch
from torch import Tensor

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig

# Similarities are rounded to these, so that ties do not depend on the order of summation.
SIMILARITY_DECIMALS = 12

Sets = list[list[int]]


def query_heads(qkv: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """The query projection by head, [H, d, D], of Megatron's fused ``linear_qkv`` [(H + 2G) * d, D].

    For each of G query groups it holds H/G query heads, then the key, then the value.
    """
    queries = num_heads // num_groups
    by_group = qkv.unflatten(0, (num_groups, queries + 2, -1))  # [G, H/G + 2, d, D]
    return by_group[:, :queries].flatten(0, 1)


def init_mixture(query_heads: Tensor, key_heads: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Initial parameters of one layer's mixture of routers (paper, eq. 4 and 5).

    If m > H, every head is split first. If m < n, the n keys come from groups of n/m copies of every head,
    while the query maps come from the heads themselves. Copies of a head are most similar to each other and
    merge first; if m = H nothing else merges, and the n/m experts of one head start with equal keys. If m
    does not divide H, every head is part of several routers, of each once (``overlapping_sets``).

    ``query_heads`` [H, d, D] are the rows of the query projection by head, ``key_heads`` [H, d] each head's
    average key. Returns query_weight [m, d', D] in the dtype of ``query_heads``, and expert_key [n*c, d'] in
    float32, of which expert i owns rows i*c .. i*c + c-1. With granularity G, the keys of each of n copies
    are repeated G times: n*G*c rows.
    """
    num_heads, head_dim, hidden = query_heads.shape
    assert key_heads.shape == (num_heads, head_dim)
    shape = config.shape(num_heads, head_dim)
    query_parts = split_heads(query_heads, shape.head_splits)
    key_parts = split_heads(key_heads.float(), shape.head_splits)

    copies = max(1, shape.num_experts // shape.num_routers)
    if shape.head_copies > 1:
        num_sets = shape.num_routers * copies
        key_sets = overlapping_sets(key_parts, num_sets, shape.heads_per_set)
        query_sets = key_sets[: shape.num_routers]
    else:
        query_sets = key_sets = group_heads(key_parts, shape.num_routers)
    if shape.head_copies == 1 and copies > 1:
        copied = group_heads(key_parts.repeat_interleave(copies, dim=0), shape.num_experts)
        key_sets = [[copy // copies for copy in members] for members in copied]

    query_weight = query_parts[torch.tensor(query_sets)]  # [m, heads a set, d / splits, D]
    expert_key = key_parts[torch.tensor(key_sets)]
    expert_key = expert_key.reshape(shape.num_experts, -1, shape.router_width)  # [n, c, d']
    return (
        query_weight.reshape(shape.num_routers, shape.router_width, hidden),
        expert_key.repeat_interleave(config.granularity, dim=0).flatten(0, 1),
    )


def split_heads(heads: Tensor, parts: int) -> Tensor:
    """Cut each head's d rows, [H, d, ...] -> [H*parts, d/parts, ...]; a head's parts are adjacent."""
    num_heads, head_dim = heads.shape[:2]
    return heads.reshape(num_heads * parts, head_dim // parts, *heads.shape[2:])


def cosine_similarity(keys: Tensor) -> Tensor:
    """Cosine similarity of every two keys, [H, d] -> [H, H] in float64; 0 if a key is zero."""
    keys = keys.double()
    norm = keys.norm(dim=1, keepdim=True)
    unit = keys / norm.where(norm > 0, 1.0)
    # Each dot product is summed by itself, so that equal keys have equal similarities; a blocked matrix
    # product does not guarantee that.
    return torch.stack([(unit * row).sum(dim=1) for row in unit]).round(decimals=SIMILARITY_DECIMALS)


def group_heads(keys: Tensor, num_sets: int) -> Sets:
    """Group heads into sets of equal size by the cosine similarity of their keys (section 3.2).

    Sets are merged by their mean keys, once for each prime factor of the final size, small factors first:
    single heads into pairs, pairs into larger sets.

    Merging is greedy: all pairs by falling similarity, ties by head index, each taken if both are free. An
    odd prime factor p merges p sets at a time: the best free pair, then the free set most similar to the mean
    of those chosen, until there are p.

    From keys [H, d] to ``num_sets`` sets of head indices: heads in a set in index order, sets by their first.
    """
    num_heads = len(keys)
    assert num_heads % num_sets == 0
    keys = keys.double()
    sets = [[head] for head in range(num_heads)]
    for prime in _prime_factors(num_heads // num_sets):
        means = torch.stack([keys[members].mean(dim=0) for members in sets])
        merged = _greedy_merge(means, prime)
        sets = sorted(sorted(head for i in chosen for head in sets[i]) for chosen in merged)
    return sets


def overlapping_sets(keys: Tensor, num_sets: int, size: int) -> Sets:
    """More than H / size sets of ``size`` heads, in rounds in which each head is used once.

    The first round is ``group_heads``. Further rounds also merge greedily, but prefer the heads that have
    been in the fewest sets together, and among these the most similar ones. No two sets are equal.

    From keys [H, d] to ``num_sets`` different sets, a multiple of H / size, which is whole and above 1.
    """
    sets = made = group_heads(keys, len(keys) // size)
    similarity = cosine_similarity(keys).tolist()
    together = [[0] * len(keys) for _ in keys]  # sets that two heads have in common
    while len(sets) < num_sets:
        for members in made:
            for a, b in itertools.permutations(members, 2):
                together[a][b] += 1
        made = _exchange_known(_least_together(similarity, together, size), sets, num_sets)
        sets = sets + made
    return sets


def _least_together(similarity: list[list[float]], together: list[list[int]], size: int) -> Sets:
    """Sets of ``size`` heads, each head in one: a seed pair, then one head after the other.

    Chosen is the pair, then the head to join the set, that has the fewest sets in common, then the largest
    (sum of) similarities, then the lowest index.
    """

    def rank(head: int, members: list[int]) -> tuple[int, float]:
        likeness = sum(similarity[head][member] for member in members)
        return sum(together[head][member] for member in members), -round(likeness, SIMILARITY_DECIMALS)

    free = set(range(len(together)))
    made = []
    while free:
        pairs = [(rank(j, [i]), i, j) for i, j in itertools.combinations(sorted(free), 2)]
        members = list(min(pairs)[1:])
        free -= set(members)
        while len(members) < size:
            best = min(sorted(free), key=lambda head: rank(head, members))  # noqa: B023 - used at once
            members.append(best)
            free.remove(best)
        made.append(sorted(members))
    return sorted(made)


def _exchange_known(made: Sets, known: Sets, num_sets: int) -> Sets:
    """Exchange heads between sets of ``made`` until none is in ``known``: the first exchange that works."""
    for first, second in itertools.permutations(range(len(made)), 2):
        for a, b in itertools.product(made[first], made[second]) if made[first] in known else ():
            swapped = [sorted({*made[first], b} - {a}), sorted({*made[second], a} - {b})]
            if not any(members in known for members in swapped):
                made[first], made[second] = swapped
                break
    if any(members in known for members in made):
        raise UserError(f"--num-routers: heads cannot be put into {num_sets} different sets; give fewer")
    return sorted(made)


def _prime_factors(number: int) -> list[int]:
    """Prime factors in rising order, repeated: 12 -> [2, 2, 3]."""
    factors, prime = [], 2
    while number > 1:
        while number % prime == 0:
            factors.append(prime)
            number //= prime
        prime += 1
    return factors


def _greedy_merge(keys: Tensor, count: int) -> Sets:
    """Greedy sets of ``count``: a seed pair, then the most similar to the running mean; ties by index."""
    free = set(range(len(keys)))
    chosen = []
    similarity = cosine_similarity(keys).tolist()
    pairs = itertools.combinations(range(len(keys)), 2)  # by i, then j; sorting is stable
    for i, j in sorted(pairs, key=lambda pair: -similarity[pair[0]][pair[1]]):
        if i not in free or j not in free:
            continue
        members = [i, j]
        free -= {i, j}
        while len(members) < count:
            candidates = sorted(free)
            mean = keys[members].mean(dim=0, keepdim=True)
            to_mean = cosine_similarity(torch.cat((mean, keys[candidates])))[0, 1:].tolist()
            best = candidates[to_mean.index(max(to_mean))]
            members.append(best)
            free.remove(best)
        chosen.append(members)
    return chosen
