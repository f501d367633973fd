"""Megatron's arguments in the common state, and the manifest's sections that must agree with them."""

from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import (
    ARCHITECTURE,
    BUILD_DEFAULTS,
    MODEL_DEFAULTS,
    NEGATED,
)
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.verify.verification import Verification

# Arguments whose values in the dense run mean nothing to a Mixture-of-Experts that starts anew.
FRESH = {
    "ckpt_format": "torch_dist",
    "iteration": 0,
    "curr_iteration": 0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "num_floating_point_operations_so_far": 0,
}
UPCYCLED = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
}
LEFT_TO_TRAINING = {"moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"}


def check_arguments(verification: Verification) -> None:
    """Compare the training arguments with the dense run's and with the manifest."""
    findings = verification.findings
    try:
        args, dense_args = vars(verification.moe.args), vars(verification.dense.args)
    except UserError as error:
        findings.add("arguments", COMMON_STATE, str(error))
        return
    wanted = _of_trained(dense_args) if verification.trained else _of_fresh(dense_args)
    # What Megatron asks for and the dense run did not record; older conversions lack it.
    added = MODEL_DEFAULTS | BUILD_DEFAULTS
    wanted = {name: added[name] for name in added if name in args and name not in LEFT_TO_TRAINING} | wanted
    wanted |= _of_experts(verification)
    for name, value in wanted.items():
        if name not in args:
            findings.add("arguments", name, "is missing")
        elif repr(args[name]) != repr(value):
            findings.add("arguments", name, f"is {args[name]!r:.60} where {value!r:.60} is expected")
    if not verification.trained:
        for name in sorted(set(args) - set(wanted)):
            findings.add("arguments", name, "has no place among the arguments")
        _check_fresh_state(verification)
    findings.looked_at["arguments"] = f"{len(wanted)} arguments"


def _of_experts(verification: Verification) -> dict[str, Any]:
    router = verification.start.router
    return {
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_pre_softmax": router.pre_softmax,
        **verification.layout.arguments(verification.model),
    }


def _of_fresh(dense_args: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in dense_args.items() if name not in LEFT_TO_TRAINING}
    return kept | FRESH | UPCYCLED


def _of_trained(dense_args: dict[str, Any]) -> dict[str, Any]:
    """What training leaves as it is: the architecture."""
    names = (*ARCHITECTURE.values(), *NEGATED.values(), "num_query_groups")
    return {name: dense_args[name] for name in names if dense_args.get(name) is not None}


def _check_fresh_state(verification: Verification) -> None:
    """Look for what a run that goes on would find beside the arguments."""
    common, findings = verification.moe.common, verification.findings
    if common.get("iteration") != 0:
        findings.add("arguments", "iteration", f"is {common.get('iteration')} in the common state")
    known = {"args", "checkpoint_version", "content_metadata", *FRESH}
    for name in sorted(set(common) - known):
        findings.add("arguments", name, "has no place in the common state")


def check_manifest(verification: Verification) -> None:
    """Compare the manifest's architecture and digest with the dense checkpoint."""
    dense, model, findings = verification.dense, verification.model, verification.findings
    recorded, flags = verification.section("model"), model.flags | verification.layout.flags(model)
    for flag in sorted({*recorded, *flags}):
        if recorded.get(flag) != flags.get(flag):
            what = f"manifest says {recorded.get(flag)!r:.60}, DENSE {flags.get(flag)!r:.60}"
            findings.add("arguments", flag, what)
    if verification.section("source").get("digest") != dense.digest():
        what = "is not the checkpoint whose digest the manifest records"
        findings.add("arguments", f"DENSE {dense.root}", what)
