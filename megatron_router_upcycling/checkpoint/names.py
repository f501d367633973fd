"""Names of Megatron's tensors, each here and nowhere else."""

import re

QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1"
FC2 = "decoder.layers.mlp.linear_fc2"
LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")

STACKED = "decoder.layers."
SHARED_EXPERT = "decoder.layers.mlp.shared_experts"
ROUTER = "decoder.layers.mlp.router"
# A norm's weight, inside the projection behind it (Transformer Engine's way) or apart.
NORMS = (
    (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.input_layernorm.weight",
    ),
    ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"),
)
LAYERS = "decoder.layers"
EXPERTS = f"{LAYERS}.mlp.experts.experts"
EXTRA_STATE = "._extra_state/"
FUSED_NORM = f"{FC1}.layer_norm_"  # the norm before the FFN in a dense layer, and in an MoE layer built
SEPARATE_NORM = f"{LAYERS}.pre_mlp_layernorm."  # without Transformer Engine; with it, this is its name

# What a fresh run makes anew, whoever saved it, and why it is left out.
LEFT_OUT = {
    "optimizer": "of the dense model's parameters; the Mixture-of-Experts starts with a fresh one",
    "rng_state": "of the dense run's ranks; a fresh run seeds its own",
    "rerun_state_machine_state": "of the dense run; it says nothing of the model",
    "dataloader_state": "of the dense run; a fresh run begins at the beginning of its data",
}
TRAINING_STATE = re.compile(rf"(chained_\d+\.)?(?P<kind>{'|'.join(LEFT_OUT)})\b")
MODEL_STATE = re.compile(r"embedding\.|decoder\.|output_layer\.")


def split_key(key: str) -> tuple[str, int | None]:
    """The key of the stacked tensor, and the layer of a key of a layer's own."""
    match = LAYER.fullmatch(key)
    return (f"{STACKED}{match[2]}", int(match[1])) if match else (key, None)


def at_layer(key: str, layer: int | None) -> str:
    """The key that layer ``layer`` has of its own for a stacked tensor's key; None: the key itself."""
    return key if layer is None else f"{STACKED}{layer}.{key.removeprefix(STACKED)}"


def other_norm(key: str) -> str | None:
    name, layer = split_key(key)
    if name.startswith(FUSED_NORM):
        return at_layer(SEPARATE_NORM + name.removeprefix(FUSED_NORM), layer)
    if name.startswith(SEPARATE_NORM) and EXTRA_STATE not in name:
        return at_layer(FUSED_NORM + name.removeprefix(SEPARATE_NORM), layer)
    return None


def extra_states(
    num_layers: int,
    num_experts: int,
    *,
    qk_layernorm: bool,
    shared_expert: bool = False,
    layers: tuple[int, ...] | None = None,
) -> list[str]:
    """Keys of the extra states that an MoE with or without Transformer Engine looks for.

    Megatron stops where one is missing, and ignores those that it does not look for.
    """
    L = num_layers
    modules = ["pre_mlp_layernorm", "self_attention.core_attention"]
    modules += ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] * qk_layernorm
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(L):
        own = None if layers is None else layer
        place = f"{layer}_{L}" if layers is None else "0_1"
        keys += [at_layer(f"{LAYERS}.{module}{EXTRA_STATE}shard_{place}", own) for module in modules]
        for linear in ("linear_fc1", "linear_fc2"):
            if layers is not None and layer not in layers:
                keys.append(at_layer(f"{LAYERS}.mlp.{linear}{EXTRA_STATE}shard_0_1", own))
                continue
            keys += [at_layer(f"{SHARED_EXPERT}.{linear}{EXTRA_STATE}shard_{place}", own)] * shared_expert
            for expert in range(num_experts):
                place_of_expert = (
                    f"{layer}.{expert}_{L}.{num_experts}" if own is None else f"{expert}_{num_experts}"
                )
                keys.append(at_layer(f"{EXPERTS}.{linear}{EXTRA_STATE}shard_{place_of_expert}", own))
    return keys
