"""Build one real rank of a run of any size, run one step, and compare its sizes with the plan of the run.

Megatron's ``--fake-process-group`` replaces the other ranks: collectives return at once and move no data. The
step has one micro-batch (with pipeline parallelism, one for each stage) of random tokens, which are sent to
random experts. Sizes are real; the loss is not.
"""

import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.checkpoint.format.boxes import Box
from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import figures, reading, report
from megatron_router_upcycling.planning.rehearsal import instruments
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.training import device, launch

TOKENS_ON_CPU = 256  # of a micro-batch; activations grow with tokens and are scaled up


def rehearse(request: launch.Request) -> None:
    """Build, load, step and measure one rank; print and write the figures."""
    run, planned = prepare(request)
    from megatron.training.theoretical_memory_usage import report_theoretical_memory

    found = measure(run, planned)
    print(*describe(run, planned, found), sep="\n", flush=True)
    # Megatron's formula, which covers dense models.
    whole = {"seq_length": planned.seq_length, "global_batch_size": planned.global_batch_size}
    report_theoretical_memory(Namespace(**vars(run.args) | whole), planned.num_microbatches)
    if run.args.output:
        Path(run.args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def prepare(request: launch.Request) -> tuple[launch.Run, Setup]:
    """Prepare one rank through the stages of ``launch.prepare``; return it and the plan of the whole run."""
    launch.stand_alone(request.flags.rehearse_rank, request.flags.rehearse)
    origin = launch.find_origin(request, save=None)
    place = device.choose(request.flags.device)
    args, router = launch.merge(request, origin, place)
    configured = {name: value for name, value in vars(args).items() if name != "router"}
    args.cuda_graph_impl = args.cuda_graph_impl or "none"  # a single step would replay nothing
    launch.adapt(args, place)
    options = router.to_dict() if router else {}
    planned = reading.from_values(configured | {"world_size": args.rehearse}, options, "--gpus")
    _cut_down(args, planned, place)
    launch.validate(args)
    launch.set_global(args)
    return launch.Run(args, router, origin.load), planned


def _cut_down(args: Namespace, planned: Setup, place: str) -> None:
    """Set ``args`` for one step of one rank: no data, tokenizer or files, and a minimum of micro-batches."""
    args.fake_process_group = True
    # The router runs, but tokens then go to random experts: an untrained router may leave an expert without
    # tokens, and the token counts of the missing ranks would then not add up.
    args.moe_router_force_load_balancing = planned.num_experts > 0
    args.mock_data = True
    args.data_path = args.train_data_path = args.valid_data_path = args.test_data_path = None
    args.data_args_path = args.per_split_data_args_path = args.split = None
    args.tokenizer_type = "NullTokenizer"
    args.padded_vocab_size = args.vocab_size = planned.padded_vocab_size
    args.load = args.pretrained_checkpoint = args.save = None
    args.async_save = args.use_persistent_ckpt_worker = False
    args.tensorboard_dir = args.wandb_project = args.rampup_batch_size = None
    args.rerun_mode = "disabled"
    args.train_iters, args.train_samples = planned.train_iters or 1, None
    args.lr_decay_samples, args.lr_warmup_samples = None, 0
    micro_batches = planned.data_parallel_size * planned.pipeline_model_parallel_size
    args.global_batch_size = planned.micro_batch_size * micro_batches
    args.eval_global_batch_size = args.eval_micro_batch_size = None
    if args.rehearse_seq_length or place == "cpu":
        # Context and tensor parallel ranks each take an equal part of a sequence, so it must be divisible.
        multiple = 2 * planned.context_parallel_size * planned.tensor_model_parallel_size
        few = max(1, TOKENS_ON_CPU // planned.micro_batch_size // multiple) * multiple
        args.seq_length = min(planned.seq_length, args.rehearse_seq_length or few)


@torch.no_grad()
def load_shard(model: Sequence[Any], root: str) -> None:
    """Fill the parameters of ``model`` (chunks in DDP) from the checkpoint: the rank itself reads the shards
    that its ``sharded_state_dict`` lists. Megatron's own loading needs collectives."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    checkpoint = open_checkpoint(root)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in unwrap_model(model):
        state = chunk.sharded_state_dict(metadata=groups)
        apply_factories(state)
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor):
                continue
            stored, expected = checkpoint.tensors.get(shard.key), tuple(shard.global_shape)
            # The padding of an embedding may differ with the tensor-parallel size.
            if stored is None or not (stored.shape == expected or shard.allow_shape_mismatch):
                has = f"is {list(stored.shape)}" if stored else "is not"
                raise UserError(
                    f"--load {root}: {shard.key} {has} there, where this model has {list(expected)}; use the"
                    " checkpoint's own architecture"
                )
            stacked = (1,) * (len(expected) - len(shard.local_shape))
            box = Box(tuple(shard.global_offset), stacked + tuple(shard.local_shape))
            target = shard.data.view(box.sizes)
            target.copy_(checkpoint.read_box(shard.key, box, target.to("cpu", stored.dtype)))


def random_batches(args: Namespace, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random micro-batches in the format of Megatron's data loader."""
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


def step(model: list[Any], optimizer: Any, scheduler: Any, data: Any, forward_step: Any = None) -> None:
    """Run Megatron's own ``train_step`` once."""
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


def measure(run: launch.Run, planned: Setup) -> dict[str, Any]:
    """Build this rank, load its shard and step once; return each quantity as measured and as planned."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from megatron_router_upcycling.training import language_model, train

    args, on_gpu, start = run.args, torch.cuda.is_available(), time.monotonic()
    model, optimizer, scheduler = train.build(args, train.model_config(run))
    if run.load:
        load_shard(model, run.load)
        optimizer.reload_model_params()
    built = time.monotonic()
    # Logits are recognised by their width, which does not work if the hidden size is the same (toy models).
    columns = planned.padded_vocab_size // args.tensor_model_parallel_size
    width = columns if columns != args.hidden_size else 0
    forward_step, saved = instruments.counting_saved(language_model.forward_step, model, width)
    sent = instruments.Collectives(instruments.parallel_groups())
    data = [random_batches(args, planned.padded_vocab_size) for _ in model]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with sent:
        step(model, optimizer, scheduler, data if len(data) > 1 else data[0], forward_step)
    stepped = time.monotonic()

    stage = parallel_state.get_pipeline_model_parallel_rank()
    plan = figures.memory(planned, stage)
    tokens = args.micro_batch_size * args.seq_length
    # Scale to all micro-batches in flight, all model chunks and the configured length, as in the plan. With
    # full recomputation the measured value lacks the layers that are being recomputed.
    scale = figures.tokens_on_gpu(planned) / (tokens / args.context_parallel_size)
    scale *= figures.in_flight(planned, stage) * planned.num_virtual_stages_per_pipeline_rank
    held = instruments.held_bytes(model, optimizer, copies=args.bf16 or args.fp16)
    held["activations"] = sum(saved.values()) * scale
    # PyTorch's separate operators on the CPU save more than the fused kernels on a GPU.
    plan["activations"] = figures.activations(planned, stage, fused=on_gpu)
    return {
        "rank": args.rank,
        "pipeline_rank": stage,
        "tokens_of_the_step": get_num_microbatches() * tokens,
        "parameters": {
            "measured": instruments.parameters_by_part(model),
            "plan": figures.parameters(planned, stage),
        },
        **{name: {"measured": size, "plan": plan[name]} for name, size in held.items()},
        "sent_in_the_step": dict(sent.sent),
        "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        "build_seconds": built - start,
        "step_seconds": stepped - built,
    }


def describe(run: launch.Run, planned: Setup, found: dict[str, Any]) -> Iterator[str]:
    args = run.args
    yield (
        f"rehearsal of rank {args.rank} of {planned.world_size} (pipeline rank {found['pipeline_rank']}, DP"
        f" {planned.data_parallel_size}, EP {planned.expert_model_parallel_size}); the other ranks are not"
        " there"
    )
    yield f"weights: {f'this rank’s shard of {run.load}' if run.load else 'random'}"
    scaled = f"; activations are scaled up to {planned.seq_length} tokens a sequence"
    yield (
        f"step of {found['tokens_of_the_step']} tokens in micro-batches of {args.micro_batch_size} x"
        f" {args.seq_length}: {found['step_seconds']:.1f} s here, after {found['build_seconds']:.1f} s to"
        f" build{scaled * (args.seq_length < planned.seq_length)}"
    )
    counts = found["parameters"]
    parts = {part: {kind: counts[kind][part] for kind in counts} for part in figures.PARTS}
    total = {"all": {kind: sum(counts[kind].values()) for kind in counts}}
    yield from _table("parameters", parts | total, "16d")
    kinds = ("weights", "gradients", "optimizer", "activations")
    sizes = {kind: {whose: size / figures.GIB for whose, size in found[kind].items()} for kind in kinds}
    yield from _table("memory, GiB", sizes, "16.3f")
    if found["peak_memory"]:
        yield f"  peak on the GPU in this step: {found['peak_memory'] / figures.GIB:.2f} GiB"
    sent = found["sent_in_the_step"].items()
    amounts = ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:.1f} MB" for kind, size in sent)
    tokens = args.micro_batch_size * args.seq_length
    yield f"sent in this step of {tokens} tokens a micro-batch: {amounts or 'nothing'}"
    yield "the run as planned:"
    yield report.describe(planned, args.gpu_memory_gib, args.peak_tflops)
    if problem := report.too_large(planned, args.gpu_memory_gib):
        yield f"warning: {problem}"


def _table(title: str, rows: dict[str, dict[str, float]], form: str) -> Iterator[str]:
    yield f"{title:24}{'measured':>16}{'plan':>16}"
    for name, row in rows.items():
        if any(row.values()):
            yield f"  {name:22}{row['measured']:{form}}{row['plan']:{form}}"
