"""The config.json of a Qwen model, dense or Mixture-of-Experts, as Megatron's flags. Pure: no torch."""

import math
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.expert_layers import MOST_LAYERS

# Megatron flag -> value, for what all of these models have in common.
FIXED_FLAGS: dict[str, Any] = {
    "group_query_attention": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
FIXED_ROUTING: dict[str, Any] = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
}
# model_type -> class. All are decoders of RMSNorm, gated SiLU and rotary embedding.
CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSES |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

# Entry of config.json -> attribute of QwenModel, and transformers' default; None: the entry is required.
ENTRIES: dict[str, tuple[str, Any]] = {
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("ffn_hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_position_embeddings", 32768),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "initializer_range": ("init_method_std", 0.02),
    "tie_word_embeddings": ("tied", False),
}
# The same for a Mixture-of-Experts, as Megatron's flags.
MOE_ENTRIES: dict[str, tuple[str, Any]] = {
    "num_experts": ("num_experts", None),
    "num_experts_per_tok": ("moe_router_topk", None),
    "moe_intermediate_size": ("moe_ffn_hidden_size", None),
    "norm_topk_prob": ("moe_router_pre_softmax", False),  # its opposite
    "router_aux_loss_coef": ("moe_aux_loss_coeff", 0.001),  # for all layers: see ``hf.model_card``
}
QWEN3_HEAD_DIM = 128  # Qwen3Config's default; the others have hidden_size / num_attention_heads
ROPE_THETA = 10000.0
ROPE_ENTRIES = ("rope_scaling", "rope_parameters")  # two names of one object; the first one counts


