"""The names of Megatron's tensors and objects in a checkpoint, all defined here. Pure: no torch.

A name is either stacked (``decoder.layers.mlp.linear_fc2.weight`` [L, D, F], where all layers are alike) or
of one layer (``decoder.layers.0.mlp.linear_fc2.weight`` [D, F]). The constants are stacked names.
"""

import re
from collections.abc import Iterable

TRACKER = "latest_checkpointed_iteration.txt"  # in a checkpoint's root
RELEASE = "release"  # what it says, and the iteration's folder, where nothing has trained since convert
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm"
LAYERS = "decoder.layers"
LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")  # layer number, name within the layer

# Modules of a layer.
ATTENTION = f"{LAYERS}.self_attention"
QKV_LINEAR = f"{ATTENTION}.linear_qkv"
QKV = f"{QKV_LINEAR}.weight"
PROJECTION = f"{ATTENTION}.linear_proj"
CORE_ATTENTION = f"{ATTENTION}.core_attention"
QUERY_NORM = f"{ATTENTION}.q_layernorm"
KEY_NORM = f"{ATTENTION}.k_layernorm"
MLP = f"{LAYERS}.mlp"
FC1 = f"{MLP}.linear_fc1"
FC2 = f"{MLP}.linear_fc2"
ROUTER = f"{MLP}.router"
EXPERTS = f"{MLP}.experts.experts"
SHARED_EXPERT = f"{MLP}.shared_experts"
# A router's buffers that only training makes, to balance its experts; each has a row for every expert.
BALANCING = tuple(f"{ROUTER}.{name}" for name in ("expert_bias", "qb_beta", "local_tokens_per_expert"))

# A norm has two names, each followed by ``weight`` or ``bias``: that of the projection after it, where
# Transformer Engine fuses the two, and its own. The norm before a layer's experts is the reverse: it has its
# own name with Transformer Engine, and the fused name without.
FUSED_NORM = f"{FC1}.layer_norm_"
SEPARATE_NORM = f"{LAYERS}.pre_mlp_layernorm."
NORM_BEFORE_ATTENTION = (f"{QKV_LINEAR}.layer_norm_", f"{LAYERS}.input_layernorm.")
NORM_BEFORE_FFN = (FUSED_NORM, SEPARATE_NORM)
NORMS = tuple(tuple(f"{name}weight" for name in names) for names in (NORM_BEFORE_ATTENTION, NORM_BEFORE_FFN))

# A Transformer Engine module's state besides its parameters. In a checkpoint ``/shard_...`` follows.
EXTRA_STATE = "._extra_state"
OWN_STATE = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)\._extra_state/shard_0_1")
STACKED_STATE = re.compile(r"decoder\.layers\.(.+)\._extra_state/shard_(\d{1,6})_\d+")

# Kind of training state, which a fresh run creates anew -> why conversion leaves it out.
LEFT_OUT = {
    "optimizer": "of the dense model's parameters; the Mixture-of-Experts starts with a fresh one",
    "rng_state": "of the dense run's ranks; a fresh run seeds its own",
    "rerun_state_machine_state": "of the dense run; it says nothing of the model",
    "dataloader_state": "of the dense run; a fresh run begins at the beginning of its data",
}
TRAINING_STATE = re.compile(rf"(chained_\d+\.)?(?P<kind>{'|'.join(LEFT_OUT)})\b")
# Pattern in a tensor's name -> the flag that adds the tensor; the first match counts.
ADDED_BY = {
    r"^mtp\.": "--mtp-num-layers",
    r"shared_experts\.gate_weight$": "--moe-shared-expert-gate",
    r"shared_experts\.": "--moe-shared-expert-intermediate-size",
    r"self_attention\.linear_(q|kv)_": "--multi-latent-attention",
    r"latent_proj\.": "--moe-latent-size",
    r"softmax_offset$": "--softmax-type",
    r"[qk]_layernorm\.": "--qk-layernorm",
    r"position_embeddings\.": "--position-embedding-type",
    r"output_layer\.weight$": "--untie-embeddings-and-output-weights",
    r"norm.*bias$": "--normalization",
    r"linear_qkv\.bias$": "--add-qkv-bias",
    r"bias$": "the absence of --disable-bias-linear",
}
MODEL_STATE = re.compile(r"embedding\.|decoder\.|output_layer\.")


