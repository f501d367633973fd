"""A model's architecture: its sizes, and the options that decide what its parameters mean. Pure: no torch.

Here it is built from Megatron's training arguments; ``hf`` builds it from a config.json and adds its entries.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from megatron_router_upcycling.checkpoint import names
from megatron_router_upcycling.errors import shown

if TYPE_CHECKING:
    import torch

# Megatron flag (underscores for dashes) -> the attribute of its arguments, for the options that decide what a
# model's parameters mean. A flag in ``NEGATED`` turns its attribute off.
RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
ARCHITECTURE = {
    flag: RENAMED.get(flag, flag)
    for flag in (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
        *("group_query_attention", "qk_layernorm", "qk_l2_norm", "add_qkv_bias"),
        *("swiglu", "squared_relu", "openai_gelu", "quick_geglu"),
        *("normalization", "norm_epsilon", "apply_layernorm_1p"),
        *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
        *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
        "untie_embeddings_and_output_weights",
    )
}
NEGATED = {"disable_bias_linear": "add_bias_linear"}
# If one of these arguments is set, the layers are of a kind that the converter does not support.
UNKNOWN_LAYERS = (
    *("multi_latent_attention", "attention_output_gate", "experimental_attention_variant"),
    *("linear_attention_freq", "mtp_num_layers", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern", "hybrid_override_pattern"),
    "is_hybrid_model",
)
# Megatron's defaults for the arguments, other than sizes, that decide what a dense model computes.
MODEL_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*UNKNOWN_LAYERS, "num_experts", "activation_func_clamp_value")),
    **dict.fromkeys(("rotary_seq_len_interpolation_factor", "no_rope_freq", "window_size")),
    **dict.fromkeys(("multi_latent_attention", "attention_output_gate", "is_hybrid_model"), False),
    **dict.fromkeys(("group_query_attention", "qk_layernorm", "qk_l2_norm", "add_qkv_bias"), False),
    **dict.fromkeys(("swiglu", "squared_relu", "openai_gelu", "quick_geglu"), False),
    **dict.fromkeys(("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"), False),
    **dict.fromkeys(("apply_query_key_layer_scaling", "rotary_interleaved", "use_rope_scaling"), False),
    **dict.fromkeys(("use_mup", "untie_embeddings_and_output_weights"), False),
    "add_bias_linear": True,
    "glu_linear_offset": 0.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "add_position_embedding": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling_factor": 8.0,
    "softmax_type": "vanilla",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.02,
}
# Defaults for the arguments that ``gpt_config_from_args`` and Megatron-Bridge's counterpart also require.
BUILD_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")),
    **dict.fromkeys(("moe_latent_size", "rope_type", "spec", "te_precision_config_file", "yaml_cfg")),
    **dict.fromkeys(("fp16_lm_cross_entropy", "fp4_param_gather", "fp8_param_gather"), False),
    **dict.fromkeys(("moe_grouped_gemm", "init_method_xavier_uniform", "no_persist_layer_norm"), False),
    **dict.fromkeys(("bias_gelu_fusion", "bias_swiglu_fusion", "overlap_p2p_comm"), True),
    **dict.fromkeys(("pipeline_model_parallel_size", "tensor_model_parallel_size"), 1),
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "make_vocab_size_divisible_by": 128,
    "seed": 1234,
    "transformer_impl": "transformer_engine",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a GPT model: L layers, D hidden, F FFN, H query heads, G query groups, d head size.

    ``flags``: Megatron's flags (underscores for dashes) by name, those of ``ARCHITECTURE`` and ``NEGATED``,
    sizes included. Flags without a value are left out. The manifest records them.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    init_method_std: float
    flags: dict[str, Any]

    @classmethod
    def from_arguments(cls, args: Namespace, **more: Any) -> Self:
        """The architecture that Megatron's training arguments describe; ``more``: a subclass's own fields.

        Raises AttributeError, TypeError, ValueError or OverflowError where they do not give it.
        """
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
        return cls(
            **{name: int(getattr(args, name)) for name in sizes},
            num_query_groups=int(num_query_groups(args)),
            init_method_std=float(args.init_method_std),
            flags=_flags_of(args),
            **more,
        )

    @property
    def gated(self) -> bool:
        """Whether FC1 is a gate over an up projection, [2F, D]."""
        return bool(self.flags.get("swiglu") or self.flags.get("quick_geglu"))

    @property
    def linear_bias(self) -> bool:
        """Whether linear layers have biases; then Megatron gives its router one as well."""
        return not self.flags["disable_bias_linear"]

    @property
    def qkv_bias(self) -> bool:
        return self.linear_bias or bool(self.flags.get("add_qkv_bias"))

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return bool(self.flags.get("qk_layernorm"))

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output layer as well."""
        return not self.flags.get("untie_embeddings_and_output_weights")

    def describe(self) -> str:
        """The architecture in one line."""
        return (
            f"{self.num_layers} layers, hidden size {self.hidden_size},"
            f" {'gated ' * self.gated}FFN {self.ffn_hidden_size}, {self.num_attention_heads} heads of size"
            f" {self.kv_channels} in {self.num_query_groups} groups"
        )

    def parameters(self, embedding_rows: int) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shapes of all parameters, stacked over layers, by name; of a norm, by both of its names."""
        L, D, d = self.num_layers, self.hidden_size, self.kv_channels
        H, G, F = self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size
        qkv, projection, fc1, fc2 = linears = (names.QKV_LINEAR, names.PROJECTION, names.FC1, names.FC2)
        shapes = {
            qkv: ((H + 2 * G) * d, D),
            projection: (D, H * d),
            fc1: (F + F * self.gated, D),
            fc2: (D, F),
        }
        has_bias = {linear: self.linear_bias for linear in linears} | {qkv: self.qkv_bias}
        found: dict[tuple[str, ...], tuple[int, ...]] = {}
        for linear, shape in shapes.items():
            found[f"{linear}.weight",] = (L, *shape)
            if has_bias[linear]:
                found[f"{linear}.bias",] = (L, shape[0])
        for name in (names.EMBEDDING,) if self.tied else (names.EMBEDDING, names.OUTPUT_LAYER):
            found[name,] = (embedding_rows, D)
        for part in ("weight", "bias") if self.flags.get("normalization") == "LayerNorm" else ("weight",):
            found[f"{names.FINAL_NORM}.{part}",] = (D,)
            for norm in (names.NORM_BEFORE_ATTENTION, names.NORM_BEFORE_FFN):
                found[tuple(f"{name}{part}" for name in norm)] = (L, D)
            for name in (names.QUERY_NORM, names.KEY_NORM) if self.qk_norm else ():
                found[f"{name}.{part}",] = (L, d)
        return found


@dataclass(frozen=True, kw_only=True)
class DenseModel(Architecture):
    """The architecture of a dense model in a checkpoint, and its parameters' dtype; see ``read_model``."""

    dtype: "torch.dtype"

    def describe(self) -> str:
        return f"dense, {super().describe()}, {str(self.dtype).removeprefix('torch.')}"


