"""A model's architecture: its sizes, and all that makes two models' parameters mean the same. Pure: no torch.

``Architecture`` is the one description of a model in this package. Here it is made of Megatron's training
arguments; ``hf`` makes it of a config.json and adds what that says beyond it. ``DenseModel`` is the
architecture of a dense model in a checkpoint.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from megatron_router_upcycling.checkpoint.names import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    KEY_NORM,
    NORM_BEFORE_ATTENTION,
    NORM_BEFORE_FFN,
    OUTPUT_LAYER,
    PROJECTION,
    QKV_LINEAR,
    QUERY_NORM,
    extra_states,
)
from megatron_router_upcycling.errors import shown

if TYPE_CHECKING:
    import torch

# Megatron flag (underscores for dashes) -> the attribute of its arguments, for all that makes two models'
# parameters mean the same. A switch that turns something off stands for the attribute's negation.
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
# Where these arguments are set, the layers are not what the converter knows.
UNKNOWN_LAYERS = (
    "multi_latent_attention",
    "attention_output_gate",
    "experimental_attention_variant",
    "linear_attention_freq",
    "mtp_num_layers",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "is_hybrid_model",
)
# Megatron's defaults of the arguments that decide what a dense model computes, but for its sizes.
MODEL_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(UNKNOWN_LAYERS),
    "multi_latent_attention": False,
    "attention_output_gate": False,
    "is_hybrid_model": False,
    "num_experts": None,
    "group_query_attention": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "swiglu": False,
    "squared_relu": False,
    "openai_gelu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "add_position_embedding": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "use_mup": False,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.02,
    "untie_embeddings_and_output_weights": False,
}
# As above, for what its ``gpt_config_from_args``, and Megatron-Bridge's counterpart, ask for as well.
BUILD_DEFAULTS: dict[str, Any] = {
    "bias_gelu_fusion": True,
    "bias_swiglu_fusion": True,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "fp16_lm_cross_entropy": False,
    "fp4_param_gather": False,
    "fp8_param_gather": False,
    "init_method_xavier_uniform": False,
    "make_vocab_size_divisible_by": 128,
    "moe_grouped_gemm": False,
    "moe_latent_size": None,
    "no_persist_layer_norm": False,
    "overlap_p2p_comm": True,
    "pipeline_model_parallel_size": 1,
    "rope_type": None,
    "seed": 1234,
    "spec": None,
    "te_precision_config_file": None,
    "tensor_model_parallel_size": 1,
    "transformer_impl": "transformer_engine",
    "yaml_cfg": None,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a GPT model: L layers, D hidden, F FFN, H query heads, G query groups, d head size.

    ``flags`` are Megatron's (underscores for dashes), by name: the sizes once more, and the switches of
    ``ARCHITECTURE`` and ``NEGATED``. One without a value is left out. The manifest records them.
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
        """The architecture that Megatron's training arguments describe.

        Args:
            more: values of the fields that a subclass adds.

        Raises:
            AttributeError, TypeError, ValueError, OverflowError: they do not give the architecture.
        """
        heads = int(args.num_attention_heads)
        return cls(
            num_layers=int(args.num_layers),
            hidden_size=int(args.hidden_size),
            ffn_hidden_size=int(args.ffn_hidden_size),
            num_attention_heads=heads,
            num_query_groups=int(args.num_query_groups) if args.group_query_attention else heads,
            kv_channels=int(args.kv_channels),
            init_method_std=float(args.init_method_std),
            flags=flags_of(args),
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

    @property
    def centered_norms(self) -> bool:
        """Whether a norm's gain is its parameter and 1 (``--apply-layernorm-1p``)."""
        return bool(self.flags.get("apply_layernorm_1p"))

    def describe(self) -> str:
        """The architecture in one line."""
        return (
            f"{self.num_layers} layers, hidden size {self.hidden_size},"
            f" {'gated ' * self.gated}FFN {self.ffn_hidden_size}, {self.num_attention_heads} heads of size"
            f" {self.kv_channels} in {self.num_query_groups} groups"
        )

    def parameters(self) -> list[tuple[str, ...]]:
        """The names of all its parameters, stacked over layers; where Megatron has two for one, both."""
        norms = ("weight", "bias") if self.flags.get("normalization") == "LayerNorm" else ("weight",)
        linears = (QKV_LINEAR, PROJECTION, FC1, FC2)
        found: list[tuple[str, ...]] = [(EMBEDDING,), *((f"{linear}.weight",) for linear in linears)]
        if not self.tied:
            found.append((OUTPUT_LAYER,))
        if self.linear_bias:
            found += [(f"{linear}.bias",) for linear in (PROJECTION, FC1, FC2)]
        if self.qkv_bias:
            found.append((f"{QKV_LINEAR}.bias",))
        for part in norms:
            found.append((f"{FINAL_NORM}.{part}",))
            found += [
                tuple(f"{name}{part}" for name in names) for names in (NORM_BEFORE_ATTENTION, NORM_BEFORE_FFN)
            ]
            if self.qk_norm:
                found += [(f"{norm}.{part}",) for norm in (QUERY_NORM, KEY_NORM)]
        return found

    def extra_states(
        self, num_experts: int, shared_expert: bool = False, layers: tuple[int, ...] | None = None
    ) -> list[str]:
        """Names of the extra states that an MoE made of this model looks for; see ``names.extra_states``."""
        return extra_states(
            self.num_layers,
            num_experts,
            qk_layernorm=self.qk_norm,
            shared_expert=shared_expert,
            layers=layers,
        )


@dataclass(frozen=True, kw_only=True)
class DenseModel(Architecture):
    """The architecture of a dense model in a checkpoint, and its parameters' dtype; see ``read_model``."""

    dtype: "torch.dtype"

    def describe(self) -> str:
        return f"dense, {super().describe()}, {str(self.dtype).removeprefix('torch.')}"


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


def flags_of(args: Namespace) -> dict[str, Any]:
    """The architecture's flags in Megatron's arguments, but for those without a value.

    Raises:
        AttributeError, ValueError: an argument that is needed is missing, or its value is no flag's.
    """
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