def to_flags(config: dict[str, Any], path: Path, vocabulary_multiple: int) -> dict[str, Any]:
    """Megatron's flags for the model, the vocabulary padded to multiples of ``vocabulary_multiple``."""
    if vocabulary_multiple < 1:
        raise UserError(f"--make-vocab-size-divisible-by {vocabulary_multiple}: must be at least 1")
    try:
        family = _family(config)
        _refuse_features(config, family)
        values = _values(config, ENTRIES)
        routing = _routing(config, family, values["num_layers"]) if family.endswith("_moe") else {}
        groups, head_size = _attention_sizes(config, values, family)
        theta = _rope(config, "rope_theta", ROPE_THETA)
        if isinstance(theta, bool) or theta != int(theta):
            raise ValueError(f"rope_theta {theta!r} is no whole number, which Megatron's --rotary-base needs")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, TypeError, LookupError, OverflowError) as error:
        raise UserError(f"{path}: an entry of the wrong kind ({error}); download it again") from None
    tied, vocabulary = values.pop("tied"), values["vocab_size"]
    return FIXED_FLAGS | {
        **values,
        "num_query_groups": groups,
        "kv_channels": head_size,
        "add_qkv_bias": family.startswith("qwen2"),
        "qk_layernorm": family.startswith("qwen3"),
        "rotary_base": int(theta),
        "untie_embeddings_and_output_weights": not tied,
        "padded_vocab_size": -(-vocabulary // vocabulary_multiple) * vocabulary_multiple,
        **routing,
    }


def _family(config: dict[str, Any]) -> str:
    family = config.get("model_type")
    whole = CLASSES.get(str(family), str(family))
    name = str((config.get("architectures") or [whole])[0])
    if family not in CLASSES or name not in (whole, whole.replace("ForCausalLM", "Model")):
        covered = f"import-hf takes {', '.join(CLASSES.values())} (Qwen1.5, 2, 2.5 and 3)"
        raise ValueError(f"{name}{f' (model_type {family})' * bool(family)} is not covered; {covered}")
    return str(family)


def _refuse_features(config: dict[str, Any], family: str) -> None:
    ropes = [config.get(entry) or {} for entry in ROPE_ENTRIES]
    window = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    first = 0 if family.endswith("_moe") else config.get("max_window_layers", 28)  # the MoE classes differ
    window = window and first < config.get("num_hidden_layers", 0)
    layers = config.get("layer_types") or ["sliding_attention"] * bool(window)
    asked = {
        "quantised weights (name the folder of the unquantised model)": config.get("quantization_config")
        or config.get("quantization"),  # MLX's
        "dual_chunk_attention_config (it may be taken out where max_position_embeddings is set to its"
        " original_max_position_embeddings)": config.get("dual_chunk_attention_config"),
        "layer_types or a sliding window other than full_attention in every layer": layers
        and set(layers) != {"full_attention"},
        "rope_scaling or rope_parameters other than of type 'default', the same in all layers": any(
            rope.get("rope_type", rope.get("type", "default")) != "default"
            or any(isinstance(value, dict) for value in rope.values())
            for rope in ropes
        ),
        "partial_rotary_factor": _rope(config, "partial_rotary_factor", 1.0) != 1.0,
        "hidden_act other than 'silu'": config.get("hidden_act", "silu") != "silu",
        "attention_bias in Qwen3": family.startswith("qwen3") and config.get("attention_bias"),
        "qkv_bias false": family == "qwen2_moe" and not config.get("qkv_bias", True),
    }
    if found := [what for what, there in asked.items() if there]:
        raise ValueError(f"{found[0]}: not covered")


def _values(config: dict[str, Any], entries: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The values of ``entries`` by attribute or flag."""
    values: dict[str, Any] = {}
    for entry, (attribute, default) in entries.items():
        value = config.get(entry, default)
        if value is None and isinstance(default, bool):
            value = default  # null turns a switch off
        if value is None:
            raise ValueError(f"has no {entry}; not the config.json of a whole model")
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, bool | int | float):
            raise ValueError(f"{entry} is {value!r}, which is no size")
        values[attribute] = _size(entry, value) if default is None else value
    return values


def _routing(config: dict[str, Any], family: str, num_layers: int) -> dict[str, Any]:
    """Megatron's flags for the experts and their router."""
    known = {"num_experts": config.get("num_local_experts")} | config  # as transformers 5 saves Qwen3-MoE
    flags = _values(known, MOE_ENTRIES)
    flags["moe_router_pre_softmax"] = not flags["moe_router_pre_softmax"]
    top_k, experts = flags["moe_router_topk"], flags["num_experts"]
    if top_k > experts:
        raise ValueError(f"num_experts_per_tok {top_k} of num_experts {experts}")
    if top_k == 1 and not flags["moe_router_pre_softmax"]:
        raise ValueError(
            "norm_topk_prob with one expert a token, whose weight is then always 1: Megatron has no such"
            " router; not covered"
        )
    count = num_layers
    if frequency := _expert_layers(config, num_layers):
        flags["moe_layer_freq"], count = str(frequency), sum(frequency)
    flags["moe_aux_loss_coeff"] = rounded(flags["moe_aux_loss_coeff"] * top_k / count)
    width = config.get("shared_expert_intermediate_size") if family == "qwen2_moe" else 0
    if width != 0:
        flags["moe_shared_expert_intermediate_size"] = _size("shared_expert_intermediate_size", width)
        flags["moe_shared_expert_gate"] = True
    return flags | FIXED_ROUTING


def _expert_layers(config: dict[str, Any], num_layers: int) -> list[int] | None:
    """1 for each layer with experts and 0 for each without; None if all have experts."""
    step = _size("decoder_sparse_step", config.get("decoder_sparse_step", 1))
    without = set(config.get("mlp_only_layers") or ())
    if step == 1 and not without:
        return None
    if num_layers > MOST_LAYERS:
        raise ValueError(
            f"num_hidden_layers {num_layers}, some without experts; at most {MOST_LAYERS} are covered"
        )
    found = [int(layer not in without and (layer + 1) % step == 0) for layer in range(num_layers)]
    if not any(found):
        raise ValueError("decoder_sparse_step and mlp_only_layers leave no layer with experts; not covered")
    return None if all(found) else found


def rounded(quotient: float) -> float:
    """To 12 digits where no more than float arithmetic differs: the inverse then gives the number back."""
    short = float(f"{quotient:.12g}")
    return short if math.isclose(short, quotient, rel_tol=1e-14) else quotient


def _attention_sizes(config: dict[str, Any], values: dict[str, Any], family: str) -> tuple[int, int]:
    """The number of query groups, and the size of a head."""
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    groups = _size("num_key_value_heads", config.get("num_key_value_heads") or heads)
    if heads % groups:
        raise ValueError(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    head_size = config.get("head_dim") or (QWEN3_HEAD_DIM if family == "qwen3" else None)
    if head_size is None:
        if hidden % heads:
            raise ValueError(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
        head_size = hidden // heads
    return groups, _size("head_dim", head_size)


def _size(entry: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{entry} is {value!r}, which is no size")
    return value


def _rope(config: dict[str, Any], entry: str, default: float) -> Any:
    """A value of the rotary embedding, from the first place that has it, as in transformers 5."""
    rope: dict[str, Any] = next(filter(None, map(config.get, ROPE_ENTRIES)), {})
    return rope.get(entry, config.get(entry, default))
