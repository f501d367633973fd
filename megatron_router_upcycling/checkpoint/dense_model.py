"""A dense model's architecture, read from its checkpoint and checked against its tensors."""

import hashlib
import math
import zlib
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.names import FC1, FC2, QKV, extra_states
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.errors import UserError, reason, shown

# Megatron flag (underscores for dashes) -> the attribute of its arguments, for all that makes two models'
# parameters mean the same. A switch that turns something off stands for the attribute's negation.
ARCHITECTURE = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "group_query_attention": "group_query_attention",
    "qk_layernorm": "qk_layernorm",
    "qk_l2_norm": "qk_l2_norm",
    "add_qkv_bias": "add_qkv_bias",
    "swiglu": "swiglu",
    "squared_relu": "squared_relu",
    "openai_gelu": "openai_gelu",
    "quick_geglu": "quick_geglu",
    "normalization": "normalization",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rotary_interleaved": "rotary_interleaved",
    "rotary_seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "use_rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
NEGATED = {"disable_bias_linear": "add_bias_linear"}
MOST_LAYERS = 10_000
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


@dataclass(frozen=True)
class DenseModel:
    """Sizes of a dense model: L layers, D hidden, F FFN, H query heads, G query groups, d head size."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated: bool
    dtype: torch.dtype
    init_method_std: float
    flags: dict[str, Any]  # Megatron flag -> value, what the manifest records

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "DenseModel":
        """Read the architecture of ``checkpoint``.

        Raises:
            UserError: an MoE, layers that the converter does not know, or arguments that the stored
                tensors contradict.
        """
        root, args = checkpoint.root, checkpoint.args
        _refuse_unknown(checkpoint, args)
        try:
            heads = int(args.num_attention_heads)
            model = cls(
                num_layers=int(args.num_layers),
                hidden_size=int(args.hidden_size),
                ffn_hidden_size=int(args.ffn_hidden_size),
                num_attention_heads=heads,
                num_query_groups=int(args.num_query_groups) if args.group_query_attention else heads,
                kv_channels=int(args.kv_channels),
                gated=bool(args.swiglu or getattr(args, "quick_geglu", False)),
                dtype=_dtype(checkpoint),
                init_method_std=float(args.init_method_std),
                flags=_flags(args),
            )
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{root}: its training arguments do not give the architecture ({reason(error)})"
            ) from None
        model._check_numbers(checkpoint)
        model._check_complete(checkpoint)
        model._check_shapes(checkpoint)
        return model

    def describe(self) -> str:
        """The architecture in one line."""
        return (
            f"dense, {self.num_layers} layers, hidden size {self.hidden_size},"
            f" {'gated ' * self.gated}FFN {self.ffn_hidden_size}, {self.num_attention_heads} heads of size"
            f" {self.kv_channels} in {self.num_query_groups} groups, {str(self.dtype).removeprefix('torch.')}"
        )

    def extra_states(
        self, num_experts: int, shared_expert: bool = False, layers: tuple[int, ...] | None = None
    ) -> list[str]:
        """Keys of the extra states that an MoE made of this model looks for; see ``names.extra_states``."""
        return extra_states(
            self.num_layers,
            num_experts,
            qk_layernorm=bool(self.flags.get("qk_layernorm")),
            shared_expert=shared_expert,
            layers=layers,
        )

    def _check_numbers(self, checkpoint: Checkpoint) -> None:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*names, "kv_channels"):
            if getattr(self, name) < 1:
                raise UserError(f"{checkpoint.root}: its training arguments say {name} {getattr(self, name)}")
        if self.num_layers > MOST_LAYERS:
            raise UserError(f"{checkpoint.root}: {self.num_layers} layers; convert takes up to {MOST_LAYERS}")
        if not 0 <= self.init_method_std < math.inf:
            raise UserError(
                f"{checkpoint.root}: its training arguments say init_method_std {self.init_method_std}"
            )

    def _check_complete(self, checkpoint: Checkpoint) -> None:
        for names in self._parameters():
            if not any(name in checkpoint.tensors for name in names):
                raise UserError(
                    f"{checkpoint.root}: has no tensor {names[0]}, which its training arguments ask for;"
                    " convert takes a dense GPT model"
                )

    def _parameters(self) -> list[tuple[str, ...]]:
        """The names of all parameters of a GPT model with these flags; where Megatron has two, both."""
        flags, attention = self.flags, "decoder.layers.self_attention"
        norm_parts = ("weight", "bias") if flags.get("normalization") == "LayerNorm" else ("weight",)
        found: list[tuple[str, ...]] = [
            ("embedding.word_embeddings.weight",),
            (QKV,),
            (f"{attention}.linear_proj.weight",),
        ]
        found += [(f"{FC1}.weight",), (f"{FC2}.weight",)]
        if flags.get("untie_embeddings_and_output_weights"):
            found.append(("output_layer.weight",))
        if not flags["disable_bias_linear"]:
            found += [(f"{linear}.bias",) for linear in (f"{attention}.linear_proj", FC1, FC2)]
        if flags.get("add_qkv_bias") or not flags["disable_bias_linear"]:
            found.append((f"{attention}.linear_qkv.bias",))
        for part in norm_parts:
            found += [
                (f"decoder.final_layernorm.{part}",),
                (f"{attention}.linear_qkv.layer_norm_{part}", f"decoder.layers.input_layernorm.{part}"),
                (f"{FC1}.layer_norm_{part}", f"decoder.layers.pre_mlp_layernorm.{part}"),
            ]
            if flags.get("qk_layernorm"):
                found += [(f"{attention}.q_layernorm.{part}",), (f"{attention}.k_layernorm.{part}",)]
        return found

    def _check_shapes(self, checkpoint: Checkpoint) -> None:
        L, D, F, d = self.num_layers, self.hidden_size, self.ffn_hidden_size, self.kv_channels
        H, G = self.num_attention_heads, self.num_query_groups
        if H % G:
            raise UserError(f"{checkpoint.root}: {G} query groups do not divide {H} attention heads")
        expected = {
            QKV: (L, (H + 2 * G) * d, D),
            f"{FC1}.weight": (L, (1 + self.gated) * F, D),
            f"{FC2}.weight": (L, D, F),
        }
        for key, shape in expected.items():
            stored = checkpoint.tensors.get(key)
            if stored is None:
                raise UserError(f"{checkpoint.root}: has no tensor {key}; convert takes a dense GPT model")
            if stored.shape != shape:
                raise UserError(
                    f"{checkpoint.root}: {key} is {list(stored.shape)} where the training arguments give"
                    f" {list(shape)} (layers {L}, hidden {D}, FFN {F}, heads {H}, groups {G}, head size {d})"
                )


def query_key_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over places and CRC-32s of the attention's input weights, which any training step changes.

    ``Checkpoint.digest`` does not see values that a torch_dist checkpoint's files hold. The checksums are
    those that ``torch.save`` wrote beside the values; no value is read where one is there.

    Args:
        checkpoint: stacked over layers, as ``open_dense`` gives it.
    """
    stored, digest = checkpoint.tensors[QKV], hashlib.sha256()
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets):
        values = checkpoint.find_values(chunk, stored.dtype)
        if values:
            checksum = values.checksum
        else:
            tensor = checkpoint.read_chunk(chunk, stored.dtype, bytearray()).contiguous()
            checksum = zlib.crc32(tensor.flatten().view(torch.uint8).numpy())
        digest.update(f"{chunk.offsets} {chunk.sizes} {checksum}\n".encode())
    return digest.hexdigest()


def holds_experts(keys: Iterable[str]) -> bool:
    return any(".mlp.experts." in key or ".mlp.router." in key for key in keys)


def _refuse_unknown(checkpoint: Checkpoint, args: Namespace) -> None:
    root, keys = checkpoint.root, checkpoint.tensors
    num_experts = getattr(args, "num_experts", None)
    if num_experts or holds_experts(keys):
        experts = f" with {shown(num_experts)} experts" if num_experts else ""
        raise UserError(
            f"DENSE {root}: a Mixture-of-Experts already{experts}; name a dense model's checkpoint"
        )
    for name in UNKNOWN_LAYERS:
        if value := getattr(args, name, None):
            raise UserError(
                f"DENSE {root}: trained with --{name.replace('_', '-')} {shown(value)}, which convert does"
                " not support; it takes GPT models with ordinary attention"
            )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    stored = checkpoint.tensors.get(QKV)
    if stored is None:
        raise UserError(f"{checkpoint.root}: has no tensor {QKV}; convert takes a dense GPT model")
    return stored.dtype


def _flags(args: Namespace) -> dict[str, Any]:
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
