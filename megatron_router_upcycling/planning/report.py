"""A plan as text, its warnings, and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.planning import figures
from megatron_router_upcycling.planning.figures import GIB
from megatron_router_upcycling.planning.setup import Setup

GPUS_PER_NODE = 8
HEADROOM = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and fragmentation's


def warnings(s: Setup, gpu_memory_gib: float) -> Iterator[str]:
    """Warnings about settings that work but are often mistakes; each names a flag."""
    need = sum(figures.memory(s, figures.fullest(s)).values()) / GIB
    if HEADROOM * gpu_memory_gib < need <= gpu_memory_gib:
        yield f"--gpu-memory-gib {gpu_memory_gib:g}: about {need:.1f} GiB leave little for CUDA and NCCL"
    for flag, size in (("tensor", s.tensor_model_parallel_size), ("expert", s.expert_ranks)):
        if size > GPUS_PER_NODE:
            yield f"--{flag}-model-parallel-size: {size} GPUs are more than a node has: slow communication"
    P, m = s.pipeline_model_parallel_size, s.num_microbatches
    if P > 1 and m < 4 * P:
        idle = (P - 1) / (s.num_virtual_stages_per_pipeline_rank * m + P - 1)
        yield (
            f"--global-batch-size {s.global_batch_size}: {m} micro-batches over {P} pipeline stages leave"
            f" them idle {idle:.0%} of the time"
        )
    if s.data_parallel_size > 1 and not s.use_distributed_optimizer:
        yield "--use-distributed-optimizer: is off; every GPU keeps all optimizer states"
    elif s.use_distributed_optimizer and s.weight_gathers > 1:
        yield (
            "--overlap-param-gather: is off; with expert parallelism Megatron then gathers all weights twice"
            " a step (it needs --overlap-grad-reduce)"
        )
    if s.element_size > 2:
        yield "--bf16: is off; float32 needs twice the memory and several times the time"


def too_large(s: Setup, gpu_memory_gib: float) -> str | None:
    """Why the run cannot fit a GPU's memory, with the flags that would help; None if it fits."""
    need = figures.memory(s, figures.fullest(s))
    total = sum(need.values()) / GIB
    if total <= gpu_memory_gib:
        return None
    remedies = {
        "--use-distributed-optimizer": s.data_parallel_size > 1 and not s.use_distributed_optimizer,
        "a larger --expert-model-parallel-size": s.expert_model_parallel_size < s.num_experts,
        f"--micro-batch-size {s.micro_batch_size // 2}": s.micro_batch_size > 1,
        "--recompute-granularity full": s.recompute_granularity != "full",
        "a larger --tensor-model-parallel-size or --pipeline-model-parallel-size": True,
    }
    parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in need.items())
    return (
        f"--gpu-memory-gib {gpu_memory_gib:g}: the run needs about {total:.1f} GiB a GPU ({parts}); what"
        " helps: " + ", ".join(remedy for remedy, helps in remedies.items() if helps)
    )


def as_json(s: Setup, gpu_memory_gib: float, peak_tflops: float) -> dict[str, Any]:
    """All figures, as bytes, seconds and counts."""
    flops, step = figures.flops_per_token(s), figures.step_seconds(s, peak_tflops)
    derived = {"data_parallel_size": s.data_parallel_size, "num_microbatches": s.num_microbatches}
    return {
        "setup": dataclasses.asdict(s) | derived,
        "parameters": dict(zip(("total", "active"), figures.total_and_active(s), strict=True)),
        "stages": {
            str(stage): {
                "parameters": figures.parameters(s, stage),
                "memory": (need := figures.memory(s, stage)) | {"total": sum(need.values())},
                "communication": figures.communication(s, stage),
            }
            for stage in range(s.pipeline_model_parallel_size)
        },
        "flops_per_token": flops,
        "tokens": s.train_iters * s.tokens_per_step,
        "kernel_ms": figures.kernel_ms(s),
        "seconds": {name: seconds * s.train_iters for name, seconds in step.items()},
        "utilisation": {
            name: flops * s.tokens_per_step / (seconds * s.world_size * peak_tflops * 1e12)
            for name, seconds in step.items()
        },
        "measured_on": figures.MEASURED_ON,
        "warnings": [*warnings(s, gpu_memory_gib)],
    }


