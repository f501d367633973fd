"""One rank's step, measured beside the plan of the run.

Megatron's ``--fake-process-group`` takes the place of the other ranks: collectives return at once and move
nothing. So this rank builds its real shard of the model, its gradient buffers and its share of the optimizer,
and goes one step, of one micro-batch (of as many as there are pipeline stages under pipeline parallelism), of
random tokens that go to experts by lot. Sizes are real; the loss is not.
"""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.planning import figures, report
from megatron_router_upcycling.planning.rehearsal import instruments
from megatron_router_upcycling.planning.rehearsal.prepare import Rehearsal, prepare
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.training import launch


def rehearse(argv: list[str], gpus: str = "--gpus") -> None:
    """Prepare, build, load, step and measure one rank; print the report and write ``--output``.

    Raises:
        UserError: what cannot work; ``gpus`` is the flag by which the number of GPUs is named.
    """
    rehearsal = prepare(argv, gpus)
    found = run(rehearsal)
    args, load = rehearsal.run.args, rehearsal.run.load
    print(describe(args, rehearsal.planned, found, load), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run(rehearsal: Rehearsal) -> dict[str, Any]:
    """Build, load, step and measure; the figures of ``compare``."""
    args, planned, load = rehearsal.run.args, rehearsal.planned, rehearsal.run.load
    start = time.monotonic()
    model, optimizer, scheduler = build(rehearsal.run)
    loaded = None
    if load:
        from megatron.core.utils import unwrap_model

        from megatron_router_upcycling.planning.rehearsal import shard

        loaded = shard.load(unwrap_model(model), load)
        optimizer.reload_model_params()
    built = time.monotonic()
    measured = measure(args, model, optimizer, scheduler, planned.vocabulary)
    measured |= {"build_seconds": built - start, "step_seconds": time.monotonic() - built, "loaded": loaded}
    return compare(args, planned, measured)


def build(run: launch.Run) -> tuple[list[Any], Any, Any]:
    """This rank's model chunks in Megatron's DDP, its optimizer and its schedule."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_router_upcycling.training.train import model_config

    training.initialize_megatron()
    container = pretrain_cfg_container_from_args(run.args, model_config(run))
    return training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        checkpointing_context={},
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def random_batches(args: Namespace, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, as Megatron's data loader hands them out."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        tokens = torch.randint(vocabulary, shape, generator=generator)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(args.seq_length).repeat(args.micro_batch_size, 1),
        }


def microbatches(args: Namespace) -> int:
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def step(
    args: Namespace, model: list[Any], optimizer: Any, scheduler: Any, data: Any, forward_step: Any = None
) -> None:
    """Megatron's own training step."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config
    from megatron.training.training import train_step

    from megatron_router_upcycling.training import language_model

    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    call = forward_step or language_model.forward_step
    train_step(call, data, model, optimizer, scheduler, config, get_forward_backward_func(), 0)


def measure(
    args: Namespace, model: list[Any], optimizer: Any, scheduler: Any, vocabulary: int
) -> dict[str, Any]:
    """Figures of one training step of this rank."""
    from megatron_router_upcycling.training import language_model

    columns = vocabulary // args.tensor_model_parallel_size
    # Logits are recognised by their width; in a toy model whose hidden size is the same, they are not.
    saved = instruments.SavedForBackward(model, columns if columns != args.hidden_size else 0)
    sent = instruments.Collectives(instruments.parallel_groups())
    first_forward = [saved.during(language_model.forward_step)]

    def forward_step(*step_args: Any, **kwargs: Any) -> Any:
        call = first_forward.pop() if first_forward else language_model.forward_step
        return call(*step_args, **kwargs)

    data: Any = random_batches(args, vocabulary)
    if len(model) > 1:
        data = [random_batches(args, vocabulary) for _ in model]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with sent:
        step(args, model, optimizer, scheduler, data, forward_step)
    return {
        "parameters": instruments.parameters_by_part(model),
        "weights": instruments.weight_bytes(model),
        "gradients": instruments.gradient_bytes(model),
        "optimizer": instruments.optimizer_bytes(optimizer, copies=args.bf16 or args.fp16),
        "activations_per_token": sum(saved.activations.values())
        / (args.micro_batch_size * args.seq_length / args.context_parallel_size),
        "sent": dict(sent.sent),
        "microbatches": microbatches(args),
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def compare(args: Namespace, planned: Setup, measured: dict[str, Any]) -> dict[str, Any]:
    """Measured, planned and, where it has one, Megatron's own figure, for each quantity of this rank."""
    from megatron.core import parallel_state
    from megatron.training import theoretical_memory_usage as megatron

    stage = parallel_state.get_pipeline_model_parallel_rank()
    plan = figures.memory(planned, stage)
    whole = Namespace(**vars(args))
    whole.seq_length, whole.global_batch_size = planned.sequence, planned.batch
    activations = (
        megatron.compute_activation_memory
        if args.sequence_parallel and args.recompute_granularity == "selective"
        else megatron.compute_activation_memory_without_sp
    )
    # Of all micro-batches in flight, of every model chunk and of the configured length, as planned. Under
    # full recomputation what is measured leaves out the layers at work.
    whole_length = args.seq_length == planned.sequence
    before = measured["weights"] + measured["gradients"] + measured["optimizer"]
    at_peak = measured["peak_memory"] - before if measured["peak_memory"] and whole_length else None
    scale = figures.tokens_on_gpu(planned) * figures.in_flight(planned, stage) * planned.virtual_stages
    return {
        "rank": args.rank,
        "pipeline_rank": stage,
        "tokens_of_the_step": measured["microbatches"] * args.micro_batch_size * args.seq_length,
        "parameters": {"measured": measured["parameters"], "plan": figures.parameters(planned, stage)},
        "weights": {"measured": measured["weights"], "plan": plan.weights},
        "gradients": {"measured": measured["gradients"], "plan": plan.gradients},
        "optimizer": {"measured": measured["optimizer"], "plan": plan.optimizer},
        "activations": {
            "measured": measured["activations_per_token"] * scale,
            "plan": figures.activations(planned, stage, fused=torch.cuda.is_available()),
        },
        "weights and optimizer": {
            "measured": measured["weights"] + measured["gradients"] + measured["optimizer"],
            "plan": plan.weights + plan.gradients + plan.optimizer,
            "megatron": megatron.compute_weight_and_optimizer_memory(whole),
        },
        "with fused kernels": {"plan": plan.activations},
        "activations and logits": {
            # Where a step's backward pass begins, less what stands before it.
            **({"measured": at_peak} if at_peak else {}),
            "plan": plan.activations + plan.logits,
            "megatron": activations(whole, planned.num_microbatches),
        },
        "sent_in_the_step": measured["sent"],
        **{name: measured[name] for name in ("peak_memory", "loaded", "build_seconds", "step_seconds")},
    }


def describe(args: Namespace, planned: Setup, found: dict[str, Any], load: str | None) -> str:
    """The report, for people."""
    plan = figures.Plan(planned)
    lines = [
        *_heading(args, planned, found, load),
        *_parameters(found["parameters"]),
        *_memory(found),
        _sent(args, found["sent_in_the_step"]),
        "the run as planned:",
        report.describe(plan, args.gpu_memory_gib, args.peak_tflops),
    ]
    if problem := report.too_large(plan, args.gpu_memory_gib):
        lines.append(f"warning: {problem}")
    return "\n".join(lines)


def _heading(args: Namespace, planned: Setup, found: dict[str, Any], load: str | None) -> Iterator[str]:
    yield (
        f"rehearsal of rank {args.rank} of {planned.world_size} (pipeline rank {found['pipeline_rank']},"
        f" DP {planned.data_parallel_size}, EP {planned.expert_model_parallel_size}); the other ranks are not"
        " there"
    )
    yield f"weights: {f'this rank’s shard of {load}, {found["loaded"]} values' if load else 'random'}"
    shortened = args.seq_length < planned.sequence
    yield (
        f"step of {found['tokens_of_the_step']} tokens in micro-batches of {args.micro_batch_size} x"
        f" {args.seq_length}: {found['step_seconds']:.1f} s here,"
        f" after {found['build_seconds']:.1f} s to build"
        + (f"; activations are scaled up to {planned.sequence} tokens a sequence" if shortened else "")
    )


def _parameters(counts: dict[str, dict[str, int]]) -> Iterator[str]:
    measured, plan = counts["measured"], counts["plan"]
    yield f"{'parameters':24}{'measured':>16}{'plan':>16}"
    for part in plan:
        if measured[part] or plan[part]:
            yield f"  {part:22}{measured[part]:16d}{plan[part]:16d}"
    yield f"  {'all':22}{sum(measured.values()):16d}{sum(plan.values()):16d}"


def _memory(found: dict[str, Any]) -> Iterator[str]:
    kinds = ("measured", "plan", "megatron")
    yield f"{'memory, GiB':24}{'measured':>16}{'plan':>16}{'Megatron':>16}"
    rows = ["weights", "gradients", "optimizer", "weights and optimizer", "activations"]
    rows += [] if torch.cuda.is_available() else ["with fused kernels"]
    for name in (*rows, "activations and logits"):
        cells = (f"{found[name][kind] / figures.GIB:.3f}" if kind in found[name] else "-" for kind in kinds)
        yield f"  {name:22}" + "".join(cell.rjust(16) for cell in cells)
    if found["peak_memory"]:
        yield f"  peak on the GPU in this step: {found['peak_memory'] / figures.GIB:.2f} GiB"


def _sent(args: Namespace, sent: dict[str, int]) -> str:
    tokens = args.micro_batch_size * args.seq_length
    parts = ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:.1f} MB" for kind, size in sent.items())
    return f"sent in this step of {tokens} tokens a micro-batch: {parts or 'nothing'}"
