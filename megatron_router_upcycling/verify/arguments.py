"""Megatron's arguments in the common state, and the manifest's sections that must agree with them."""

from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import (
    ARCHITECTURE,
    BUILD_DEFAULTS,
    MODEL_DEFAULTS,
    NEGATED,
)
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
from megatron_router_upcycling.conversion.moe_arguments import model_flags, moe_arguments, moe_common_state
from megatron_router_upcycling.conversion.plan import Plan
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.verify.findings import Findings, Verification

VERSIONS = ("args", "checkpoint_version", "content_metadata")


def check_arguments(verification: Verification) -> None:
    """Compare the common state with the one that convert writes; after training, the architecture in it."""
    moe, plan, findings = verification.moe, verification.plan, verification.findings
    try:
        args = vars(moe.args)
        fresh = moe_common_state(plan.dense, plan.model, plan.options, plan.layers)
        wanted = _architecture(plan) if verification.trained else vars(fresh["args"])
    except UserError as error:
        findings.add("arguments", COMMON_STATE, str(error))
        return
    if verification.trained:
        args = {name: value for name, value in args.items() if name in wanted}
    else:
        # What Megatron asks for and the dense run did not record; older conversions lack it.
        added = (MODEL_DEFAULTS | BUILD_DEFAULTS).keys() - vars(plan.dense.args).keys() - args.keys()
        wanted = {name: value for name, value in wanted.items() if name not in added}
        _compare(findings, _without_versions(moe.common), _without_versions(fresh))
    _compare(findings, args, wanted)
    findings.looked_at["arguments"] = f"{len(wanted)} arguments"


def _without_versions(common: dict[str, Any]) -> dict[str, Any]:
    """A common state but for what says how it was written."""
    return {name: value for name, value in common.items() if name not in VERSIONS}


def _compare(findings: Findings, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            findings.add("arguments", name, "is missing")
        elif name not in wanted:
            findings.add("arguments", name, "has no place there")
        elif repr(found[name]) != repr(wanted[name]):
            what = f"is {found[name]!r:.60} where {wanted[name]!r:.60} is expected"
            findings.add("arguments", name, what)


def _architecture(plan: Plan) -> dict[str, Any]:
    """What training leaves as it is."""
    dense = vars(plan.dense.args)
    names = (*(ARCHITECTURE | NEGATED).values(), "num_query_groups")
    kept = {name: dense[name] for name in names if dense.get(name) is not None}
    return kept | moe_arguments(plan.model, plan.options, plan.layers)


def check_manifest(verification: Verification) -> None:
    """Compare the manifest's architecture and digest with the dense checkpoint."""
    plan, findings = verification.plan, verification.findings
    recorded = verification.section("model")
    flags = plan.model.flags | model_flags(plan.model, plan.options, plan.layers)
    for flag in sorted({*recorded, *flags}):
        if recorded.get(flag) != flags.get(flag):
            what = f"manifest says {recorded.get(flag)!r:.60}, DENSE {flags.get(flag)!r:.60}"
            findings.add("arguments", flag, what)
    if verification.section("source").get("digest") != plan.dense.digest():
        what = "is not the checkpoint whose digest the manifest records"
        findings.add("arguments", f"DENSE {plan.dense.root}", what)
