"""The routers' first values: made from attention heads and key statistics, or drawn at random.

Symbols: L layers, H query heads, G query groups, d head size, D hidden size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.names import QKV, ROUTER
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation.ablations import alter_router
from megatron_router_upcycling.initialisation.heads import init_mixture, query_heads
from megatron_router_upcycling.key_statistics.file import KeyStats
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig


def router_parameters(model: DenseModel, router: RouterConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Global keys and shapes of the routers' parameters."""
    made = kinds.all_parameters(router, model, model.linear_bias)
    return tuple((f"{ROUTER}.{one.name}", (model.num_layers, *one.shape)) for one in made)


def router_values(
    dense: Checkpoint,
    model: DenseModel,
    router: RouterConfig,
    init: InitConfig,
    stats: KeyStats | None,
    seed: int,
    layers: Iterable[int],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each layer's router parameters, in the order of ``router_parameters`` and the model's dtype."""
    parameters = kinds.all_parameters(router, model, model.linear_bias)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if init.of_heads(router):
            assert stats is not None
            mixture = router if router.kind.of_heads else replace(router, router="mixture")
            qkv = dense.read_layer(QKV, layer, bytearray())
            queries = query_heads(qkv, model.num_attention_heads, model.num_query_groups)
            made = init_mixture(queries, _head_keys(init, stats, model, layer), mixture)
            values = dict(zip(("query_weight", "expert_key"), made, strict=True))
            if mixture is not router:
                values = mixture.kind.gate(values, mixture, model.hidden_size, torch.float64)
        else:
            values = _drawn(model, router, generator)
        values = {name: value.to(model.dtype) for name, value in values.items()}
        if init.alters_router and values:
            samples = stats.samples(layer) if init.needs_router_input and stats else []
            values = alter_router(values, router, init, seed, layer, samples)
        for parameter in parameters:
            if parameter.name not in values:  # the bias, which the paper's routers lack
                values[parameter.name] = torch.zeros(parameter.shape, dtype=model.dtype)
        yield tuple(values[parameter.name] for parameter in parameters)


def choose_head_key(init: InitConfig, stats: KeyStats, model: DenseModel) -> str:
    """Which key of a head equation 4 uses: ``mean`` (the paper's) or ``attended``, the default if several
    heads share a query group and ``stats`` has it."""
    if init.head_key == "attended" and stats.attended is None:
        raise UserError(
            "--key-stats: holds no attended keys, which --head-key attended needs; collect them again"
        )
    if init.head_key:
        return init.head_key
    shared = model.num_query_groups < model.num_attention_heads
    return "attended" if shared and stats.attended is not None else "mean"


def _head_keys(init: InitConfig, stats: KeyStats, model: DenseModel, layer: int) -> torch.Tensor:
    """The keys of a layer's heads, [H, d]."""
    if choose_head_key(init, stats, model) == "attended":
        assert stats.attended is not None
        return stats.attended[layer]
    return stats.mean[layer].repeat_interleave(model.num_attention_heads // model.num_query_groups, dim=0)


def _drawn(model: DenseModel, router: RouterConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random router, in float32; one generator draws all layers in order."""
    copies = replace(router, num_experts=router.num_copies, top_k=1, granularity=1)
    values = {}
    for parameter in router.kind.parameters(copies, model):
        value = torch.empty(parameter.shape)
        if parameter.constant is None:
            value.normal_(std=model.init_method_std, generator=generator)
        else:
            value.fill_(parameter.constant)
        if parameter.per_expert:
            value = value.repeat_interleave(router.granularity, dim=0)
        values[parameter.name] = value
    return values
