"""A mixture made of heads: the converter's, of tensors, against the reference, by loops over numbers."""

import pytest
import torch

from megatron_router_upcycling.initialisation.heads import init_mixture
from megatron_router_upcycling.routers.config import GROUPINGS, RouterConfig
from tests.reference import mixture
from tests.reference.fused import merge_qkv

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
        (14, 14, 4, 8, 8),  # each head in four routers of seven
        (12, 2, 4, 8, 16),  # each in two routers of three, and in four keys
        (28, 4, 4, 8, 8),
        (6, 6, 4, 8, 8),  # where heads have been together in every way
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
        query, other = (torch.randn(count * size, HIDDEN, generator=generator) for count in (heads, groups))
        keys = mean.repeat_interleave(heads // groups, 0)
        made = init_mixture(query.unflatten(0, (heads, size)), keys, config)
        fused = merge_qkv(query, other, other, heads, groups)
        for found, wanted in zip(made, mixture.of_heads(fused, keys.numpy(), groups, config), strict=True):
            assert torch.equal(found, wanted)
