"""A plan as text, its warnings, and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.planning import measured
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

USUAL_GPUS_PER_NODE = 8
SENT_BY = {
    "data_parallel": "data parallel",
    "expert_parallel": "expert parallel",
    "tensor_parallel": "tensor parallel",
    "pipeline_parallel": "pipeline",
}
HEADROOM = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and fragmentation's


def warnings(plan: Plan, gpu_memory_gib: float) -> list[str]:
    """What works but deserves a second look; each names a flag."""
    found = [*_layout_warnings(plan.setup), *_switch_warnings(plan)]
    need = memory(plan.setup, plan.fullest).total / GIB
    if HEADROOM * gpu_memory_gib < need <= gpu_memory_gib:
        found.insert(
            0,
            f"--gpu-memory-gib {gpu_memory_gib:g}: the estimate of {need:.1f} GiB leaves little for CUDA,"
            " NCCL and fragmentation",
        )
    return found


def _layout_warnings(s: Setup) -> Iterator[str]:
    sizes = {
        "--tensor-model-parallel-size": s.tensor_model_parallel_size,
        "--expert-model-parallel-size x --expert-tensor-parallel-size": s.expert_ranks,
    }
    if wide := next((flags for flags, size in sizes.items() if size > USUAL_GPUS_PER_NODE), None):
        yield (
            f"{wide}: {sizes[wide]} are more than the {USUAL_GPUS_PER_NODE} GPUs of a node, so that every"
            " layer talks between nodes"
        )
    P = s.pipeline_model_parallel_size
    if P > 1 and s.num_microbatches < 4 * P:
        bubble = (P - 1) / (s.virtual_stages * s.num_microbatches + P - 1)
        yield (
            f"--global-batch-size {s.batch}: {s.num_microbatches} micro-batches over {P} pipeline stages"
            f" leave them idle {bubble:.0%} of the time"
        )


def _switch_warnings(plan: Plan) -> Iterator[str]:
    s = plan.setup
    if s.data_parallel_size > 1 and not s.use_distributed_optimizer:
        yield "--use-distributed-optimizer: is off; every GPU keeps all optimizer states"
    if s.use_distributed_optimizer and s.weight_gathers > 1:
        yield (
            "--overlap-param-gather: is off; with expert parallelism Megatron then gathers all weights twice"
            " a step (it needs --overlap-grad-reduce)"
        )
    if not (s.bf16 or s.fp16):
        yield "--bf16: is off; float32 needs twice the memory and several times the time"
    if not plan.tokens:
        yield "--train-iters: is not given, so that the run's length is not known"
    if s.num_experts == s.expert_model_parallel_size > 1:
        yield (
            f"--expert-model-parallel-size {s.expert_model_parallel_size}: one expert a GPU; an uneven router"
            " leaves some GPUs waiting"
        )


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
        "kernel_ms": plan.kernel_ms(),
        "seconds": {
            name: plan.seconds(ratio, peak_tflops, plan.tokens)
            for name, ratio in measured.WALL_OVER_KERNELS.items()
        },
        "utilisation": {name: plan.utilisation(ratio) for name, ratio in measured.WALL_OVER_KERNELS.items()},
        "measured_on": measured.WHERE,
        "warnings": warnings(plan, gpu_memory_gib),
    }


def _size(count: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def describe(plan: Plan, gpu_memory_gib: float, peak_tflops: float) -> str:
    """The whole plan, for people."""
    lines = _model(plan.setup)
    for stage in range(plan.setup.pipeline_model_parallel_size):
        if stage in plan.stages or stage == plan.fullest:
            lines += _stage(plan.setup, stage, gpu_memory_gib)
    lines += _speed(plan, peak_tflops)
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings(plan, gpu_memory_gib))])


def _model(s: Setup) -> list[str]:
    """The model, and its layout over the GPUs."""
    total, active = total_and_active(s)
    experts = ""
    if s.num_experts and s.router:
        kind = f"{s.router.num_routers} routers, {s.router.pooling}" if s.router.num_routers else "no mixture"
        experts = f", {s.num_experts} experts, top {s.moe_router_topk}, router {s.router.router} ({kind})"
    return [
        f"model      {s.num_layers} layers, hidden {s.hidden_size}, {s.num_attention_heads} heads of"
        f" {s.head_dim} in {s.groups} groups, FFN {s.ffn}, vocabulary {s.vocabulary}{experts}",
        f"           {_size(total)} parameters ({total}), {_size(active)} active a token",
        f"layout     {s.world_size} GPUs: TP {s.tensor_model_parallel_size},"
        f" PP {s.pipeline_model_parallel_size}, CP {s.context_parallel_size},"
        f" EP {s.expert_model_parallel_size}, DP {s.data_parallel_size}; {s.batch} x {s.sequence} tokens a"
        f" step in {s.num_microbatches} micro-batches of {s.micro_batch}",
    ]


def _stage(s: Setup, stage: int, gpu_memory_gib: float) -> list[str]:
    """What one GPU of a pipeline rank holds and sends."""
    counts, need = parameters(s, stage), memory(s, stage)
    where = f" (pipeline rank {stage})" if s.pipeline_model_parallel_size > 1 else ""
    parts = ", ".join(f"{part} {_size(count)}" for part, count in counts.items() if count)
    sent = dataclasses.asdict(communication(s, stage))
    amounts = ", ".join(f"{SENT_BY[kind]} {_gib(amount)}" for kind, amount in sent.items() if amount)
    return [
        f"per GPU{where}  {sum(counts.values())} parameters: {parts}",
        f"memory     weights {_gib(need.weights)}, gradients {_gib(need.gradients)}, optimizer"
        f" {_gib(need.optimizer)}, activations ~{_gib(need.activations)}, logits ~{_gib(need.logits)}:"
        f" ~{_gib(need.total)} of {gpu_memory_gib:g}",
        f"sent a step  ~{amounts or 'nothing'}",
    ]


def _speed(plan: Plan, peak_tflops: float) -> Iterator[str]:
    """Arithmetic, and the time that it takes by what was measured."""
    s, flops = plan.setup, flops_per_token(plan.setup)
    step = s.batch * s.sequence
    yield (
        f"arithmetic  {flops / 1e9:.2f} GFLOP a token (forward and backward), "
        f"{flops * step / 1e15:.2f} PFLOP a step"
    )
    length = f"{_size(plan.tokens)} tokens in {s.steps} steps" if plan.tokens else "100 B tokens"
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in plan.kernel_ms().items())
    yield (
        f"time       measured on {measured.WHERE}, without Transformer Engine, and scaled to this run;"
        " communication and recomputation are not in it"
    )
    yield f"           kernels of a micro-batch, ms at {measured.PEAK_TFLOPS} TFLOP/s: {parts}"
    for name, ratio in measured.WALL_OVER_KERNELS.items():
        seconds = plan.seconds(ratio, peak_tflops, step)
        hours = plan.seconds(ratio, peak_tflops, plan.tokens or 100e9) / 3600
        yield (
            f"{name:18}{plan.utilisation(ratio):.0%} of {peak_tflops:g} TFLOP/s,"
            f" {step / seconds / s.world_size:,.0f} tokens/s a GPU, {step / seconds:,.0f} tokens/s in all,"
            f" {seconds:.2f} s a step; {length}: {hours:.1f} hours"
        )
