"""A plan as text, its warnings, and as JSON."""

import dataclasses
from typing import Any

from megatron_router_upcycling.planning.figures import (
    GIB,
    Plan,
    communication,
    flops_per_token,
    memory,
    parameters,
    total_and_active,
)
from megatron_router_upcycling.planning.setup import Setup

UTILISATIONS = (0.35, 0.45)
USUAL_GPUS_PER_NODE = 8
HEADROOM = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and fragmentation's


def warnings(plan: Plan, gpu_memory_gib: float, peak_tflops: float) -> list[str]:
    """What works but deserves a second look; each names a flag."""
    s = plan.setup
    found = []
    need = memory(s, plan.fullest).total / GIB
    if HEADROOM * gpu_memory_gib < need <= gpu_memory_gib:
        found.append(
            f"--gpu-memory-gib {gpu_memory_gib:g}: the estimate of {need:.1f} GiB leaves little for CUDA,"
            " NCCL and fragmentation"
        )
    experts = s.expert_model_parallel_size * s.expert_tensor_size
    for within, flags in (
        (s.tensor_model_parallel_size, "--tensor-model-parallel-size"),
        (experts, "--expert-model-parallel-size x --expert-tensor-parallel-size"),
    ):
        if within > USUAL_GPUS_PER_NODE:
            found.append(
                f"{flags}: {within} are more than the {USUAL_GPUS_PER_NODE} GPUs of a node, so that every"
                " layer talks between nodes"
            )
            break
    P = s.pipeline_model_parallel_size
    if P > 1 and s.num_microbatches < 4 * P:
        bubble = (P - 1) / (s.virtual_stages * s.num_microbatches + P - 1)
        found.append(
            f"--global-batch-size {s.batch}: {s.num_microbatches} micro-batches over {P} pipeline stages"
            f" leave them idle {bubble:.0%} of the time"
        )
    if s.data_parallel_size > 1 and not s.use_distributed_optimizer:
        found.append("--use-distributed-optimizer: is off; every GPU keeps all optimizer states")
    if s.use_distributed_optimizer and s.weight_gathers > 1:
        found.append(
            "--overlap-param-gather: is off; with expert parallelism Megatron then gathers all weights twice"
            " a step (it needs --overlap-grad-reduce)"
        )
    if not (s.bf16 or s.fp16):
        found.append("--bf16: is off; float32 needs twice the memory and several times the time")
    if not plan.tokens:
        found.append("--train-iters: is not given, so that the run's length is not known")
    if (
        s.num_experts
        and s.num_experts // s.expert_model_parallel_size == 1
        and s.expert_model_parallel_size > 1
    ):
        found.append(
            f"--expert-model-parallel-size {s.expert_model_parallel_size}: one expert a GPU; an uneven router"
            " leaves some GPUs waiting"
        )
    return found


def too_large(plan: Plan, gpu_memory_gib: float) -> str | None:
    """Why the run cannot fit a GPU's memory, in one line with the flags that would help; None if it fits."""
    s, need = plan.setup, memory(plan.setup, plan.fullest)
    if need.total <= gpu_memory_gib * GIB:
        return None
    helps = []
    if not s.use_distributed_optimizer and s.data_parallel_size > 1:
        helps.append("--use-distributed-optimizer")
    if s.num_experts and s.expert_model_parallel_size < s.num_experts:
        helps.append("a larger --expert-model-parallel-size")
    if s.micro_batch > 1:
        helps.append(f"--micro-batch-size {s.micro_batch // 2}")
    if s.recompute_granularity != "full":
        helps.append("--recompute-granularity full")
    helps.append("a larger --tensor-model-parallel-size or --pipeline-model-parallel-size")
    return (
        f"--gpu-memory-gib {gpu_memory_gib:g}: the run needs about {need.total / GIB:.1f} GiB a GPU (weights"
        f" {need.weights / GIB:.1f}, gradients {need.gradients / GIB:.1f}, optimizer"
        f" {need.optimizer / GIB:.1f}, activations {need.activations / GIB:.1f}, logits"
        f" {need.logits / GIB:.1f}); what helps: " + ", ".join(helps)
    )


