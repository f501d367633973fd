"""All tensors of a Mixture-of-Experts, made of all tensors of a dense model at once."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.routers.config import RouterConfig
from tests.reference import ablations, mixture

LAYERS = "decoder.layers."
ROUTER = "decoder.layers.mlp.router."
FC1, FC2 = "decoder.layers.mlp.linear_fc1.", "decoder.layers.mlp.linear_fc2."
QKV = "decoder.layers.self_attention.linear_qkv.weight"
# Both names of the norm before the FFN: with Transformer Engine in a dense layer, and elsewhere.
NORMS = ("decoder.layers.mlp.linear_fc1.layer_norm_", "decoder.layers.pre_mlp_layernorm.")
Tensors = dict[str, Tensor]


class Job(NamedTuple):
    args: Namespace  # Megatron's
    router: RouterConfig
    init: InitConfig
    seed: int


def upcycle(
    dense: Tensors,
    args: Namespace,
    router: RouterConfig,
    init: InitConfig,
    head_keys: Tensor,
    router_input: Tensor,
    seed: int,
    shared_expert: bool = False,
    layers: Sequence[int] | None = None,
) -> Tensors:
    """Every tensor by its name, of ``dense`` stacked over layers, ``head_keys`` [L, H, d], inputs [L, S, D].

    ``layers`` get experts, each layer having names of its own; None: all, stacked.
    """
    job, num_layers = Job(args, router, init, seed), args.num_layers
    moe = with_experts(dense, job, shared_expert)
    made = routers(dense, job, head_keys, router_input, layers or range(num_layers))
    if layers is None:
        return moe | {ROUTER + name: torch.stack(list(values.values())) for name, values in made.items()}
    apart = {key: value for key, value in dense.items() if not key.startswith(LAYERS)}
    for layer in range(num_layers):
        for key, value in (moe if layer in layers else dense).items():
            if key.startswith(LAYERS):
                apart[key.replace(LAYERS, f"{LAYERS}{layer}.")] = value[layer]
    for name, values in made.items():
        for layer, parameter in values.items():
            apart[f"{LAYERS}{layer}.mlp.router.{name}"] = parameter
    return apart


def with_experts(dense: Tensors, job: Job, shared_expert: bool) -> Tensors:
    """All but the routers, where every layer has experts (eq. 3)."""
    made: Tensors = {}
    for key, value in dense.items():
        if key.startswith((FC1, FC2)) and "layer_norm" not in key:
            linear, parameter = key.split(".")[-2:]
            numbers = range(job.router.num_experts)
            experts = [
                torch.stack([expert(key, weight, job, number) for number in numbers]) for weight in value
            ]
            made[f"decoder.layers.mlp.experts.experts.{linear}.{parameter}"] = torch.stack(experts)
            if shared_expert:
                half = value * 0.5 if linear == "linear_fc2" else value
                made[f"decoder.layers.mlp.shared_experts.{linear}.{parameter}"] = half
            continue
        made[key] = value
        for here, there in (NORMS, NORMS[::-1]):
            if key.startswith(here):
                made[key.replace(here, there)] = value
    return made


def expert(key: str, weight: Tensor, job: Job, number: int) -> Tensor:
    """FC1 [F or 2F (gate, up), D] or FC2 [D, F] of one expert: a copy, or a shard of one."""
    args, router = job.args, job.router
    if router.granularity == 1:
        return weight
    width, shard = args.ffn_hidden_size // router.granularity, number % router.granularity
    if key.startswith(FC2):
        return weight[:, shard * width : (shard + 1) * width]
    starts = (0, args.ffn_hidden_size) if args.swiglu else (0,)
    return torch.cat([weight[s + shard * width : s + (shard + 1) * width] for s in starts])


def routers(
    dense: Tensors, job: Job, head_keys: Tensor, router_input: Tensor, layers: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """Parameter -> layer -> values."""
    args, router, init, seed = job
    dtype, D, n = dense[QKV].dtype, args.hidden_size, router.num_experts
    copies, std = n // router.granularity, args.init_method_std
    made: dict[str, dict[int, Tensor]] = {}
    random = torch.Generator().manual_seed(seed)
    for layer in layers:
        values: Tensors = {}
        match router.router:
            case _ if router.router == "mixture" or init.gate == "heads":
                form = dataclasses.replace(router, router="mixture")
                groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
                keys = head_keys[layer].numpy()
                parts = mixture.of_heads(dense[QKV][layer], keys, groups, form)
                values["query_weight"], values["expert_key"] = parts[0], parts[1].to(dtype)
                if router.router != "mixture":
                    key = parts[1].double().numpy()
                    gate = sum(key @ query.double().numpy() for query in parts[0]) / math.sqrt(key.shape[1])
                    values = {"weight": torch.from_numpy(gate[:: router.granularity].copy()).to(dtype)}
            case "linear" | "switch":
                values["weight"] = ablations.normal((copies, D), random, std).to(dtype)
            case "mlp":
                values["fc1.weight"] = ablations.normal((D, D), random, std).to(dtype)
                values["fc2.weight"] = ablations.normal((copies, D), random, std).to(dtype)
        for name in values.keys() & {"weight", "fc2.weight"}:  # a row for each copy: its shards begin alike
            values[name] = torch.stack([values[name][i // router.granularity] for i in range(n)])
        if values:
            values = ablations.router(values, router, init, seed, layer, router_input[layer])
        if args.add_bias_linear and values:
            values["bias"] = torch.zeros(n, dtype=dtype)
        for name, value in values.items():
            made.setdefault(name, {})[layer] = value
    return made
