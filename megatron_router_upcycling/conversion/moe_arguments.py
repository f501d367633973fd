"""Megatron's arguments for an MoE that has not trained yet, for its common state and its manifest."""

from collections.abc import Mapping
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import BUILD_DEFAULTS, MODEL_DEFAULTS, DenseModel
from megatron_router_upcycling.checkpoint.format import safe_pickle
from megatron_router_upcycling.checkpoint.format.files import BACKEND
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.fine_grained import SHARE
from megatron_router_upcycling.conversion.options import Options

# Megatron's arguments for a fresh run.
FRESH = {
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "iteration": 0,
    "curr_iteration": 0,
    "ckpt_format": BACKEND,
    "num_floating_point_operations_so_far": 0,
}
# Arguments of a dense model's experts that a run may change.
PLAIN = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_latent_size": None,
}
# Arguments that a manifest records.
RECORDED = (
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_enable_expert_bias"),
)
# The training machine decides which expert modules to build: --use-checkpoint-args must not set these.
DECIDED_LATER = ("moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias")


def moe_arguments(model: DenseModel, options: Options, layers: tuple[int, ...] | None) -> dict[str, Any]:
    """Megatron's arguments for the MoE in addition to the dense model's; ``layers``: those with experts."""
    F, router = model.ffn_hidden_size, options.router
    frequency = 1 if layers is None else [int(layer in layers) for layer in range(model.num_layers)]
    scale = router.granularity * (1 - SHARE if options.shared_expert else 1)
    return {
        "moe_ffn_hidden_size": F // router.granularity,
        "moe_router_topk_scaling_factor": None if scale == 1 else float(scale),
        "moe_shared_expert_intermediate_size": F if options.shared_expert else None,
        "moe_layer_freq": frequency,
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_pre_softmax": router.pre_softmax,
    }


def recorded_flags(arguments: Mapping[str, Any], ffn_hidden_size: int) -> dict[str, Any]:
    """Those of an MoE's arguments that are neither Megatron's defaults nor the router's, for a manifest."""
    flags = {name: value for name in RECORDED if (value := arguments.get(name))}
    if flags.get("moe_ffn_hidden_size") == ffn_hidden_size:
        del flags["moe_ffn_hidden_size"]
    if (frequency := arguments.get("moe_layer_freq", 1)) != 1:
        flags["moe_layer_freq"] = str(frequency).replace(" ", "")
    return flags


def fresh_common_state(source: Checkpoint, arguments: dict[str, Any]) -> dict[str, Any]:
    """The common state of an MoE that has not trained yet: the source's, with other ``arguments``.

    Megatron takes the architecture (``--use-checkpoint-args``) and the position in the data from its
    arguments; optimizer, schedule and random state start anew.
    """
    values = MODEL_DEFAULTS | BUILD_DEFAULTS | vars(source.args) | FRESH | arguments
    kept: dict[str, Any] = {"checkpoint_version": source.common.get("checkpoint_version", 3.0)}
    kept["content_metadata"] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    args = safe_pickle.namespace({name: value for name, value in values.items() if name not in DECIDED_LATER})
    return kept | {"args": args, "iteration": 0, "num_floating_point_operations_so_far": 0}
