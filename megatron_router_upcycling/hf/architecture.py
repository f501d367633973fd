"""A Qwen model's architecture, as Hugging Face's config.json and as Megatron's arguments.

Covered: Qwen1.5, Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``: bias on query, key and value) and Qwen3
(``Qwen3ForCausalLM``: norms on query and key), and their Mixture-of-Experts classes on the way out. What
these classes or this table cannot hold is refused with its name. Pure: no torch, no transformers.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED, UNKNOWN_LAYERS
from megatron_router_upcycling.errors import UserError

# model_type -> class. Both are decoders of RMSNorm, gated SiLU and rotary embedding.
DENSE_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MOE_CLASSES = {"qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}

# Entry of config.json -> field of Architecture, for what stands in both under some name. The default is
# what transformers takes where the entry is missing; None means that it must be there.
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
# Megatron argument -> the value it must have had in training for a Qwen class to compute the same. An
# argument that a checkpoint does not record counts as right.
EXPECTED_ARGUMENTS: dict[str, Any] = {
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "squared_relu": False,
    "openai_gelu": False,
    "quick_geglu": False,
    "qk_l2_norm": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_mup": False,
}
# As above, for how an MoE routes.
EXPECTED_ROUTING: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,  # convert --granularity, --shared-expert
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_shared_expert_intermediate_size": None,  # convert --shared-expert
    "moe_latent_size": None,
    "moe_layer_freq": 1,  # convert --layers
    "moe_apply_probs_on_input": False,
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a Qwen model; ``num_experts`` 0 is a dense one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    norm_epsilon: float
    rotary_base: int
    vocab_size: int
    padded_vocab_size: int  # rows of Megatron's embedding
    max_position_embeddings: int
    init_method_std: float
    num_experts: int = 0

    @property
    def family(self) -> str:
        return "qwen3" if self.qk_norm else "qwen2"

    def describe(self) -> str:
        """The architecture in one line."""
        experts = f"{self.num_experts} experts" if self.num_experts else "dense"
        return (
            f"{self.family} {experts}, {self.num_layers} layers, hidden size {self.hidden_size}, FFN"
            f" {self.ffn_hidden_size}, {self.num_attention_heads} heads of size {self.kv_channels} in"
            f" {self.num_query_groups} groups, vocabulary {self.vocab_size},"
            f" embeddings {'tied' if self.tied else 'untied'}"
        )

    def hf_config(self) -> dict[str, Any]:
        """What a dense and an MoE config.json have in common, but for dtype and special tokens."""
        config = {entry: getattr(self, field) for entry, (field, _) in ENTRIES.items()}
        config |= {
            "model_type": self.family + "_moe" * bool(self.num_experts),
            "architectures": [(MOE_CLASSES if self.num_experts else DENSE_CLASSES)[self.family]],
            "num_key_value_heads": self.num_query_groups,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            # transformers 5 reads the one, transformers 4 and the inference engines the other
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.rotary_base)},
            "rope_theta": float(self.rotary_base),
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
        }
        if self.qk_norm:
            config["attention_bias"] = False
        if self.qk_norm or self.kv_channels * self.num_attention_heads != self.hidden_size:
            config["head_dim"] = self.kv_channels
        return config

    def megatron_flags(self) -> dict[str, Any]:
        """Megatron's flags (underscores for dashes) that build this dense model."""
        return FIXED_FLAGS | {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "norm_epsilon": self.norm_epsilon,
            "rotary_base": self.rotary_base,
            "untie_embeddings_and_output_weights": not self.tied,
            "max_position_embeddings": self.max_position_embeddings,
            "init_method_std": self.init_method_std,
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
        }

    def megatron_args(self) -> Namespace:
        """The arguments that Megatron would keep in a checkpoint of this dense model."""
        values = {name: None for name in UNKNOWN_LAYERS} | EXPECTED_ARGUMENTS
        values |= {
            "num_experts": None,
            "add_position_embedding": True,
            "apply_query_key_layer_scaling": False,
        }
        values |= {"rope_scaling_factor": 8.0, "consumed_train_samples": 0, "consumed_valid_samples": 0}
        values |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
        for flag, value in self.megatron_flags().items():
            if flag in NEGATED:
                values[NEGATED[flag]] = not value
            else:
                values[ARCHITECTURE.get(flag, flag)] = value
        return Namespace(**values)