def as_json(plan: Plan, gpu_memory_gib: float, peak_tflops: float) -> dict[str, Any]:
    """All figures; bytes, seconds and counts."""
    s = plan.setup
    total, active = total_and_active(s)
    return {
        "setup": dataclasses.asdict(s)
        | {"data_parallel_size": s.data_parallel_size, "num_microbatches": s.num_microbatches},
        "parameters": {"total": total, "active": active},
        "stages": {
            str(stage): {
                "parameters": parameters(s, stage),
                "memory": dataclasses.asdict(memory(s, stage)) | {"total": memory(s, stage).total},
                "communication": dataclasses.asdict(communication(s, stage)),
            }
            for stage in range(s.pipeline_model_parallel_size)
        },
        "flops_per_token": flops_per_token(s),
        "tokens": plan.tokens,
        "seconds": {str(u): plan.seconds(u, peak_tflops, plan.tokens) for u in UTILISATIONS},
        "warnings": warnings(plan, gpu_memory_gib, peak_tflops),
    }


def _size(count: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _model(s: Setup) -> str:
    total, active = total_and_active(s)
    experts = ""
    if s.num_experts and s.router:
        kind = f"{s.router.num_routers} routers, {s.router.pooling}" if s.router.num_routers else "no mixture"
        experts = f", {s.num_experts} experts, top {s.moe_router_topk}, router {s.router.router} ({kind})"
    return (
        f"model      {s.num_layers} layers, hidden {s.hidden_size}, {s.num_attention_heads} heads of"
        f" {s.head_dim} in {s.groups} groups, FFN {s.ffn}, vocabulary {s.vocabulary}{experts}\n"
        f"           {_size(total)} parameters ({total}), {_size(active)} active a token"
    )


def describe(plan: Plan, gpu_memory_gib: float, peak_tflops: float) -> str:
    """The whole plan, for people."""
    s = plan.setup
    lines = [_model(s)]
    sizes = (
        ("TP", s.tensor_model_parallel_size),
        ("PP", s.pipeline_model_parallel_size),
        ("CP", s.context_parallel_size),
        ("EP", s.expert_model_parallel_size),
        ("DP", s.data_parallel_size),
    )
    layout = ", ".join(f"{name} {size}" for name, size in sizes)
    lines.append(
        f"layout     {s.world_size} GPUs: {layout}; {s.batch} x {s.sequence} tokens a step in"
        f" {s.num_microbatches} micro-batches of {s.micro_batch}"
    )
    for stage in range(s.pipeline_model_parallel_size):
        if stage not in plan.stages and stage != plan.fullest:
            continue
        counts, need = parameters(s, stage), memory(s, stage)
        where = f" (pipeline rank {stage})" if s.pipeline_model_parallel_size > 1 else ""
        parts = ", ".join(f"{part} {_size(count)}" for part, count in counts.items() if count)
        lines.append(f"per GPU{where}  {sum(counts.values())} parameters: {parts}")
        lines.append(
            f"memory     weights {_gib(need.weights)}, gradients {_gib(need.gradients)}, optimizer"
            f" {_gib(need.optimizer)}, activations ~{_gib(need.activations)}, logits ~{_gib(need.logits)}:"
            f" ~{_gib(need.total)} of {gpu_memory_gib:g}"
        )
        sent = communication(s, stage)
        amounts = ", ".join(
            f"{name} {_gib(amount)}"
            for name, amount in (
                ("data parallel", sent.data_parallel),
                ("expert parallel", sent.expert_parallel),
                ("tensor parallel", sent.tensor_parallel),
                ("pipeline", sent.pipeline_parallel),
            )
            if amount
        )
        lines.append(f"sent a step  ~{amounts or 'nothing'}")
    flops = flops_per_token(s)
    lines.append(
        f"arithmetic  {flops / 1e9:.2f} GFLOP a token (forward and backward), "
        f"{flops * s.batch * s.sequence / 1e15:.2f} PFLOP a step"
    )
    length = f"{_size(plan.tokens)} tokens in {s.steps} steps" if plan.tokens else "100 B tokens"
    for share in UTILISATIONS:
        rate = share * peak_tflops * 1e12 / flops
        seconds = plan.seconds(share, peak_tflops, plan.tokens or 100e9)
        lines.append(
            f"at {share:.0%} of {peak_tflops:g} TFLOP/s  {share * peak_tflops:.0f} TFLOP/s and {rate:,.0f}"
            f" tokens/s a GPU, {rate * s.world_size:,.0f} tokens/s in all,"
            f" {plan.seconds(share, peak_tflops, s.batch * s.sequence):.2f} s a step;"
            f" {length}: {seconds / 3600:.1f} hours"
        )
    lines += [f"warning: {warning}" for warning in warnings(plan, gpu_memory_gib, peak_tflops)]
    return "\n".join(lines)
