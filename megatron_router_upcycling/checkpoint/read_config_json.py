"""The config.json of a dense Qwen model as Megatron's flags. Pure: no torch."""

from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import UserError

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
# model_type -> class. Both are decoders of RMSNorm, gated SiLU and rotary embedding.
DENSE_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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
QWEN3_HEAD_DIM = 128  # Qwen3Config's default; the others have hidden_size / num_attention_heads
ROPE_THETA = 10000.0
ROPE_ENTRIES = ("rope_scaling", "rope_parameters")  # two names of one object; the first one counts


def to_flags(config: dict[str, Any], path: Path, vocabulary_multiple: int) -> dict[str, Any]:
    """Megatron's flags for the dense model, the vocabulary padded to multiples of ``vocabulary_multiple``."""
    if vocabulary_multiple < 1:
        raise UserError(f"--make-vocab-size-divisible-by {vocabulary_multiple}: must be at least 1")
    try:
        family = _family(config)
        _refuse_features(config, family)
        values = _values(config)
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
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family == "qwen3",
        "rotary_base": int(theta),
        "untie_embeddings_and_output_weights": not tied,
        "padded_vocab_size": -(-vocabulary // vocabulary_multiple) * vocabulary_multiple,
    }


def _family(config: dict[str, Any]) -> str:
    family = config.get("model_type")
    name = str((config.get("architectures") or [DENSE_CLASSES.get(str(family), family)])[0])
    covered = "import-hf takes a dense Qwen2ForCausalLM (Qwen1.5, Qwen2, Qwen2.5) or Qwen3ForCausalLM (Qwen3)"
    if config.get("num_experts") or config.get("num_local_experts") or "Moe" in name:
        raise ValueError(f"{name} is a Mixture-of-Experts; {covered}")
    body = DENSE_CLASSES.get(str(family), "").replace("ForCausalLM", "Model")
    if family not in DENSE_CLASSES or name not in (DENSE_CLASSES[family], body):
        raise ValueError(f"{name}{f' (model_type {family})' * bool(family)} is not covered; {covered}")
    return str(family)


def _refuse_features(config: dict[str, Any], family: str) -> None:
    ropes = [config.get(entry) or {} for entry in ROPE_ENTRIES]
    window = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    window = window and config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0)
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
        "attention_bias in Qwen3": family == "qwen3" and config.get("attention_bias"),
    }
    if found := [what for what, there in asked.items() if there]:
        raise ValueError(f"{found[0]}: not covered")


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """Attribute of QwenModel -> value, of ``ENTRIES``."""
    values: dict[str, Any] = {}
    for entry, (attribute, default) in ENTRIES.items():
        value = config.get(entry, default)
        if value is None and isinstance(default, bool):
            value = default  # null turns a switch off
        if value is None:
            raise ValueError(f"has no {entry}; not the config.json of a whole model")
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, bool | int | float):
            raise ValueError(f"{entry} is {value!r}, which is no size")
        values[attribute] = _size(entry, value) if default is None else value
    return values


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
