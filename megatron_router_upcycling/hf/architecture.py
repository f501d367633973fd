"""The supported Qwen models, as Megatron's flags and arguments.

Supported: Qwen1.5, Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``: bias on query, key and value), Qwen3
(``Qwen3ForCausalLM``: norms on query and key) and their Mixture-of-Experts classes. Options that these
classes do not have are refused by name. Pure: no torch, no transformers.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import UNKNOWN_LAYERS, Architecture, megatron_arguments
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.expert_layers import MOST_LAYERS, has_experts, layer_frequency

# Megatron argument -> the value in training with which a Qwen class computes the same. An argument that a
# checkpoint does not record is assumed to have it.
EXPECTED_ARGUMENTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    **dict.fromkeys(("add_bias_linear", "squared_relu", "openai_gelu", "quick_geglu", "qk_l2_norm"), False),
    **dict.fromkeys(("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"), False),
    **dict.fromkeys(("rotary_interleaved", "use_rope_scaling", "use_mup"), False),
    **dict.fromkeys(("rotary_seq_len_interpolation_factor", "no_rope_freq", "window_size")),
    "activation_func_clamp_value": None,
}
# The same, for the routing of an MoE.
EXPECTED_ROUTING: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
}


@dataclass(frozen=True, kw_only=True)
class QwenModel(Architecture):
    """A Qwen model: an architecture, and the other entries of its config.json."""

    norm_epsilon: float
    rotary_base: int
    vocab_size: int
    padded_vocab_size: int  # rows of Megatron's embedding
    max_position_embeddings: int
    # Of a Mixture-of-Experts.
    num_experts: int = 0
    expert_layers: Sequence[int] = ()
    expert_ffn_size: int = 0
    routed_scale: float = 1.0  # what the chosen experts' weights are multiplied by
    shared_expert_size: int = 0  # width of the FFN that every token passes as well; 0: there is none
    shared_expert_gated: bool = False  # whether it is weighted by the sigmoid of a gate

    @property
    def dense_layers(self) -> Sequence[int]:
        """The layers without experts."""
        if len(self.expert_layers) == self.num_layers:
            return ()
        every = range(self.num_layers)
        return [layer for layer in every if layer not in self.expert_layers] if self.num_experts else every

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have experts and some have none: Megatron then stores layer by layer."""
        return bool(self.num_experts and self.dense_layers)

    @property
    def family(self) -> str:
        return "qwen3" if self.qk_norm else "qwen2"

    @property
    def model_type(self) -> str:
        """transformers' name of the class."""
        return self.family + "_moe" * bool(self.num_experts)

    def describe(self) -> str:
        experts = f"{self.num_experts} experts" if self.num_experts else "dense"
        if self.num_experts and self.expert_ffn_size != self.ffn_hidden_size:
            experts += f" of width {self.expert_ffn_size}"
        if self.shared_expert_size:
            experts += f" and a shared one of width {self.shared_expert_size}"
        if self.layers_differ:
            experts += f" in {len(self.expert_layers)} of {self.num_layers} layers"
        vocabulary = f"vocabulary {self.vocab_size}, embeddings {'tied' if self.tied else 'untied'}"
        return f"{self.family} {experts}, {super().describe()}, {vocabulary}"


def from_flags(flags: dict[str, Any]) -> QwenModel:
    """The model that Megatron's flags (underscores for dashes) build."""
    return _from_arguments(megatron_arguments(flags), flags["padded_vocab_size"])


def from_megatron(args: Namespace, root: Path, embedding_rows: int) -> QwenModel:
    """The model that the training arguments of the checkpoint ``root`` describe; its embedding is padded."""
    try:
        model = _from_arguments(args, embedding_rows)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{root}: its training arguments do not give the architecture ({error})") from None
    check_exportable(args, model, root)
    return model


def check_exportable(args: Namespace, model: Architecture, root: Path) -> None:
    """Refuse a model that no Qwen class can represent; ``args`` need not be complete."""
    routing = EXPECTED_ROUTING if getattr(args, "num_experts", None) else {}
    for name, expected in (dict.fromkeys(UNKNOWN_LAYERS) | EXPECTED_ARGUMENTS | routing).items():
        found = getattr(args, name, expected)
        if found != expected and (found or expected):  # None and False both mean off
            raise UserError(
                f"{root}: trained with {name} {found!r} where a Qwen class has {expected!r};"
                " it cannot be exported"
            )
    if model.qkv_bias == model.qk_norm:
        both = "both" if model.qkv_bias else "neither"
        raise UserError(
            f"{root}: has {both} of QKV bias and query/key norms; the Qwen classes have one of them"
            " (--add-qkv-bias or --qk-layernorm)"
        )
    if _shared_expert_size(args) and model.qk_norm:
        raise UserError(
            f"{root}: with query/key norms it is a Qwen3-MoE, which has no shared expert (--shared-expert);"
            " it cannot be exported"
        )


def _shared_expert_size(args: Namespace) -> int:
    routed = getattr(args, "num_experts", None)
    return int((routed and getattr(args, "moe_shared_expert_intermediate_size", None)) or 0)


def _from_arguments(args: Namespace, embedding_rows: int) -> QwenModel:
    return QwenModel.from_arguments(
        Namespace(**EXPECTED_ARGUMENTS | vars(args)),
        norm_epsilon=float(args.layernorm_epsilon),
        rotary_base=int(args.rotary_base),
        vocab_size=min(int(getattr(args, "vocab_size", None) or embedding_rows), embedding_rows),
        padded_vocab_size=embedding_rows,
        max_position_embeddings=int(args.max_position_embeddings),
        **(_of_experts(args) if getattr(args, "num_experts", None) else {}),
    )


def _of_experts(args: Namespace) -> dict[str, Any]:
    """The fields of QwenModel that only a Mixture-of-Experts has."""
    num_layers = int(args.num_layers)
    layers: Sequence[int] = range(num_layers)
    frequency = layer_frequency(getattr(args, "moe_layer_freq", 1), "moe_layer_freq")
    if frequency != 1:
        found = has_experts(frequency, min(num_layers, MOST_LAYERS))
        if len(found) != num_layers or not any(found):
            raise ValueError(f"moe_layer_freq {frequency} for {num_layers} layers")
        layers = [layer for layer in layers if found[layer]]
    return {
        "num_experts": int(args.num_experts),
        "expert_layers": layers,
        "expert_ffn_size": int(getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size),
        "routed_scale": float(getattr(args, "moe_router_topk_scaling_factor", None) or 1.0),
        "shared_expert_size": _shared_expert_size(args),
        "shared_expert_gated": bool(getattr(args, "moe_shared_expert_gate", False)),
    }