def from_hf(config: dict[str, Any], path: Path, vocabulary_multiple: int) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        path: the config.json, named in errors.
        vocabulary_multiple: Megatron's embedding is padded to a multiple of it.

    Raises:
        UserError: a model, or a feature of one, that is not covered.
    """
    try:
        return _from_hf(config, path, vocabulary_multiple)
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
        raise UserError(f"{path}: an entry of the wrong kind ({error}); download it again") from None


def _from_hf(config: dict[str, Any], path: Path, vocabulary_multiple: int) -> Architecture:
    family = _family(config, path)
    _refuse_features(config, family, path)
    values: dict[str, Any] = {}
    for entry, (field, default) in ENTRIES.items():
        value = config.get(entry, default)
        if value is None:
            raise UserError(f"{path}: has no {entry}; not the config.json of a whole model")
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, bool | int | float):
            raise UserError(f"{path}: {entry} is {value!r}, which is no size")
        values[field] = value
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or (QWEN3_HEAD_DIM if family == "qwen3" else None)
    sizes = {entry: values[field] for entry, (field, default) in ENTRIES.items() if default is None}
    sizes |= {"num_key_value_heads": groups, "head_dim": head_size or 1}
    for entry, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{path}: {entry} is {size!r}, which is no size")
    for entry, size, divided, whole in (
        ("num_key_value_heads", groups, "num_attention_heads", heads),
        ("num_attention_heads", 1 if head_size else heads, "hidden_size", hidden),
    ):
        if whole % size:
            raise UserError(f"{path}: {entry} {size} does not divide {divided} {whole}")
    if vocabulary_multiple < 1:
        raise UserError(f"--make-vocab-size-divisible-by {vocabulary_multiple}: must be at least 1")
    return Architecture(
        **values,
        num_query_groups=groups,
        kv_channels=head_size or hidden // heads,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rotary_base=_rotary_base(config, path),
        padded_vocab_size=math.ceil(values["vocab_size"] / vocabulary_multiple) * vocabulary_multiple,
    )


def _family(config: dict[str, Any], path: Path) -> str:
    family = config.get("model_type")
    names = config.get("architectures") or [DENSE_CLASSES.get(str(family), family)]
    name = names[0]
    covered = " or ".join(DENSE_CLASSES.values())
    if config.get("num_experts") or config.get("num_local_experts") or "Moe" in str(name):
        raise UserError(f"{path}: {name} is a Mixture-of-Experts; import-hf takes a dense {covered}")
    if family not in DENSE_CLASSES or name != DENSE_CLASSES[family]:
        raise UserError(f"{path}: {name} is not covered; import-hf takes a dense {covered}")
    return str(family)


def _refuse_features(config: dict[str, Any], family: str, path: Path) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{path}: quantised weights ({method}); name the folder of the unquantised model")
    layers = config.get("layer_types") or []
    uses_window = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    if (
        not layers
        and uses_window
        and config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0)
    ):
        layers = ["sliding_attention"]
    if other := [kind for kind in layers if kind != "full_attention"]:
        raise UserError(f"{path}: layers of {other[0]} are not covered; full attention in every layer is")
    for entry in ("rope_scaling", "rope_parameters"):
        rope = config.get(entry) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {entry} of type {kind!r} is not covered; plain rotary embedding is")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{path}: partial_rotary_factor is not covered")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']!r} is not covered; 'silu' is")
    if family == "qwen3" and config.get("attention_bias"):
        raise UserError(f"{path}: attention_bias is not covered for Qwen3")


def _rotary_base(config: dict[str, Any], path: Path) -> int:
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_THETA))
    if not isinstance(theta, int | float) or theta != int(theta):
        raise UserError(
            f"{path}: rope_theta {theta!r} is no whole number, which Megatron's --rotary-base needs"
        )
    return int(theta)


def from_megatron(args: Namespace, root: Path, embedding_rows: int) -> Architecture:
    """The architecture that a checkpoint's training arguments describe.

    Args:
        root: the checkpoint, named in errors.
        embedding_rows: rows of its embedding, which is padded.

    Raises:
        UserError: an architecture that no Qwen class has.
    """
    for name in UNKNOWN_LAYERS:
        if value := getattr(args, name, None):
            raise UserError(f"{root}: trained with --{_dashed(name)} {value}, which no Qwen class has")
    num_experts = getattr(args, "num_experts", None) or 0
    for name, expected in (EXPECTED_ARGUMENTS | (EXPECTED_ROUTING if num_experts else {})).items():
        found = getattr(args, name, expected)
        if found != expected and not _all_layers(name, found):
            raise UserError(
                f"{root}: trained with {name} {found!r} where a Qwen class has {expected!r};"
                " it cannot be exported"
            )
    try:
        heads = int(args.num_attention_heads)
        ffn = (getattr(args, "moe_ffn_hidden_size", None) if num_experts else None) or args.ffn_hidden_size
        recorded = getattr(args, "vocab_size", None)
        model = Architecture(
            num_layers=int(args.num_layers),
            hidden_size=int(args.hidden_size),
            ffn_hidden_size=int(ffn),
            num_attention_heads=heads,
            num_query_groups=int(args.num_query_groups) if args.group_query_attention else heads,
            kv_channels=int(args.kv_channels),
            qkv_bias=bool(args.add_qkv_bias),
            qk_norm=bool(getattr(args, "qk_layernorm", False)),
            tied=not args.untie_embeddings_and_output_weights,
            norm_epsilon=float(args.layernorm_epsilon),
            rotary_base=int(args.rotary_base),
            vocab_size=min(int(recorded or embedding_rows), embedding_rows),
            padded_vocab_size=embedding_rows,
            max_position_embeddings=int(args.max_position_embeddings),
            init_method_std=float(args.init_method_std),
            num_experts=num_experts,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{root}: its training arguments do not give the architecture ({error})") from None
    if model.qkv_bias == model.qk_norm:
        both = (
            "both QKV bias and query/key norms" if model.qkv_bias else "neither QKV bias nor query/key norms"
        )
        raise UserError(
            f"{root}: has {both}; the Qwen classes have one of them (--add-qkv-bias or --qk-layernorm)"
        )
    return model


def _all_layers(name: str, value: Any) -> bool:
    """``moe_layer_freq`` may also list the layers one by one."""
    return name == "moe_layer_freq" and isinstance(value, list) and all(frequency == 1 for frequency in value)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
