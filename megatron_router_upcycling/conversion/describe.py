"""A conversion in words: what it would do, and what it did."""

from typing import Any

from megatron_router_upcycling.conversion.convert import Conversion
from megatron_router_upcycling.conversion.steps import CopyExperts
from megatron_router_upcycling.files import format_bytes
from megatron_router_upcycling.initialisation.first_routers import router_parameters


def describe_plan(conversion: Conversion) -> str:
    """What would be done, in a few lines."""
    plan = conversion.plan
    model, options = plan.model, plan.options
    experts = sum(isinstance(step, CopyExperts) for step in plan.steps)
    how = "linked, not written" if conversion.links else "copied"
    apart = options.materialize or options.init.alters_experts
    copies = f"{options.router.num_experts} times" if apart else "once"
    routers = "; ".join(f"{key} {list(shape)}" for key, shape in router_parameters(model, options.router))
    return "\n".join(
        [
            f"{plan.dense.iteration_dir}: {model.describe()}",
            f"  take over  {format_bytes(plan.kept_bytes)} in {len(plan.kept)} entries, {how}",
            f"  experts    {format_bytes(plan.expert_bytes)} of {experts} tensors, each written {copies}",
            f"  routers    {format_bytes(plan.router_bytes)}: {routers}",
            f"  leave out  {len(plan.left_out)} entries of training state",
            f"would write {format_bytes(conversion.bytes_to_write)} to {conversion.out},"
            f" with at most {format_bytes(plan.memory_bytes)} of the model in memory",
        ]
    )


def describe_result(conversion: Conversion, record: dict[str, Any], seconds: float) -> str:
    """What was made, what to expect of its first step, and what to run next."""
    plan, out = conversion.plan, conversion.out
    options, router = plan.options, plan.options.router
    written = sum(file["bytes"] for file in record["files"].values())
    cut = f" (copies cut {router.granularity} ways)" * (router.granularity > 1) + (
        ", a shared expert" * options.shared_expert
    )
    linked = plan.kept_bytes - plan.changed_bytes
    shared = f", {format_bytes(linked)} linked to {plan.dense.root}" if conversion.links else ""
    order = "top-k, then softmax (--no-moe-router-pre-softmax)"
    if router.pre_softmax:
        order = "softmax, then top-k (--moe-router-pre-softmax)"
        first = (
            f"the loss is above the dense model's: a token's {router.top_k} experts have less than the whole"
            f" weight, of which all {router.num_experts} have a share; training makes up for it"
        )
    elif options.init.alters_experts:
        first = "it is near the dense model, as far as its experts still are its FFN"
    else:
        first = "it is exactly the dense model"
        if router.granularity == 1:
            first += "; its loss gives the router no gradient until the experts differ"
    return (
        f"{out}: in each layer {router.num_experts} experts{cut} and {router.describe()},"
        f" {format_bytes(written)} written in {seconds:.1f} s{shared}\n"
        f"prepared for {order}; before training {first}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config YAML"
        f" --load {out} --save RUN"
    )
