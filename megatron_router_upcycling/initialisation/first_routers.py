"""The routers' first values: made from attention heads and key statistics, or drawn at random.

Symbols: L layers, n experts, m routers, c keys an expert, d' router width, H query heads, G query groups,
d head size, D hidden size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.names import NORMS, QKV, ROUTER
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.initialisation.ablations import alter_router
from megatron_router_upcycling.initialisation.heads import init_mixture
from megatron_router_upcycling.initialisation.qkv import split_qkv
from megatron_router_upcycling.key_statistics.file import KeyStats, read_router_input

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
    init: InitConfig,
    stats: tuple[KeyStats, Path] | None,
    seed: int,
    scratch: bytearray,
    layers: Iterable[int],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the routers' parameters of ``layers`` in the order of ``router_parameters``, the model's dtype.

    A bias is zero: the paper's routers have none.
    """
    if router.router == "locmoe":
        yield from (() for _ in layers)
        return
    bias = () if model.flags["disable_bias_linear"] else (torch.zeros(router.num_experts, dtype=model.dtype),)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if router.router == "mixture":
            assert stats is not None
            values = _of_heads(dense, model, router, stats[0], scratch, layer)
        else:
            values = _drawn(model, router, generator)
        values = {name: value.to(model.dtype) for name, value in values.items()}
        if init.alters_router:
            gains = norm_gains(dense, model, layer, scratch) if init.norm_gain else None

            def inputs(layer: int = layer) -> torch.Tensor:
                assert stats is not None
                return read_router_input(stats[1], layer)

            values = alter_router(values, router, init, seed, layer, gains, inputs)
        yield (*values.values(), *bias)


def _of_heads(
    dense: Checkpoint,
    model: DenseModel,
    router: RouterConfig,
    stats: KeyStats,
    scratch: bytearray,
    layer: int,
) -> dict[str, torch.Tensor]:
    H, G, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    query, _, _ = split_qkv(dense.read_layer(QKV, layer, scratch), H, G)
    key_heads = stats.mean[layer].repeat_interleave(H // G, dim=0)  # [G, d] -> [H, d]
    query_weight, expert_key = init_mixture(query.unflatten(0, (H, d)), key_heads, router)
    return {"query_weight": query_weight, "expert_key": expert_key}


def _drawn(model: DenseModel, router: RouterConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random router, in float32; one layer after the other comes from one generator."""
    copies = replace(router, num_experts=router.num_copies, top_k=1, granularity=1)
    values = {
        name: torch.empty(shape).normal_(std=model.init_method_std, generator=generator)
        for name, shape in drawn_parameters(copies, model.hidden_size)
    }
    name, value = values.popitem()
    return values | {name: value.repeat_interleave(router.granularity, dim=0)}


def norm_gains(
    dense: Checkpoint, model: DenseModel, layer: int, scratch: bytearray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains [D] of a layer's norms before attention and before the FFN, as they multiply."""
    gains = []
    for names in NORMS:
        key = next(name for name in names if name in dense.tensors)
        gain = dense.read_layer(key, layer, scratch).double()
        gains.append(gain + bool(model.flags.get("apply_layernorm_1p")))
    return gains[0], gains[1]