def describe(s: Setup, gpu_memory_gib: float, peak_tflops: float) -> str:
    """The whole plan as text, with the first, the fullest and the last pipeline rank."""
    found = as_json(s, gpu_memory_gib, peak_tflops)
    lines = [*_model(s, **found["parameters"])]
    for stage in sorted({0, figures.fullest(s), s.pipeline_model_parallel_size - 1}):
        of_stage = found["stages"][str(stage)]
        where = f" (pipeline rank {stage})" if s.pipeline_model_parallel_size > 1 else ""
        counts, need = of_stage["parameters"], of_stage["memory"].pop("total")
        parts = ", ".join(f"{part} {_size(count)}" for part, count in counts.items() if count)
        lines += [
            f"per GPU{where}  {sum(counts.values())} parameters: {parts}",
            f"memory     {_gib(of_stage['memory'])}: ~{need / GIB:.2f} GiB of {gpu_memory_gib:g}",
            f"sent a step  ~{_gib(of_stage['communication']) or 'nothing'}",
        ]
    lines += _speed(s, found, peak_tflops)
    return "\n".join([*lines, *(f"warning: {warning}" for warning in found["warnings"])])


def _size(count: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def _gib(sizes: dict[str, float]) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {size / GIB:.2f} GiB" for kind, size in sizes.items() if size)


def _model(s: Setup, total: int, active: int) -> Iterator[str]:
    """The model, and its layout over the GPUs."""
    experts = ""
    if s.router:
        kind = f"{s.router.num_routers} routers, {s.router.pooling}" if s.router.num_routers else "no mixture"
        experts = f", {s.num_experts} experts, top {s.moe_router_topk}, router {s.router.router} ({kind})"
    yield (
        f"model      {s.num_layers} layers, hidden {s.hidden_size}, {s.num_attention_heads} heads of"
        f" {s.kv_channels} in {s.num_query_groups} groups, FFN {s.ffn_hidden_size}, vocabulary"
        f" {s.padded_vocab_size}{experts}"
    )
    yield f"           {_size(total)} parameters ({total}), {_size(active)} active a token"
    yield (
        f"layout     {s.world_size} GPUs: TP {s.tensor_model_parallel_size},"
        f" PP {s.pipeline_model_parallel_size}, CP {s.context_parallel_size},"
        f" EP {s.expert_model_parallel_size}, DP {s.data_parallel_size}; {s.global_batch_size} x"
        f" {s.seq_length} tokens a step in {s.num_microbatches} micro-batches of {s.micro_batch_size}"
    )


def _speed(s: Setup, found: dict[str, Any], peak_tflops: float) -> Iterator[str]:
    """Arithmetic, and the time estimated from measurements (``figures.MEASURED``)."""
    flops, step, tokens = found["flops_per_token"], s.tokens_per_step, found["tokens"]
    work = f"{flops / 1e9:.2f} GFLOP a token (forward and backward), {flops * step / 1e15:.2f} PFLOP a step"
    yield f"arithmetic  {work}"
    length = f"{_size(tokens)} tokens in {s.train_iters} steps" if tokens else "100 B tokens"
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in found["kernel_ms"].items())
    yield (
        f"time       measured on {figures.MEASURED_ON}, without Transformer Engine, and scaled to this run;"
        " communication and recomputation are not in it"
    )
    yield f"           kernels of a micro-batch, ms at {figures.PEAK_TFLOPS} TFLOP/s: {parts}"
    for name, seconds in figures.step_seconds(s, peak_tflops).items():
        yield (
            f"{name:18}{found['utilisation'][name]:.0%} of {peak_tflops:g} TFLOP/s,"
            f" {step / seconds / s.world_size:,.0f} tokens/s a GPU, {step / seconds:,.0f} tokens/s in all,"
            f" {seconds:.2f} s a step; {length}: {seconds * (tokens or 100e9) / step / 3600:.1f} hours"
        )