def split_key(key: str) -> tuple[str, int | None]:
    """The stacked name of ``key``, and the layer that it belongs to; None if that is not one layer."""
    match = LAYER.fullmatch(key)
    return (f"{LAYERS}.{match[2]}", int(match[1])) if match else (key, None)


def at_layer(key: str, layer: int | None) -> str:
    """The name of one layer's tensor, from the stacked name ``key``; layer None: ``key`` itself."""
    return key if layer is None else f"{LAYERS}.{layer}.{within_layer(key)}"


def within_layer(key: str) -> str:
    """The name within a layer, from the stacked name ``key``."""
    return key.removeprefix(f"{LAYERS}.")


def is_of_layers(key: str) -> bool:
    """Whether ``key`` belongs to the decoder's layers, to one or stacked."""
    return key.startswith(f"{LAYERS}.")


def is_ffn(key: str) -> bool:
    """Whether the stacked name ``key`` is a parameter of a dense FFN; the norm before the FFN is not."""
    return key.startswith((f"{FC1}.", f"{FC2}.")) and not key.startswith(FUSED_NORM)


def holds_experts(keys: Iterable[str]) -> bool:
    """Whether these are the names of a Mixture-of-Experts."""
    return any(".mlp.experts." in key or ".mlp.router." in key for key in keys)


def other_norm(key: str) -> str | None:
    """The other name of a norm before the FFN; None for all else."""
    name, layer = split_key(key)
    if EXTRA_STATE in name:
        return None
    for one, other in (NORM_BEFORE_FFN, NORM_BEFORE_FFN[::-1]):
        if name.startswith(one):
            return at_layer(other + name.removeprefix(one), layer)
    return None


def extra_state(module: str, *places: tuple[int, int]) -> str:
    """The name of a module's extra state; ``places``: its (index, size) on each stacked axis."""
    numbers, sizes = zip(*(places or ((0, 1),)), strict=True)
    return f"{module}{EXTRA_STATE}/shard_{'.'.join(map(str, numbers))}_{'.'.join(map(str, sizes))}"


def stacked_state(key: str, num_layers: int) -> str | None:
    """The stacked name of one layer's extra state; None for all else."""
    match = OWN_STATE.fullmatch(key)
    return match and extra_state(f"{LAYERS}.{match[2]}", (int(match[1]), num_layers))


def own_state(key: str) -> str | None:
    """The name within one layer of a stacked extra state; None for all else."""
    match = STACKED_STATE.fullmatch(key)
    return match and extra_state(f"{LAYERS}.{match[2]}.{match[1]}")


def extra_states(
    num_layers: int,
    num_experts: int,
    qk_layernorm: bool,
    shared_expert: bool = False,
    layers: tuple[int, ...] | None = None,
) -> list[str]:
    """Names of the extra states that a model loads, with or without Transformer Engine.

    Megatron fails if one is missing and ignores unknown ones. A dense model has 0 experts. ``layers``: those
    with experts, in a checkpoint with one key per layer; None: all layers, with stacked names.
    """
    modules = [SEPARATE_NORM.removesuffix(".")] if num_experts else []
    modules += [CORE_ATTENTION, QKV_LINEAR, PROJECTION, *((QUERY_NORM, KEY_NORM) if qk_layernorm else ())]
    states = [extra_state(FINAL_NORM)]
    for layer in range(num_layers):
        own, place = (None, [(layer, num_layers)]) if layers is None else (layer, [])
        states += [extra_state(at_layer(module, own), *place) for module in modules]
        for linear in (FC1, FC2):
            if not num_experts or (layers is not None and layer not in layers):
                states.append(extra_state(at_layer(linear, own), *place))
                continue
            part = linear.removeprefix(MLP)
            if shared_expert:
                states.append(extra_state(at_layer(SHARED_EXPERT + part, own), *place))
            experts = at_layer(EXPERTS + part, own)
            states += [extra_state(experts, *place, (number, num_experts)) for number in range(num_experts)]
    return states