def num_query_groups(args: Namespace) -> int:
    """The number of key heads; Megatron's argument applies only with grouped-query attention."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def megatron_arguments(flags: dict[str, Any]) -> Namespace:
    """The arguments that Megatron would keep in a checkpoint of a dense model built with ``flags``."""
    arguments = MODEL_DEFAULTS | BUILD_DEFAULTS | {"consumed_train_samples": 0, "consumed_valid_samples": 0}
    for flag, value in flags.items():
        if flag in NEGATED:
            arguments[NEGATED[flag]] = not value
        else:
            arguments[ARCHITECTURE.get(flag, flag)] = value
    if (hidden := arguments.get("hidden_size")) and (heads := arguments.get("num_attention_heads")):
        arguments.setdefault("kv_channels", int(hidden) // int(heads))
        arguments.setdefault("num_query_groups", heads)
    return Namespace(**arguments)


def _flags_of(args: Namespace) -> dict[str, Any]:
    """The architecture's flags from Megatron's arguments, without those that have no value."""
    flags = {flag: getattr(args, name, None) for flag, name in ARCHITECTURE.items()}
    flags |= {flag: not getattr(args, name) for flag, name in NEGATED.items()}
    if args.group_query_attention:
        flags["num_query_groups"] = args.num_query_groups
    if args.position_embedding_type == "learned_absolute":
        flags["max_position_embeddings"] = args.max_position_embeddings
    for flag, value in flags.items():
        if not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"{flag} is {shown(value)}")
    return {flag: value for flag, value in flags.items() if value is not None}
