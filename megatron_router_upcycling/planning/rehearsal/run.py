"""One rank of a run of any size on one machine: ``pretrain --rehearse WORLD_SIZE [--rehearse-rank R]``.

    .venv/bin/python -m megatron_router_upcycling.pretrain --config moe.yaml --load MOE --rehearse 64

Megatron's ``--fake-process-group`` stands for the other ranks: collectives return at once and move nothing.
So this rank builds its real shard of the model, its gradient buffers and its share of the optimizer, and goes
one step, of one micro-batch (of as many as there are pipeline stages under pipeline parallelism), of random
tokens that go to experts by lot. Sizes are real; the loss is not.
"""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.planning import figures, reading, report, setup
from megatron_router_upcycling.planning.rehearsal import instruments
from megatron_router_upcycling.planning.setup import Setup

TOKENS_ON_CPU = 256  # of a micro-batch; activations grow with tokens and are scaled up
GIB = figures.GIB


def adapt(args: Namespace, configured: dict[str, Any], router: RouterConfig | None, on_cpu: bool) -> Setup:
    """Check the layout, and set Megatron's parsed arguments for a rehearsal; returns the run as configured.

    ``configured`` holds the arguments as they were before ``device.adapt`` changed them for this machine.

    Raises:
        UserError: the layout cannot work, by the rules of ``router-upcycle plan``.
    """
    if args.vocab_size is None and args.padded_vocab_size is None:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        build_tokenizer(args)  # sets the padded size
    values = {name: value for name, value in configured.items() if name != "router"}
    values["padded_vocab_size"] = args.padded_vocab_size
    planned = reading.from_values(
        values | {"world_size": args.rehearse}, router.to_dict() if router else {}, "--rehearse"
    )
    setup.check(planned, "--rehearse")
    args.fake_process_group = True
    # Tokens go to experts by lot, after the router has done its work: an untrained router may leave an expert
    # without any, and then what the missing ranks would send does not add up.
    args.moe_router_force_load_balancing = planned.num_experts is not None
    args.mock_data = True
    args.data_path = args.train_data_path = args.valid_data_path = args.test_data_path = None
    args.data_args_path = args.per_split_data_args_path = args.split = None
    args.padded_vocab_size = planned.vocabulary
    args.tokenizer_type, args.vocab_size = "NullTokenizer", planned.vocabulary
    args.load = args.pretrained_checkpoint = args.save = None
    args.async_save = args.use_persistent_ckpt_worker = False
    args.tensorboard_dir = args.wandb_project = None
    args.rerun_mode = "disabled"
    args.rampup_batch_size = None
    args.train_iters, args.train_samples = planned.steps or 1, None
    args.lr_decay_samples, args.lr_warmup_samples = None, 0
    args.global_batch_size = (
        planned.micro_batch * planned.data_parallel_size * planned.pipeline_model_parallel_size
    )
    args.eval_global_batch_size = args.eval_micro_batch_size = None
    if args.rehearse_seq_length or on_cpu:
        each = 2 * planned.context_parallel_size * planned.tensor_model_parallel_size
        few = max(1, TOKENS_ON_CPU // planned.micro_batch // each) * each
        args.seq_length = min(planned.sequence, args.rehearse_seq_length or few)
    return planned


def run(prepared: Any, planned: Setup, load: str | None) -> dict[str, Any]:
    """Build, load, step and measure; prints the report and returns its figures."""
    args = prepared.args
    start = time.monotonic()
    model, optimizer, scheduler = build(prepared)
    loaded = None
    if load:
        from megatron.core.utils import unwrap_model

        from megatron_router_upcycling.planning.rehearsal import shard

        loaded = shard.load(unwrap_model(model), load)
        optimizer.reload_model_params()
    built = time.monotonic()
    measured = measure(args, model, optimizer, scheduler, planned.vocabulary)
    measured |= {"build_seconds": built - start, "step_seconds": time.monotonic() - built, "loaded": loaded}
    stage = _stage()
    found = compare(args, planned, stage, measured)
    print(describe(args, planned, stage, found, load), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _stage() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def build(prepared: Any) -> tuple[list[Any], Any, Any]:
    """This rank's model chunks in Megatron's DDP, its optimizer and its schedule."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_router_upcycling.training.train import model_config

    training.initialize_megatron()
    container = pretrain_cfg_container_from_args(prepared.args, model_config(prepared))
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
    # Logits are told by their width; in a toy model whose hidden size is the same, they are not told apart.
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
        "logits_saved": sum(saved.logits.values()),
        "sent": dict(sent.sent),
        "microbatches": microbatches(args),
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def compare(args: Namespace, planned: Setup, stage: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Measured, planned and, where it has one, Megatron's own figure, for each quantity of this rank."""
    from megatron.training import theoretical_memory_usage as megatron

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
            "plan": plan.activations + plan.logits,
            "megatron": activations(whole, planned.num_microbatches),
        },
        "sent_in_the_step": measured["sent"],
        **{name: measured[name] for name in ("peak_memory", "loaded", "build_seconds", "step_seconds")},
    }


def describe(args: Namespace, planned: Setup, stage: int, found: dict[str, Any], load: str | None) -> str:
    """The report, for people."""
    plan = figures.Plan(planned)
    counts = found["parameters"]
    tokens = args.micro_batch_size * args.seq_length
    shortened = args.seq_length < planned.sequence
    lines = [
        f"rehearsal of rank {args.rank} of {planned.world_size}"
        f" (pipeline rank {stage}, DP {planned.data_parallel_size}, EP {planned.expert_model_parallel_size});"
        f" the other ranks are not there",
        f"weights: {'random' if not load else f'this rank’s shard of {load}, {found["loaded"]} values'}",
        f"step of {found['tokens_of_the_step']} tokens in micro-batches of {args.micro_batch_size} x"
        f" {args.seq_length}: {found['step_seconds']:.1f} s here,"
        f" after {found['build_seconds']:.1f} s to build"
        + (f"; activations are scaled up to {planned.sequence} tokens a sequence" if shortened else ""),
        f"{'parameters':24}{'measured':>16}{'plan':>16}",
        *(
            f"  {part:22}{counts['measured'][part]:16d}{counts['plan'][part]:16d}"
            for part in counts["plan"]
            if counts["measured"][part] or counts["plan"][part]
        ),
        f"  {'all':22}{sum(counts['measured'].values()):16d}{sum(counts['plan'].values()):16d}",
        f"{'memory, GiB':24}{'measured':>16}{'plan':>16}{'Megatron':>16}",
    ]
    rows = ["weights", "gradients", "optimizer", "weights and optimizer", "activations"]
    rows += [] if torch.cuda.is_available() else ["with fused kernels"]
    for name in (*rows, "activations and logits"):
        row = found[name]
        cells = (
            f"{row[kind] / GIB:16.3f}" if kind in row else f"{'-':>16}"
            for kind in ("measured", "plan", "megatron")
        )
        lines.append(f"  {name:22}" + "".join(cells))
    if found["peak_memory"]:
        lines.append(f"  peak on the GPU in this step: {found['peak_memory'] / GIB:.2f} GiB")
    sent = ", ".join(
        f"{kind.replace('_', ' ')} {size / 1e6:.1f} MB" for kind, size in found["sent_in_the_step"].items()
    )
    lines.append(f"sent in this step of {tokens} tokens a micro-batch: {sent or 'nothing'}")
    lines.append("the run as planned:")
    lines.append(report.describe(plan, args.gpu_memory_gib, args.peak_tflops))
    if problem := report.too_large(plan, args.gpu_memory_gib):
        lines.append(f"warning: {problem}")
    return "\n".join(lines)
