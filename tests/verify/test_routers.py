"""The routers that verify computes by loops, against those that the converter makes of tensors."""

import numpy as np
import pytest
import torch

from megatron_router_upcycling.config.router import GROUPINGS, RouterConfig
from megatron_router_upcycling.initialisation.heads import init_mixture
from tests.reference.routers import fused_row, key_values, layer_sources

HIDDEN = 3


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "routers", "experts"),
    [
        (16, 16, 8, 8, 8),  # pairs
        (16, 4, 8, 8, 8),  # ties among the heads of a group
        (16, 4, 8, 2, 8),  # m < n: every head four times
        (16, 8, 8, 16, 8),  # m > n: two keys an expert
        (16, 16, 8, 32, 8),  # m > H: half heads
        (12, 4, 8, 4, 4),  # sets of three
        (12, 12, 8, 1, 2),  # one set of all, sets of six
        (20, 4, 4, 4, 4),  # sets of five
        (8, 2, 4, 8, 32),  # m = H < n: keys of one head
    ],
)
def test_loops_and_tensors_agree(
    grouping: str, heads: int, groups: int, size: int, routers: int, experts: int
) -> None:
    config = RouterConfig(num_experts=experts, num_routers=routers, grouping=grouping, top_k=1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(groups, size, generator=generator)
        if seed == 4:
            mean[0] = 0  # similar to none
        query = torch.randn(heads, size, HIDDEN, generator=generator)
        made, keys = init_mixture(query, mean.repeat_interleave(heads // groups, 0), config)
        sources = layer_sources(mean.numpy(), heads, routers, experts, grouping)
        for j, members in enumerate(sources.queries):
            rows = [query[part.head, part.first + i] for part in members for i in range(part.count)]
            assert torch.equal(made[j], torch.stack(rows))
        for i, members in enumerate(sources.keys):
            values = [key_values(part, mean.numpy(), heads) for part in members]
            assert np.array_equal(keys[i].numpy(), np.concatenate(values))


def test_rows_of_the_fused_projection() -> None:
    """Group after group: query heads, key, value; two groups of two heads of size 3."""
    order = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    means = np.ones((2, 3), np.float32)
    for head, rows in enumerate(layer_sources(means, 4, 4, 4, "consecutive").queries):
        assert fused_row(rows[0], 4, 2, 3) == 3 * order.index(f"q{head}")
    halves = layer_sources(np.ones((2, 4), np.float32), 4, 8, 8, "consecutive").queries
    assert [fused_row(rows[0], 4, 2, 4) for rows in halves[:4]] == [0, 2, 4, 6]
