"""The routers' first values: made from attention heads and key statistics, or drawn at random.

Symbols: L layers, n experts, m routers, c keys an expert, d' router width, H query heads, G query groups,
d head size, D hidden size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_router_upcycling.checkpoint.dense import QKV, DenseModel
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.key_stats import KeyStats
from megatron_router_upcycling.qkv import split_qkv
from megatron_router_upcycling.router_config import RouterConfig
from megatron_router_upcycling.router_init import init_mixture

ROUTER = "decoder.layers.mlp.router"
DRAWN = ("linear", "switch", "mlp")  # routers whose parameters are random


def router_parameters(model: DenseModel, router: RouterConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Global keys and shapes of the routers' parameters.

    Megatron gives a router a bias where linear layers have one.
    """
    L, D, n = model.num_layers, model.hidden_size, router.num_experts
    bias = () if model.flags["disable_bias_linear"] else ((f"{ROUTER}.bias", (L, n)),)
    if router.router == "locmoe":
        return ()
    if router.router in DRAWN:
        return *((f"{ROUTER}.{name}", (L, *shape)) for name, shape in drawn_parameters(router, D)), *bias
    shape = router.shape(model.num_attention_heads, model.kv_channels)
    return (
        (f"{ROUTER}.query_weight", (L, shape.num_routers, shape.router_width, D)),
        (f"{ROUTER}.expert_key", (L, n * shape.keys_per_expert, shape.router_width)),
        *bias,
    )


def drawn_parameters(router: RouterConfig, hidden: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes, in one layer, of a random router's parameters; the last has a row for each expert."""
    if router.router == "mlp":
        return ("fc1.weight", (hidden, hidden)), ("fc2.weight", (router.num_experts, hidden))
    return (("weight", (router.num_experts, hidden)),)


def router_values(
    dense: Checkpoint,
    model: DenseModel,
    router: RouterConfig,
    stats: KeyStats | None,
    seed: int,
    scratch: bytearray,
    layers: Iterable[int],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the routers' parameters of ``layers`` in the order of ``router_parameters``, the model's dtype.

    A random router is drawn layer after layer from one generator seeded with ``seed``. A bias is
    zero: the paper's routers have none.
    """
    bias = () if model.flags["disable_bias_linear"] else (torch.zeros(router.num_experts),)
    if router.router == "locmoe":
        yield from (() for _ in layers)
        return
    if router.router in DRAWN:
        generator = torch.Generator().manual_seed(seed)
        names = drawn_parameters(
            replace(router, num_experts=router.num_copies, top_k=1, granularity=1), model.hidden_size
        )
        for _ in layers:
            values = [
                torch.empty(shape).normal_(std=model.init_method_std, generator=generator)
                for _, shape in names
            ]
            values[-1] = values[-1].repeat_interleave(router.granularity, dim=0)
            yield tuple(value.to(model.dtype) for value in (*values, *bias))
        return
    assert stats is not None
    H, G, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    for layer in layers:
        query, _, _ = split_qkv(dense.read_layer(QKV, layer, scratch), H, G)
        key_heads = stats.mean[layer].repeat_interleave(H // G, dim=0)  # [G, d] -> [H, d]
        query_weight, expert_key = init_mixture(query.unflatten(0, (H, d)), key_heads, router)
        yield tuple(value.to(model.dtype) for value in (query_weight, expert_key, *bias))
